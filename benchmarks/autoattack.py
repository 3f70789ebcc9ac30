"""AutoAttack, standard version, beside an independent implementation: verdicts, CPU time, what each saving gives.

Run: python benchmarks/autoattack.py [--data FOLDER] [--models FOLDER] [--only cnn,soft] [--norms Linf] [--rounds N]
     [--images N] [--batch B] [--device cuda]

The folder of --data ($PHALANX_CIFAR10 by default) holds CIFAR-10 in the Hugging Face Parquet layout; in that of
--models the attacked networks are trained on the first call and found from then on. A round of the ResNet-18 in one
norm takes about a quarter of an hour, most of it Square's, which asks the model 5,000 times an image.
"""

# N images, A images still standing

from __future__ import annotations

import argparse
import copy
import os
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from common import RESULTS, Bar, Record, Spread, clock, interleaved, ratio, write_record
from torch import Tensor, nn
from trained import METHOD, TRAINING, chosen, cifar, trained

from phalanx.attacks import APGD, FAB, Attack, fab
from phalanx.data import Batch, ImageSet, Splits
from phalanx.evaluation import Member, protocol
from phalanx.evaluation.autoattack_log import REFERENCE_NAMES
from phalanx.experts import build_expert
from phalanx.nn import fold_batchnorm
from phalanx.rng import SampleRng, derive_seed
from phalanx.routing import MixtureOfExperts, build_router
from phalanx.runs import RunFolder
from phalanx.runs.checkpoint import load_tensors
from phalanx.threat import ThreatModel
from phalanx.training import LAST_NAME, train

BATCH = 50
IMAGES = 100
THREATS = {"Linf": ThreatModel("Linf", "8/255"), "L2": ThreatModel("L2", "0.5")}
LEAST_CLEAN = 0.75

TOTAL_LIMIT, APGD_LIMIT = 0.67, 0.5
"""What the whole, and APGD-CE, may cost as a share of the other implementation's time."""
MOST_LOST, MOST_WEAKER = 1, 0.005
"""Images that stand in ours and are broken in theirs; how much higher our robust accuracy may be."""

SMALL_TRAINING = replace(TRAINING, epochs=48)
"""The small networks learn more slowly than the ResNet-18."""
FAB_ABLATION = FAB(steps=100, targets=1)


# -- the networks --------------------------------------------------------------------------------------------------


def small_cnn(data: Splits) -> nn.Module:
    """Three convolutions with BatchNorm."""
    return build_expert(
        "small_cnn", num_classes=data.num_classes, image_size=data.shape[1], mean=data.mean, std=data.std, width=32
    )


def one(data: Splits) -> MixtureOfExperts:
    return MixtureOfExperts(None, [small_cnn(data)])


def soft(data: Splits) -> MixtureOfExperts:
    """Four small networks behind a soft gate."""
    return MixtureOfExperts(build_router("mlp", data.shape, 4), [small_cnn(data) for _ in range(4)], "all")


def _trained_small(build: Callable[[Splits], MixtureOfExperts], source: Path, folder: Path) -> MixtureOfExperts:
    """Trained as `trained.trained` does it, in a run folder of its own."""
    data = cifar(source, folder / "cache")
    torch.manual_seed(0)
    model, run = build(data), RunFolder(folder / build.__name__)
    with run.lock():
        run.prepare({"benchmark": "autoattack", "network": build.__name__, "training": chosen(SMALL_TRAINING)})
        if run.status() != "finished":
            train(model, METHOD, data, SMALL_TRAINING, run, augment=("flip",))
            run.finish([LAST_NAME])
    weights, _ = load_tensors(run.resolve(LAST_NAME))
    model.load_state_dict(weights)
    return model.eval()


NETWORKS: dict[str, Callable[[Path, Path], nn.Module]] = {
    "cnn": lambda source, folder: _trained_small(one, source, folder).experts[0],
    "resnet18": lambda source, folder: trained(source, folder)[0],
    "soft": partial(_trained_small, soft),
}


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# -- the two implementations ---------------------------------------------------------------------------------------


Component = Callable[[Batch], Tensor]
"""Attacks a batch; (A,) bool, what is broken."""


