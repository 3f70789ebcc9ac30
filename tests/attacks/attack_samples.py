"""Small models, and the table of attacks that every contract is tested on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from phalanx.attacks import (
    APGD,
    FAB,
    FGSM,
    FGSMRS,
    PGD,
    APGDTargeted,
    Attack,
    CarliniWagner,
    ExpertTransfer,
    HopSkipJump,
    JointMargin,
    RayS,
    ReleasedAdvMoE,
    ReleasedAPGD,
    ReleasedPGD,
    RouteSteering,
    Square,
)
from phalanx.nn import ConvBN
from phalanx.routing import DualModel, LinearRouter, MixtureOfExperts, RoutedModel

SHAPE = (1, 4, 4)
CLASSES = 3

ATTACKS: dict[str, Attack] = {
    "fgsm": FGSM(eps="8/255"),
    "fgsm-l2": FGSM(eps=0.3, norm="L2"),
    "fgsm-l1-margin": FGSM(eps=1.0, norm="L1", objective="margin"),
    "fgsm-rs": FGSMRS(eps="8/255"),
    "fgsm-rs-l2-dense": FGSMRS(eps=0.3, norm="L2", step=0.5, surface="dense"),
    "pgd-linf": PGD(eps=0.06, steps=4),
    "pgd-l2": PGD(eps=0.4, norm="L2", steps=4),
    "pgd-l1": PGD(eps=1.5, norm="L1", steps=4),
    "pgd-margin": PGD(eps=0.06, steps=4, objective="margin"),
    "pgd-targeted": PGD(eps=0.06, steps=4, targeted=True),
    "pgd-gaussian": PGD(eps=0.06, steps=4, gaussian_start=0.02),
    "pgd-kl-route": PGD(eps=0.06, steps=4, objective="kl_route"),
    "pgd-restarts": PGD(eps=0.06, steps=3, restarts=3),
    "pgd-from-clean": PGD(eps=0.06, steps=4, random_start=False),
    "pgd-last": PGD(eps=0.06, steps=4, keep="last"),
    "pgd-last-no-drop": PGD(eps=0.06, steps=4, restarts=2, keep="last", early_drop=False),
    "pgd-no-drop": PGD(eps=0.06, steps=4, restarts=2, early_drop=False),
    "pgd-eot": PGD(eps=0.06, steps=3, eot=3),
    "apgd": APGD(eps=0.06, steps=5),
    "apgd-l2-dlr": APGD(eps=0.4, norm="L2", steps=5, objective="dlr"),
    "apgd-l1": APGD(eps=1.5, norm="L1", steps=5, restarts=2),
    "apgd-eot-dense": APGD(eps=0.06, steps=3, eot=3, surface="dense"),
    "apgd-t": APGDTargeted(eps=0.06, steps=4),
    "apgd-t-l1": APGDTargeted(eps=1.5, norm="L1", steps=4, targets=1, restarts=2, surface="experts"),
    "fab": FAB(eps=0.06, steps=4),
    "fab-l2-nearest": FAB(eps=0.4, norm="L2", steps=4, targets=0, restarts=2),
    "fab-l1-dense": FAB(eps=1.5, norm="L1", steps=3, targets=1, restarts=2, surface="dense"),
    "square": Square(eps=0.06, queries=12),
    "square-l2": Square(eps=0.4, norm="L2", queries=8, restarts=2),
    "square-l1-experts": Square(eps=1.5, norm="L1", queries=8, surface="experts"),
    "rays": RayS(eps=0.06, queries=25),
    "rays-l2": RayS(eps=0.4, norm="L2", queries=25),
    "hsj": HopSkipJump(eps=0.06, queries=60, evaluations=4),
    "hsj-l2": HopSkipJump(eps=0.4, norm="L2", queries=60, evaluations=4),
    "cw": CarliniWagner(eps=0.06, steps=4, searches=2),
    "cw-l2": CarliniWagner(eps=0.4, norm="L2", steps=4, searches=3),
    "cw-l2-dense": CarliniWagner(eps=0.4, norm="L2", steps=3, searches=2, surface="dense"),
    "pgd-pinned": PGD(eps=0.06, steps=4, surface="pinned"),
    "pgd-experts": PGD(eps=0.06, steps=4, surface="experts"),
    "pgd-router-l2": PGD(eps=0.4, norm="L2", steps=4, surface="router"),
    "pgd-dense": PGD(eps=0.06, steps=4, surface="dense"),
    "pgd-expert": PGD(eps=0.06, steps=4, surface="expert-0"),
    "steer": RouteSteering(eps=0.06, steps=4),
    "steer-classes": RouteSteering(eps=0.06, steps=3, classes=2),
    "steer-apgd": RouteSteering(eps=0.06, steps=4, search_rule="apgd", combine=True),
    "steer-apgd-classes": RouteSteering(eps=1.5, norm="L1", steps=4, classes=2, search_rule="apgd"),
    "experts": ExpertTransfer(eps=0.06, steps=4),
    "pgd-straight-through": PGD(eps=0.06, steps=4, surface="straight-through"),
    "joint-apgd": JointMargin(eps=0.06, steps=4, search_rule="apgd"),
    "joint": JointMargin(eps=0.06, steps=4),
    "joint-l2": JointMargin(eps=0.4, norm="L2", steps=3, classes=1, robust_weights=(3,)),
    "pgd-released": ReleasedPGD(eps=0.06, steps=4),
    "pgd-released-experts": ReleasedPGD(eps=0.06, steps=3, batch=8, surface="experts"),
    "apgd-released": ReleasedAPGD(eps=0.06, steps=6),
    "pgd-released-advmoe": ReleasedAdvMoE(eps=0.06, steps=4),
}


def centred(model: nn.Sequential) -> nn.Sequential:
    """With the mean answer subtracted, so that different images get different classes or experts."""
    with torch.no_grad():
        model[-1].bias -= model.eval()(images(64)).mean(0)
    return model.train()


def network() -> nn.Sequential:
    return centred(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, CLASSES)))


def convolutional() -> nn.Sequential:
    """Its BatchNorm has seen data: statistics and affine parameters are not the defaults."""
    model = nn.Sequential(ConvBN(1, 4), nn.Tanh(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, CLASSES))
    norm = model[0][1]
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_(0, 0.3)
    norm.running_var.uniform_(0.2, 1)
    return centred(model)


def mixture(top_k: int | str, expert: Callable[[], nn.Module] = network) -> MixtureOfExperts:
    router = LinearRouter(SHAPE, 3)
    nn.init.normal_(router[-1].weight, 0, 0.3)
    return MixtureOfExperts(centred(router), [expert() for _ in range(3)], top_k)


def plain_callable() -> Callable[[Tensor], Tensor]:
    inner = network().requires_grad_(False)
    return lambda x: inner(x)


MODELS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "callable": plain_callable,
    "top-1": lambda: mixture(1).eval(),
    "top-2": lambda: mixture(2).eval(),
    "soft": lambda: mixture("all").eval(),
    "batchnorm-in-training": lambda: convolutional().train(),
    "mixture-in-training": lambda: mixture(1, convolutional).train(),
    "float64": lambda: mixture(1).double().eval(),
}


def build(name: str, seed: int = 0) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(seed)
    return MODELS[name]()


class Called(nn.Module):
    """A callable as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def suited(attack: Attack, model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The model, or, for an attack on dual models alone, one whose robust half it is."""
    if not isinstance(attack, JointMargin):
        return model
    inner = model if isinstance(model, nn.Module) else Called(model)
    torch.manual_seed(1)
    standard = network().train(inner.training)
    for parameter in inner.parameters():
        standard.to(parameter.dtype)
    half = inner if isinstance(inner, RoutedModel) else MixtureOfExperts(None, [inner]).train(inner.training)
    return DualModel(MixtureOfExperts(None, [standard]), half, 0.6).train(inner.training)


def images(size: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> Tensor:
    """Some pixels at 0 and at 1, where a step cannot always go on."""
    draws = torch.rand(size, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (draws * 1.3 - 0.15).clamp(0, 1).to(dtype)


def pixels_for(name: str, size: int) -> Tensor:
    return images(size, torch.float64 if name == "float64" else torch.float32)


def answers(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The deployed model's classes; an `nn.Module` is judged in evaluation mode and left as it was."""
    if not isinstance(model, nn.Module):
        return model(x).argmax(-1)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        predicted = model(x).argmax(-1)
    for module, training in modes:
        module.training = training
    return predicted


def labels_for(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The model's own answers, but for every fifth image, which is wrong from the start."""
    y = answers(model, x)
    y[::5] = (y[::5] + 1) % CLASSES
    return y


class Linear(nn.Module):
    """Logits weight @ x + bias on flattened images."""

    def __init__(self, weight: Sequence[Sequence[float]], bias: Sequence[float] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.register_buffer("bias", torch.tensor(bias or [0.0] * len(weight), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


class Counting:
    """A plain callable that remembers how many images each call brought."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model = model
        self.sizes: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.model(x)
