"""The configuration of a run and of a study: frozen dataclasses, declared once, read by `phalanx.loading`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from phalanx.data.config import DataConfig
from phalanx.errors import InputError
from phalanx.loading import Loaded, load_recipe
from phalanx.loading.layers import BELONGS_TO
from phalanx.methods import ST, AnyMethod
from phalanx.rng import derive_seed
from phalanx.threat import ThreatModel
from phalanx.training.config import TrainingConfig

Scalar = int | float | str | bool


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """What decides which experts answer."""

    name: Literal["linear", "mlp", "cnn", "resnet20", "hierarchical"] = "linear"
    """One linear layer on the pixels, a fully connected network, a small convolutional one, AdvMoE's ResNet-20, or a
    router of routers: one chooses a group of experts, and one for each group an expert in it."""
    groups: int | None = None
    """Of a hierarchical router: how many groups of equal size, group 0 being the first experts."""
    inner: Literal["linear", "mlp", "cnn", "resnet20"] | None = None
    """Of a hierarchical router: the kind of all routers in it; None is linear."""
    hidden: tuple[int, ...] | None = None
    """Widths of the hidden layers of mlp or cnn; None is the router's own default."""
    train: bool = True
    """False keeps the router at its random initial weights (the released dual-model code's choice)."""

    def __post_init__(self) -> None:
        if self.name != "hierarchical" and (self.groups, self.inner) != (None, None):
            raise ValueError(f"groups and inner are of a hierarchical router, got a {self.name} one; leave them out")
        if self.name == "hierarchical" and self.groups is None:
            raise ValueError("groups must be given for a hierarchical router, for example 2")
        if self.hidden is not None and self.kind in ("linear", "resnet20"):
            raise ValueError(f"hidden cannot be set for a {self.kind} router, got {self.hidden}; choose mlp or cnn")
        if self.hidden is not None and (not self.hidden or min(self.hidden) < 1):
            raise ValueError(f"hidden must hold widths of at least 1, got {self.hidden}")

    @property
    def kind(self) -> str:
        """Of the router, or of those in a hierarchical one."""
        return (self.inner or "linear") if self.name == "hierarchical" else self.name

    def check_experts(self, experts: int) -> None:
        """Raises ValueError unless the router can choose among so many."""
        groups = self.groups
        if groups is not None and (groups < 2 or experts % groups or experts < 2 * groups):
            raise ValueError(
                f"router.groups must be at least 2 and divide the {experts} experts into groups of at least 2, "
                f"got {groups}"
            )


def _check_gate(top_k: int | Literal["all"], experts: int, temperature: float) -> None:
    if top_k != "all" and not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be in 1..experts={experts} or 'all', got {top_k}; lower top_k or add experts")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """A mixture of experts of one kind; `experts: 1` is a single network."""

    name: Literal["mixture"] = "mixture"
    expert: str = "small_cnn"
    """"mlp", "small_cnn", "resnet18", timm's "timm:MODEL", or your own "module:factory"."""
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
        if self.experts < 1:
            raise ValueError(f"experts must be at least 1, got {self.experts}")
        _check_gate(self.top_k, self.experts, self.temperature)
        if not re.fullmatch(r"[A-Za-z_][\w.]*(:[A-Za-z_]\w*)?", self.expert):
            raise ValueError(f"expert must be a name or 'module:factory', got {self.expert!r}")
        if self.experts > 1:
            self.router.check_experts(self.experts)

    @property
    def made_of(self) -> Mapping[str, str]:
        """Nothing: it is trained from scratch."""
        return {}


Mix = Literal["probabilities", "logits"]


def _check_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], the share of robust answers to keep, got {keep}")


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], the weight of the robust half, got {alpha}")