def ours(model: nn.Module | Callable[[Tensor], Any], members: Sequence[Member], seed: int = 0) -> list[Component]:
    """The members of a protocol."""

    def run(member: Member, batch: Batch) -> Tensor:
        rng = SampleRng(derive_seed(seed, member.name), batch.ids)
        result = member.attack.run(model, batch.x, batch.y, rng=rng)
        return result.broken | result.invalid

    return [partial(run, member) for member in members]


def theirs(model: nn.Module, threat: ThreatModel, members: Sequence[Member], seed: int = 0) -> list[Component]:
    """The same members of pyautoattack with the same budgets."""
    from pyautoattack import AutoAttack

    peer = AutoAttack(model, eps=threat.epsilon, norm=threat.norm, seed=seed, device=str(device_of(model)))
    first, aimed, boundary, square = (member.attack for member in members)
    peer.apgd.n_iter, peer.apgd.n_restarts = first.steps, first.restarts
    peer.apgd_targeted.n_iter, peer.apgd_targeted.n_target_classes = aimed.steps, aimed.targets
    peer.fab.n_iter, peer.fab.n_target_classes, peer.fab.targeted = boundary.steps, boundary.targets, True
    peer.square.n_queries = square.queries

    def run(attack: Any, batch: Batch) -> Tensor:
        attack.seed = seed
        x_adv = attack.perturb(batch.x.clone(), batch.y.clone())
        with torch.no_grad():
            return model(x_adv).argmax(-1) != batch.y

    peer.apgd.loss = "ce"
    return [partial(run, attack) for attack in (peer.apgd, peer.apgd_targeted, peer.fab, peer.square)]


class Outcome(NamedTuple):
    """Of one cascade."""

    standing: Tensor
    """(K, N) bool, after each of its K components."""
    seconds: tuple[float, ...]
    """Of each: on a CPU its time, on a GPU what passes until it is done."""


def cascade(components: Sequence[Component], data: Batch, batch_size: int = BATCH) -> Generator[None, None, Outcome]:
    """Each component on what those before it left standing, pausing after every batch; `data` is all classified
    rightly."""
    standing, rows, seconds = torch.ones_like(data.y, dtype=torch.bool), [], []
    device = data.x.device.type
    for component in components:
        taken = 0.0
        for ids in torch.split(standing.nonzero().squeeze(1), batch_size):
            start = clock(device)
            broken = component(Batch(data.x[ids], data.y[ids], data.ids[ids]))
            standing[ids[broken]] = False
            taken += clock(device) - start
            yield
        seconds.append(taken)
        rows.append(standing.clone())
    return Outcome(torch.stack(rows), tuple(seconds))


def in_turn(cascades: Mapping[str, Generator[None, None, Outcome]]) -> dict[str, Outcome]:
    """All of them, a batch of each at a time: whatever else the machine does then slows all alike."""
    found, running = {}, dict(cascades)
    while running:
        for name, one in list(running.items()):
            try:
                next(one)
            except StopIteration as end:
                found[name] = end.value
                del running[name]
    return found


# -- verdicts and time ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Of one network in one norm."""

    n: int
    clean: int
    """Images classified rightly, of n."""
    broken_ours: tuple[int, ...]
    """After each component."""
    broken_theirs: tuple[int, ...]
    lost: int
    """Images that stand in ours and are broken in theirs."""
    gained: int
    """And the reverse."""
    time: Mapping[str, Spread]
    """Ours as a share of theirs: of each component on what its own cascade left standing, and of the total."""
    images_per_second: Mapping[str, float]
    """Of ours and of theirs, through the whole: the median of the rounds."""

    @property
    def weaker(self) -> float:
        """How much higher our robust accuracy is."""
        return (self.lost - self.gained) / self.n


def right_images(model: nn.Module, images: ImageSet, n: int) -> tuple[int, Batch]:
    """Of the first `n` images how many the model classifies rightly, and these, on its device. Refuses a network below
    the bar."""
    x, y, _ = (part.to(device_of(model)) for part in next(images.first(n).batches(n)))
    with torch.no_grad():
        right = model(x).argmax(-1) == y
    clean = int(right.sum())
    if clean < LEAST_CLEAN * n:
        raise SystemExit(f"the network is right about {clean} of {n} images, below {LEAST_CLEAN:.0%}; train longer")
    return clean, Batch(x[right], y[right], torch.arange(clean, device=x.device))


