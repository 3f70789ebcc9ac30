"""The model's section: one kind of model by each name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from phalanx.config.parts import Mix, Scalar, TwoHalves, check_alpha, check_count, check_gate
from phalanx.config.router import RouterConfig
from phalanx.loading.layers import BELONGS_TO


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """A mixture of experts of one kind; `experts: 1` is a single network."""

    name: Literal["mixture"] = "mixture"
    expert: str = "small_cnn"
    """"mlp", "small_cnn", "resnet18", ..., "lipschitz_mlp" or "lipschitz_cnn" (made to be certified), timm's
    "timm:MODEL", or your own "module:factory"."""
    experts: int = 4
    """How many experts."""
    options: Mapping[str, Scalar | tuple[int, ...]] = field(default_factory=dict, metadata={BELONGS_TO: "expert"})
    """The expert's own options, such as {width: 16}."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """Unused by a single network."""
    top_k: int | Literal["all"] = 1
    """How many experts answer for each image; "all" is the soft gate."""
    temperature: float = 1.0
    """Divides the router's scores inside the gate's softmax."""

    def __post_init__(self) -> None:
        check_count(self.experts)
        check_gate(self.top_k, self.experts, self.temperature)
        if not re.fullmatch(r"[A-Za-z_][\w.]*(:[A-Za-z_]\w*)?", self.expert):
            raise ValueError(f"expert must be a name or 'module:factory', got {self.expert!r}")
        if self.experts > 1:
            self.router.check_experts(self.experts)

    @property
    def made_of(self) -> Mapping[str, str]:
        """Nothing: it is trained from scratch."""
        return {}


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """A layer-level mixture: one network whose routed layers are computed by the selected expert's slice of their
    channels (see `LayerMixture`)."""

    name: Literal["layers"] = "layers"
    backbone: str = "small_cnn"
    """"small_cnn", "resnet18", "wrn", "vgg16" or "densenet"."""
    options: Mapping[str, Scalar | tuple[int, ...]] = field(default_factory=dict, metadata={BELONGS_TO: "backbone"})
    """The backbone's own options, such as {width: 16}; widths are those of the unscaled network."""
    experts: int = 2
    """How many experts; with one the network is a narrow one without a router."""
    scale: float = 0.5
    """Each expert's share of every routed layer's channels, in (0, 1], truncated: r in the AdvMoE paper."""
    routers: Literal["shared", "block", "layer"] = "shared"
    """One decision on the image for all layers, or one on its features for each block or each layer."""
    router: RouterConfig = field(default_factory=lambda: RouterConfig(name="resnet20"))
    """The shared router; of decisions within the network, which are linear on pooled features, only `train` counts."""
    batch_norm: Literal["shared", "per_expert"] = "shared"
    """BatchNorm of the routed layers: one for all experts or one for each."""
    overlap: bool = False
    """Experts are overlapping bands of a network of the full widths instead of slices of their own."""
    top_k: int | Literal["all"] = 1
    """How many experts answer for each image; "all" is the soft gate."""
    temperature: float = 1.0
    """Divides the routers' scores inside the gate's softmax."""
    straight_through: Literal["probability", "score"] = "probability"
    """What a top-1 gate's gradient follows: the selected expert's probability, or its score alone (AdvMoE's code)."""

    def __post_init__(self) -> None:
        check_count(self.experts)
        if not 0 < self.scale <= 1:
            raise ValueError(f"scale must be in (0, 1], got {self.scale}")
        check_gate(self.top_k, self.experts, self.temperature)
        if self.router.name in ("hierarchical", "robust", "lipschitz"):
            raise ValueError(f"router of a layer-level mixture cannot be {self.router.name}; choose another")
        if self.routers != "shared" and (self.router.name, self.router.hidden) != ("resnet20", None):
            raise ValueError(f"router is the shared one's kind and means nothing to routers {self.routers!r}; drop it")
        if self.batch_norm == "per_expert" and self.routers == "layer":
            raise ValueError("batch_norm must be shared where every layer decides by itself, got 'per_expert'")
        if self.overlap and self.routers != "shared":
            raise ValueError(f"overlap needs routers 'shared', got {self.routers!r}")

    @property
    def made_of(self) -> Mapping[str, str]:
        """Nothing: it is trained from scratch."""
        return {}


@dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """One network of which each masked convolution keeps a share of its filters; which ones is learned in one run, and
    the weights are trained under that mask in the next (AT (Sparse) of the AdvMoE paper)."""

    name: Literal["masked"] = "masked"
    phase: Literal["mask", "weights"] = "mask"
    """"mask" learns the mask, all weights of convolutions and linear layers frozen; "weights" trains these under it."""
    start: str | None
    """What it begins as: a finished run's folder or, in a study, the name of one of its runs. For phase mask one of the
    same network without masks, whose largest filters then lead, or null for random weights and scores; for phase
    weights one of phase mask."""
    backbone: str = "small_cnn"
    """"small_cnn", "resnet18", "wrn", "vgg16" or "densenet"."""
    options: Mapping[str, Scalar | tuple[int, ...]] = field(default_factory=dict, metadata={BELONGS_TO: "backbone"})
    """The backbone's own options, such as {width: 16}."""
    scale: float = 0.5
    """Share of filters that each masked convolution keeps, in (0, 1], rounded up: r in the AdvMoE paper."""
    convolutions: Literal["all", "routed"] = "all"
    """Which are masked: all, or those that a layer-level mixture of the same backbone and options would route, which
    leaves the stem and, by default, shared shortcuts whole. The paper does not say."""
    train_norms: bool = True
    """In phase mask, scale and shift of every BatchNorm go on training, as in HYDRA's code; its running statistics
    always do."""

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise ValueError(f"scale must be in (0, 1], got {self.scale}")
        if self.phase == "weights" and self.start is None:
            raise ValueError("start must name a run of phase mask for phase weights, got null")
        if self.phase == "weights" and not self.train_norms:
            raise ValueError("train_norms=false is for phase mask; leave it out in phase weights, which trains them")

    @property
    def made_of(self) -> Mapping[str, str]:
        """The run that it begins as, if any, by what that is."""
        if self.start is None:
            return {}
        return {"dense network" if self.phase == "mask" else "mask": self.start}