@dataclass(frozen=True, kw_only=True)
class _TwoHalves:
    """What every model of a standard and a robust half says."""

    standard: str
    """The standard half: a finished run's folder or, in a study, the name of one of its runs."""
    robust: str
    """The robust half, likewise."""

    def __post_init__(self) -> None:
        if self.standard == self.robust:
            raise ValueError(f"standard and robust must be two runs, got {self.standard!r} twice")

    @property
    def made_of(self) -> Mapping[str, str]:
        """The runs it joins, by what they become; of a view the last one says how it is measured."""
        return {"standard": self.standard, "robust": self.robust}


@dataclass(frozen=True, kw_only=True)
class DualConfig(_TwoHalves):
    """A dual model to be trained on: two finished runs, a standard and a robust one, mixed (see `DualModel`)."""

    name: Literal["dual"] = "dual"
    alpha: float = 0.7
    """Weight of the robust half, in [0, 1]; 1/2 and less protects nothing."""
    mix: Mix = "probabilities"
    """What is mixed; "logits" only to reproduce released code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha(self.alpha)


@dataclass(frozen=True, kw_only=True)
class AdaptiveConfig(_TwoHalves):
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
        _check_gate(self.top_k, len(self.experts), self.temperature)
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
        if self.experts < 2:
            raise ValueError(f"experts must be at least 2, got {self.experts}: one sub-model has nobody to work with")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

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
        if self.experts < 1:
            raise ValueError(f"experts must be at least 1, got {self.experts}")
        if not 0 < self.scale <= 1:
            raise ValueError(f"scale must be in (0, 1], got {self.scale}")
        _check_gate(self.top_k, self.experts, self.temperature)
        if self.router.name == "hierarchical":
            raise ValueError("router of a layer-level mixture cannot be hierarchical; choose another")
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


AnyModel = Annotated[
    MixtureConfig | LayersConfig | MaskedConfig | DualConfig | AdaptiveConfig | AssembledConfig | SynergyConfig,
    Field(discriminator="name"),
]


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is measured on the validation split during training."""

    protocol: str = "pgd-10"
    """One attack, named as in evaluation."""
    n: int | None = 500
    """Images used, the split's first; None for all."""

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}; leave it out for all images")
        if "," in self.protocol:
            raise ValueError(f"protocol must be one attack, got {self.protocol!r}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on the test split afterwards."""

    protocol: str = "pgd-50"
    """Attacks joined by commas, such as "fgsm,pgd-50x5" or "routing-50", every surface that the model has."""
    n: int | None = None
    """Images used, the split's first; None for all."""
    weights: Literal["best", "last"] = "best"
    """The weights that validated best, or the last."""
    batch_size: int = 64
    """Images attacked together; verdicts do not depend on it."""
    analysis: str | None = None
    """One attack, such as pgd-20, under which routes, single experts and margins are looked at besides, on at most
    1,000 images; it costs that attack once for the model and once for each expert, and for a mixture as much again
    under a gate that knows the label. None leaves it out."""

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}; leave it out for all images")
        if self.analysis is not None and "," in self.analysis:
            raise ValueError(f"analysis must be one attack, got {self.analysis!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a run."""

    label: str = ""
    """The run's name in tables; by default that of its recipe."""
    seed: int = 0
    """Initial weights, order of the data, augmentation, attacks."""
    replica: int = 0
    """Tells runs of one recipe and seed apart: another replica has other weights to begin with, another order of the
    data and other draws."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"."""
    threads: int | None = None
    """CPU threads; small networks are fastest with 1. None leaves torch's choice."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images and their splits."""
    model: AnyModel = field(default_factory=MixtureConfig)
    """Experts and router, or two finished runs joined."""
    threat: ThreatModel = field(default_factory=ThreatModel)
    """What an attacker may do, in training and in evaluation."""
    method: AnyMethod = field(default_factory=ST)
    """How it is trained."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The loop."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Numbers during training."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Numbers afterwards."""

    def __post_init__(self) -> None:
        for name, value in (("seed", self.seed), ("replica", self.replica)):
            if not 0 <= value < 2**31:
                raise ValueError(f"{name} must be in 0..2**31 - 1, got {value}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {self.device!r}")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ValueError(f"threads must be in 1..1024, got {self.threads}")

    @property
    def run_seed(self) -> int:
        """What the run's random numbers derive from: the seed, unless it is a replica."""
        return derive_seed(self.seed, "replica", self.replica) % 2**31 if self.replica else self.seed


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of a study."""

    recipe: str
    """The recipe it is made by."""
    set: tuple[str, ...] = ()
    """Settings that differ from the recipe's, each as after `--set`: "model.experts=3"."""


@dataclass(frozen=True, kw_only=True)
class DualView(_TwoHalves):
    """The dual model of two runs."""

    name: Literal["dual"] = "dual"
    alpha: float | Literal["picked"] = "picked"
    """Weight of the robust half, in [0, 1]; "picked" takes the smallest one at which the dual model must keep the share
    `keep` of what its robust half holds on the validation split (see `pick_alpha`)."""
    keep: float = 0.985
    """Share of the robust half's answers to keep, where alpha is picked."""
    mix: Mix = "probabilities"
    """What is mixed; "logits" only to reproduce released code."""
    label: str = ""
    """The row's name; by default "dual" and its alpha."""

    def __post_init__(self) -> None:
        if self.alpha != "picked":
            _check_alpha(self.alpha)
        super().__post_init__()
        _check_keep(self.keep)

    @property
    def title(self) -> str:
        """What the row is called."""
        return self.label or f"dual, alpha {self.alpha}"


@dataclass(frozen=True, kw_only=True)
class NutsView(_TwoHalves):
    """MixedNUTS of two runs: the robust half's logits mapped and mixed with the standard half's bare choice; the map
    and alpha are searched for on the validation split (see `MixedNUTS`)."""

    name: Literal["mixed_nuts"] = "mixed_nuts"
    keep: float = 0.985
    """Share of the robust half's answers to keep."""
    label: str = ""
    """The row's name; by default "MixedNUTS"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_keep(self.keep)

    @property
    def title(self) -> str:
        """What the row is called."""
        return self.label or "MixedNUTS"


@dataclass(frozen=True, kw_only=True)
class EnsembleView:
    """Runs averaged with equal weights: an ensemble without a gate."""

    name: Literal["ensemble"] = "ensemble"
    runs: tuple[str, ...]
    """Runs of the study, at least two."""
    mix: Mix = "probabilities"
    """What is averaged."""
    label: str = ""
    """The row's name; by default "ensemble of" their number."""

    def __post_init__(self) -> None:
        if len(set(self.runs)) < max(2, len(self.runs)):
            raise ValueError(f"runs must be two different runs or more, got {', '.join(self.runs) or 'none'}")

    @property
    def made_of(self) -> Mapping[str, str]:
        """The runs it joins, by what they become; the last one says how it is measured."""
        return {f"member {number}": run for number, run in enumerate(self.runs)}

    @property
    def title(self) -> str:
        """What the row is called."""
        return self.label or f"ensemble of {len(self.runs)}"


@dataclass(frozen=True, kw_only=True)
class GateView:
    """A mixture's experts under another gate: what is its own gate worth?"""

    name: Literal["gate"] = "gate"
    run: str
    """A run of the study, a mixture."""
    gate: Literal["uniform", "random"] = "uniform"
    """All experts with equal weight, or one chosen by an untrained linear router."""
    label: str = ""
    """The row's name; by default the run and the gate."""

    @property
    def made_of(self) -> Mapping[str, str]:
        """The run that it looks at."""
        return {"": self.run}

    @property
    def title(self) -> str:
        """What the row is called."""
        return self.label or f"{self.run}, {self.gate} gate"


AnyView = Annotated[DualView | NutsView | EnsembleView | GateView, Field(discriminator="name")]
"""Models made of runs, evaluated as rows of their own; nothing is trained and no weights are written."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Several runs, and views of them, that make one table."""

    title: str = ""
    """Heading of the report."""
    description: str = ""
    """What the study asks, in a sentence or two."""
    set: tuple[str, ...] = ()
    """Settings of every run, each as after `--set`; a run's own come after them, those of the command line last."""
    runs: Mapping[str, StudyRun] = field(default_factory=dict)
    """What is trained: a folder name and how it is made."""
    views: Mapping[str, AnyView] = field(default_factory=dict)
    """Rows that are made of runs without training: dual models, ensembles, other gates."""
    rows: tuple[str, ...] = ()
    """Names of runs and views in the table's order; by default all runs, then all views."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs must name at least one run, for example {at: {recipe: digits-at}}")
        for name, view in self.views.items():
            if name in self.runs:
                raise ValueError(f"views: {name!r} names a run already; rename one")
            for run in view.made_of.values():
                if run not in self.runs:
                    raise ValueError(f"views.{name}: {run!r} is no run of the study; it has {', '.join(self.runs)}")
        for row in self.rows:
            if row not in self.runs and row not in self.views:
                raise ValueError(f"rows: {row!r} is neither a run nor a view of the study")


@dataclass(frozen=True, kw_only=True)
class ReproductionConfig:
    """One table or figure of a paper: which rows of a study it shows, and what the paper printed for each."""

    title: str
    """What the table is."""
    description: str = ""
    """What it asks, and what to know before comparing."""
    source: str
    """The paper, and the setting its numbers were measured in."""
    study: str
    """The study's recipe at scale S is STUDY-S."""
    rows: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Rows of the study in the table's order, and under each the printed percentages by column (SA, RA, RA-E, ...), or
    by attack of a curve (fgsm:0.03, pgd-20)."""

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("rows must name at least one row of the study")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("phalanx") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def shipped_reproductions() -> dict[str, Path]:
    """The papers' tables that come with the package, by names such as "dual/table3"."""
    folder = Path(str(resources.files("phalanx") / "reproductions"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def load_reproduction(name: str) -> Loaded[ReproductionConfig]:
    """A paper's table by its name. Raises InputError listing what there is."""
    shipped = shipped_reproductions()
    if name not in shipped:
        raise InputError(f"no table is named {name!r}; there are {', '.join(shipped)}")
    return load_recipe(ReproductionConfig, shipped[name])


def find_recipe(name: str) -> Path:
    """A recipe by its name or by its file's path. Raises InputError listing what there is."""
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or path.exists():
        if not path.is_file():
            raise InputError(f"recipe {name} does not exist; give a YAML file, or one of {', '.join(shipped)}")
        return path
    raise InputError(f"no recipe is named {name!r}; there are {', '.join(shipped)}, or give a path that ends in .yaml")


def is_study(path: Path) -> bool:
    """Whether a recipe describes a study: it, or one that it extends, has a top-level `runs`."""
    met: set[Path] = set()
    while path not in met:
        met.add(path)
        try:
            text = path.read_text(encoding="utf-8")
            if re.search(r"^runs\s*:", text, re.MULTILINE):
                return True
            extended = re.search(r"^extends\s*:\s*([^\s#]+)", text, re.MULTILINE)
            if extended is None:
                return False
            path = find_recipe(extended[1].strip("'\""))
        except (OSError, UnicodeDecodeError, InputError):
            return False
    return False


def load_run(name: str, overrides: tuple[str, ...] = ()) -> Loaded[RunConfig]:
    """The run configuration of a recipe with `--set` overrides. Raises RecipeErrors with every mistake at once."""
    return load_recipe(RunConfig, find_recipe(name), overrides, extends=_extended)


def load_study(name: str) -> Loaded[StudyConfig]:
    """The study of a recipe."""
    return load_recipe(StudyConfig, find_recipe(name), extends=_extended)


def _extended(name: str) -> Path:
    return find_recipe(name)


def bound_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that a run folder is bound to: how it is trained, not how it is measured
    afterwards or what it is called."""
    return {key: value for key, value in config.items() if key not in ("label", "evaluation")}