def compare(
    model: nn.Module,
    images: ImageSet,
    threat: ThreatModel,
    name: str,
    n: int,
    rounds: int,
    batch_size: int = BATCH,
) -> Comparison:
    """`name` is the protocol. Both sides take turns, batch by batch, in an order shuffled each round."""
    clean, data = right_images(model, images, n)
    members = protocol(name, threat).members
    sides = {"ours": ours(model, members), "theirs": theirs(model, threat, members)}
    times: dict[str, dict[str, list[float]]] = {
        part: {"ours": [], "theirs": []} for part in (*REFERENCE_NAMES, "total")
    }
    found: dict[str, Outcome] = {}
    order = list(sides)
    for _ in range(rounds):
        random.Random(len(times["total"]["ours"])).shuffle(order)
        found = in_turn({side: cascade(sides[side], data, batch_size) for side in order})
        for side in order:
            for part, seconds in zip(REFERENCE_NAMES, found[side].seconds, strict=True):
                times[part][side].append(max(seconds, 1e-9))
            times["total"][side].append(sum(found[side].seconds))
    stands, fell = found["ours"].standing[-1], ~found["theirs"].standing[-1]
    return Comparison(
        n=n,
        clean=clean,
        broken_ours=tuple((~found["ours"].standing).sum(1).tolist()),
        broken_theirs=tuple((~found["theirs"].standing).sum(1).tolist()),
        lost=int((stands & fell).sum()),
        gained=int((~stands & ~fell).sum()),
        time={part: ratio(both, "ours", "theirs") for part, both in times.items()},
        images_per_second={side: round(clean / median(seconds), 3) for side, seconds in times["total"].items()},
    )


# -- each saving switched off --------------------------------------------------------------------------------------