@dataclass(frozen=True, kw_only=True)
class DualConfig(TwoHalves):
    """A dual model to be trained on: two finished runs, a standard and a robust one, mixed (see `DualModel`)."""

    name: Literal["dual"] = "dual"
    alpha: float = 0.7
    """Weight of the robust half, in [0, 1]; 1/2 and less protects nothing."""
    mix: Mix = "probabilities"
    """What is mixed; "logits" only to reproduce released code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha(self.alpha)


@dataclass(frozen=True, kw_only=True)
class AdaptiveConfig(TwoHalves):
    """A dual model whose weight is decided for each image by a mixing network (see `AdaptiveSmoothing`); method
    adaptive_smoothing trains that alone."""

    name: Literal["adaptive"] = "adaptive"
    scales: tuple[float, float] = (2.0, 1.0)
    """Inverse temperatures of the standard and of the robust half's logits."""
    alpha_range: tuple[float, float] = (0.8, 1.0)
    """What the weight of the robust half is squeezed into after training; its lower end is what `DualConfig.alpha` is
    there: the protection that holds whatever the mixing network says."""
    hidden: int = 64
    """Width of the mixing network's hidden layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.scales) <= 0:
            raise ValueError(f"scales must be positive, got {self.scales}")
        if not 0 <= self.alpha_range[0] < self.alpha_range[1] <= 1:
            raise ValueError(f"alpha_range must go up within [0, 1], got {self.alpha_range}")
        if self.hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {self.hidden}")


@dataclass(frozen=True, kw_only=True)
class AssembledConfig:
    """A mixture whose experts are finished runs of single networks, behind a new router; their kinds may differ."""

    name: Literal["assembled"] = "assembled"
    experts: tuple[str, ...]
    """Finished runs' folders or, in a study, names of its runs: at least two."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """What weighs or chooses them."""
    router_from: str | None = None
    """A finished run, as for `experts`, whose router this one begins as: one of the same experts and of the same
    router. None begins with a new one."""
    top_k: int | Literal["all"] = "all"
    """How many experts answer for each image; "all" is the soft gate."""
    temperature: float = 1.0
    """Divides the router's scores inside the gate's softmax."""
    train_experts: bool = True
    """False freezes the experts, their BatchNorm statistics included: only the router learns."""
    checkpoint: bool = False
    """Compute the experts' activations again in the backward pass instead of keeping all of them in memory."""

    def __post_init__(self) -> None:
        if len(self.experts) < 2:
            raise ValueError(f"experts must name at least two runs, got {len(self.experts)}")
        if len(set(self.experts)) < len(self.experts):
            raise ValueError(f"experts must be different runs, got one twice in {', '.join(self.experts)}")
        if self.router_from in self.experts:
            raise ValueError(f"router_from must be a run of its own, got {self.router_from}, which is an expert")
        check_gate(self.top_k, len(self.experts), self.temperature)
        self.router.check_experts(len(self.experts))

    @property
    def made_of(self) -> Mapping[str, str]:
        """The runs it starts from, by what they become."""
        made_of = {f"expert {number}": run for number, run in enumerate(self.experts)}
        return made_of if self.router_from is None else {**made_of, "router": self.router_from}


@dataclass(frozen=True, kw_only=True)
class SynergyConfig:
    """Synergy-of-Experts: sub-models with a confidence head; the surest one answers (see `SynergyOfExperts`)."""

    name: Literal["soe"] = "soe"
    expert: str = "small_cnn"
    """As for a mixture; its last layer must be linear."""
    experts: int = 3
    """How many sub-models, at least two."""
    options: Mapping[str, Scalar | tuple[int, ...]] = field(default_factory=dict, metadata={BELONGS_TO: "expert"})
    """The sub-models' own options, such as {width: 16}."""
    temperature: float = 1.0
    """Divides the logits inside the confidence."""

    def __post_init__(self) -> None:
        check_count(self.experts, least=2)
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    @property
    def made_of(self) -> Mapping[str, str]:
        """Nothing: it is trained from scratch."""
        return {}


@dataclass(frozen=True, kw_only=True)
class UpcycledConfig:
    """A mixture whose experts all begin as one finished run of a single network, behind a new router."""

    name: Literal["upcycled"] = "upcycled"
    start: str
    """A finished run's folder or, in a study, the name of one of its runs."""
    experts: int = 2
    """How many copies; 1 goes on training the network, without a router."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """Unused by a single network. Equal experts give a learned router nothing to choose by: take a robust one, or
    train: false."""
    top_k: int | Literal["all"] = 1
    """How many experts answer for each image; "all" is the soft gate."""
    temperature: float = 1.0
    """Divides the router's scores inside the gate's softmax."""

    def __post_init__(self) -> None:
        check_count(self.experts)
        check_gate(self.top_k, self.experts, self.temperature)
        if self.experts > 1:
            self.router.check_experts(self.experts)

    @property
    def made_of(self) -> Mapping[str, str]:
        """The run it begins as."""
        return {"network": self.start}


AnyModel = Annotated[
    MixtureConfig
    | LayersConfig
    | MaskedConfig
    | DualConfig
    | AdaptiveConfig
    | AssembledConfig
    | UpcycledConfig
    | SynergyConfig,
    Field(discriminator="name"),
]