class _WithWeights(torch.autograd.Function):
    """The model's answer, whose backward pass computes the gradients of all weights, too, and throws them away."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, model: nn.Module) -> Tensor:
        ctx.weights = [weight for weight in model.parameters() if weight.requires_grad]
        with torch.enable_grad():
            ctx.leaf = x.detach().requires_grad_()
            ctx.logits = model(ctx.leaf)
        return ctx.logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        wanted, *_ = torch.autograd.grad(ctx.logits, [ctx.leaf, *ctx.weights], gradient, allow_unused=True)
        return wanted, None


def _bare(model: nn.Module, memory_format: torch.memory_format = torch.contiguous_format) -> Callable[[Tensor], Tensor]:
    """A frozen copy as a plain function: an attack then takes it as it is."""
    copied = copy.deepcopy(model).eval().requires_grad_(False).to(memory_format=memory_format)
    return lambda x: copied(x.contiguous(memory_format=memory_format))


def _weighted(model: nn.Module) -> Callable[[Tensor], Tensor]:
    copied = copy.deepcopy(model).eval().requires_grad_(True)
    copied = copied.to(memory_format=torch.channels_last)
    return lambda x: _WithWeights.apply(x.contiguous(memory_format=torch.channels_last), copied)


@contextmanager
def _sorted_projection() -> Iterator[None]:
    """FAB with the projection of pyautoattack, which sorts the pixels."""
    from pyautoattack.fab_projections import projection_l1, projection_l2, projection_linf

    projections = {"Linf": projection_linf, "L2": projection_l2, "L1": projection_l1}

    def onto_hyperplane(x: Tensor, slope: Tensor, value: Tensor, norm: str) -> Tensor:
        return projections[norm](x, slope, (slope * x).sum(1) - value)

    with patch.object(fab, "onto_hyperplane", onto_hyperplane):
        yield


def _kept(attack: Attack, model: nn.Module, data: Batch) -> None:
    """Search and verdict, no image dropped."""
    x_adv = attack(model, data.x, data.y, rng=SampleRng(0, data.ids))
    with torch.no_grad():
        model(x_adv)


def savings(model: nn.Module, data: Batch, threat: ThreatModel, rounds: int, steps: int = 100) -> dict[str, Spread]:
    """Time without one saving as a ratio to the time with all: of APGD-CE, the projection of FAB-T with one target."""
    folded = fold_batchnorm(model)
    assert folded is not None
    apgd = APGD(steps=steps).within(threat)
    boundary = replace(FAB_ABLATION, steps=steps).within(threat)

    def run(attack: Attack, attacked: Any = model) -> None:
        attack.run(attacked, data.x, data.y, rng=SampleRng(0, data.ids))

    def sorting() -> None:
        with _sorted_projection():
            run(boundary)

    walks: dict[str, Callable[[], object]] = {
        "with all": partial(run, apgd),
        "without folding": partial(run, apgd, _bare(model, torch.channels_last)),
        "without channels_last": partial(run, apgd, _bare(folded)),
        "without dropping": partial(_kept, apgd, model, data),
        "with weight gradients": partial(run, apgd, _weighted(folded)),
    }
    if not rounds:
        return {}
    device = device_of(model).type
    times = interleaved(walks, rounds, device)
    found = {name: ratio(times, name, "with all") for name in walks if name != "with all"}
    projected = interleaved({"newton": partial(run, boundary), "sorted": sorting}, rounds, device)
    return {**found, "projection with a sort": ratio(projected, "sorted", "newton")}


# -- the record ----------------------------------------------------------------------------------------------------


def bars(found: Mapping[str, Comparison]) -> list[Bar]:
    """Of each comparison."""
    return [
        bar
        for name, one in found.items()
        for bar in (
            Bar(f"{name}: images that stand in ours and are broken in theirs", one.lost, MOST_LOST, at_most=True),
            Bar(f"{name}: our robust accuracy minus theirs", round(one.weaker, 4), MOST_WEAKER, at_most=True),
            Bar(f"{name}: time relative to theirs", one.time["total"].median, TOTAL_LIMIT, at_most=True),
            Bar(f"{name}: time of APGD-CE relative to theirs", one.time["apgd-ce"].median, APGD_LIMIT, at_most=True),
        )
    ]


def record(
    found: Mapping[str, Comparison],
    saved: Mapping[str, Spread],
    name: str,
    n: int,
    rounds: int,
    batch_size: int = BATCH,
    device: str = "cpu",
) -> Record:
    """The record of what `compare` and `savings` found."""
    return Record(
        benchmark="autoattack" if device == "cpu" else f"autoattack-{device.partition(':')[0]}",
        what=(
            "AutoAttack beside pyautoattack on CIFAR-10 (JPEG) images that the networks were trained on: verdicts per "
            "image, and CPU time of the whole and of each component, on what its own cascade left standing, as a share "
            "of theirs; the time of APGD-CE without one of its savings, and of FAB-T with one target and a projection "
            "that sorts, relative to the time with it."
        ),
        settings={
            "protocol": name,
            "threats": {norm: str(threat) for norm, threat in THREATS.items()},
            "images": n,
            "batch": batch_size,
            "device": device,
            "method": chosen(METHOD),
            "training": {"resnet18": chosen(TRAINING), "cnn and soft": chosen(SMALL_TRAINING)},
        },
        rounds=rounds,
        measurements={"comparisons": dict(found), "savings": dict(saved)},
        bars=bars(found),
        packages=("pyautoattack",),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("PHALANX_CIFAR10")
    parser.add_argument("--data", type=Path, default=default, required=default is None)
    parser.add_argument("--models", type=Path, default=Path("runs/benchmark-model"))
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks, joined by commas")
    parser.add_argument("--norms", default=",".join(THREATS))
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--saving-rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    images = cifar(chosen.data, chosen.models / "cache").train
    names = chosen.only.split(",")
    models = {name: NETWORKS[name](chosen.data, chosen.models).to(chosen.device) for name in names}
    found = {}
    for name, model in models.items():
        for norm in chosen.norms.split(","):
            found[f"{name}, {norm}"] = compare(
                model, images, THREATS[norm], "standard", chosen.images, chosen.rounds, chosen.batch
            )
            print(f"{name}, {norm}: {found[f'{name}, {norm}']}", flush=True)
    last = models.get("resnet18", model)
    _, data = right_images(last, images, chosen.images)
    saved = savings(last, data, THREATS["Linf"], chosen.saving_rounds)
    whole = record(found, saved, "standard", chosen.images, chosen.rounds, chosen.batch, chosen.device)
    write_record(whole, chosen.out)
    if weak := [name for name, one in found.items() if one.lost > MOST_LOST or one.weaker > MOST_WEAKER]:
        raise SystemExit(f"ours leaves standing what theirs breaks: {', '.join(weak)}")


if __name__ == "__main__":
    main()
