"""Build a model from its configuration or its recorded spec; load a run's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from phalanx.config import (
    AssembledConfig,
    LayersConfig,
    MaskedConfig,
    MixtureConfig,
    RouterConfig,
    SynergyConfig,
    UpcycledConfig,
)
from phalanx.data import Splits
from phalanx.errors import CorruptError, InputError, PhalanxError
from phalanx.experts import TIMM, TwoHeaded, build_backbone, build_expert, weights_sha256
from phalanx.nn import preserved_rng, record, spec_of
from phalanx.nn.masked import Masked, MaskedLayers, Phase, freeze_weights, mask_the_rest
from phalanx.nn.memory import RoomForWeights, available_bytes
from phalanx.routing import (
    AdaptiveSmoothing,
    DualModel,
    Ensemble,
    FeatureRouter,
    HierarchicalRouter,
    LayerMixture,
    MixedNUTS,
    MixtureOfExperts,
    RobustRouter,
    RoutedLayers,
    SynergyOfExperts,
    UniformRouter,
    build_hierarchical,
    build_router,
    fit_robust_router,
    fit_rows,
)
from phalanx.runs.atomic import render_json
from phalanx.runs.canonical import parse_json
from phalanx.runs.checkpoint import load_tensors
from phalanx.runs.sidecar import read_protected, write_protected
from phalanx.threat import ThreatModel

MODEL_NAME = "model.json"
MODEL_SCHEMA = 1
Weights = Literal["best", "last"]


def build_mixture(
    config: MixtureConfig, data: Splits, seed: int, threat: ThreatModel | None = None
) -> MixtureOfExperts:
    """A freshly initialised mixture for `data`; the same seed gives the same weights. A robust router is fitted for
    `threat` to the training images. Raises InputError."""
    with preserved_rng():
        torch.manual_seed(seed)
        experts = [_expert(config.expert, config.options, data) for _ in range(config.experts)]
        router = None if config.experts == 1 else _router(config.router, data, config.experts, seed, threat)
    return MixtureOfExperts(
        router, experts, config.top_k, temperature=config.temperature, train_router=config.router.trains
    )


def upcycle(
    config: UpcycledConfig, network: nn.Module, data: Splits, seed: int, threat: ThreatModel
) -> MixtureOfExperts:
    """A mixture of copies of `network` behind a new router. Raises InputError."""
    router = None
    if config.experts > 1:
        with preserved_rng():
            torch.manual_seed(seed)
            router = _router(config.router, data, config.experts, seed, threat)
    experts = [copy.deepcopy(network) for _ in range(config.experts)]
    return MixtureOfExperts(
        router, experts, config.top_k, temperature=config.temperature, train_router=config.router.trains
    )


def weights_before(config: MixtureConfig | SynergyConfig) -> dict[str, str]:
    """The sha256 of the file of weights that every expert begins with; empty where they begin at random."""
    path = config.options.get("weights") if config.expert.startswith(TIMM) else None
    return {} if path is None else {"network": weights_sha256(str(path))}


def build_synergy(config: SynergyConfig, data: Splits, seed: int) -> SynergyOfExperts:
    """A freshly initialised Synergy-of-Experts for `data`; the same seed gives the same weights. Raises InputError."""
    with preserved_rng():
        torch.manual_seed(seed)
        submodels = [TwoHeaded(_expert(config.expert, config.options, data)) for _ in range(config.experts)]
    return SynergyOfExperts(submodels, temperature=config.temperature)


def build_layers(config: LayersConfig, data: Splits, seed: int) -> LayerMixture:
    """A freshly initialised layer-level mixture for `data`; the same seed gives the same weights. Raises InputError."""
    shape = _square(data)
    shared = config.routers == "shared" and config.experts > 1
    hidden = {} if config.router.hidden is None else {"hidden": list(config.router.hidden)}
    with preserved_rng():
        torch.manual_seed(seed)
        return layer_mixture(
            backbone=config.backbone,
            shape={"num_classes": data.num_classes, "image_size": shape[1], "channels": shape[0]},
            mean=list(data.mean),
            std=list(data.std),
            options=dict(config.options),
            layers={
                "num_experts": config.experts,
                "scale": config.scale,
                "routers": config.routers,
                "norm_kind": config.batch_norm,
                "overlap": config.overlap,
            },
            router={"name": config.router.name, **hidden} if shared else None,
            gate={
                "top_k": config.top_k,
                "temperature": config.temperature,
                "train_router": config.router.train,
                "straight_through": config.straight_through,
            },
        )


def layer_mixture(
    *,
    backbone: str,
    shape: Mapping[str, int],
    mean: Sequence[float],
    std: Sequence[float],
    options: Mapping[str, Any],
    layers: Mapping[str, Any],
    router: Mapping[str, Any] | None,
    gate: Mapping[str, Any],
) -> LayerMixture:
    """A layer-level mixture from plain values, which it records: of `build_backbone`, `RoutedLayers`, the shared router
    (None where decisions are taken within the network, or none is) and `LayerMixture`. Raises InputError."""
    try:
        made = RoutedLayers(**layers)
    except ValueError as error:
        raise InputError(f"model: {error}") from None
    network = build_backbone(backbone, made, **shape, mean=mean, std=std, **options)
    routers: nn.Module | list[nn.Module] | None = None
    if router is not None:
        image = (shape["channels"], shape["image_size"], shape["image_size"])
        routers = build_router(shape=image, num_experts=made.num_experts, mean=mean, std=std, **router)
    elif made.num_experts > 1:
        routers = [FeatureRouter(channels, made.num_experts) for channels in made.sites]
    mixture = LayerMixture(network, routers, made.num_experts, **gate)
    return record(
        mixture,
        "layers",
        backbone=backbone,
        shape=dict(shape),
        mean=list(mean),
        std=list(std),
        options=dict(options),
        layers=dict(layers),
        router=None if router is None else dict(router),
        gate=dict(gate),
    )


def build_masked(config: MaskedConfig, data: Splits, seed: int) -> MixtureOfExperts:
    """A freshly initialised masked network for `data`, as a mixture of one; the same seed gives the same weights, and
    scores or a mask that keeps the first filters. Raises InputError."""
    channels, size, _ = _square(data)
    with preserved_rng():
        torch.manual_seed(seed)
        network = masked_network(
            backbone=config.backbone,
            shape={"num_classes": data.num_classes, "image_size": size, "channels": channels},
            mean=list(data.mean),
            std=list(data.std),
            options=dict(config.options),
            scale=config.scale,
            convolutions=config.convolutions,
            phase=config.phase,
            train_norms=config.train_norms,
        )
    return MixtureOfExperts(None, [network])


def masked_network(
    *,
    backbone: str,
    shape: Mapping[str, int],
    mean: Sequence[float],
    std: Sequence[float],
    options: Mapping[str, Any],
    scale: float,
    convolutions: Masked,
    phase: Phase,
    train_norms: bool,
) -> nn.Module:
    """A network of `build_backbone` whose convolutions are masked, from plain values, which it records; in phase mask
    its weights are frozen. Raises InputError."""
    unread = {"scale": "model.scale", "scaled_stem": "model.convolutions"}
    unread |= {"routed_shortcuts": "model.convolutions"} if convolutions == "all" else {}
    for key in unread.keys() & options.keys():
        raise InputError(
            f"model.options.{key} means nothing to a masked network; leave it out and set {unread[key]}", key="options"
        )
    network = build_backbone(backbone, MaskedLayers(scale, phase), **shape, mean=mean, std=std, **options)
    if convolutions == "all":
        mask_the_rest(network, scale, phase)
    if phase == "mask":
        freeze_weights(network, train_norms=train_norms)
    return record(
        network,
        "masked",
        backbone=backbone,
        shape=dict(shape),
        mean=list(mean),
        std=list(std),
        options=dict(options),
        scale=scale,
        convolutions=convolutions,
        phase=phase,
        train_norms=train_norms,
    )


def assemble(
    config: AssembledConfig,
    experts: Sequence[nn.Module],
    data: Splits,
    seed: int,
    begun: nn.Module | None = None,
    threat: ThreatModel | None = None,
) -> MixtureOfExperts:
    """A mixture of given experts behind a router that begins as `begun` or, without one, freshly initialised; the same
    seed gives the same router. Raises InputError for a `begun` that is another router than the configured one."""
    router = new_router(config, data, seed, threat)
    if begun is not None:
        _copy_router(begun, router)
    return MixtureOfExperts(
        router,
        experts,
        config.top_k,
        temperature=config.temperature,
        train_router=config.router.trains,
        train_experts=config.train_experts,
        checkpoint=config.checkpoint,
    )


def new_router(config: AssembledConfig, data: Splits, seed: int, threat: ThreatModel | None = None) -> nn.Module:
    """The freshly initialised, or freshly fitted, router of an assembled mixture."""
    with preserved_rng():
        torch.manual_seed(seed)
        return _router(config.router, data, len(config.experts), seed, threat)


def _copy_router(source: nn.Module, target: nn.Module) -> None:
    theirs, ours = _described(source), _described(target)
    if theirs != ours:
        raise InputError(
            f"model.router_from: the run's router is {theirs}, this model's is {ours}; give both the same model.router"
        )
    target.load_state_dict(source.state_dict())


def _described(router: nn.Module) -> str:
    """Kind, size and input of a router; its normalisation is among its weights."""
    spec = spec_of(router)
    if spec is None:
        return "built by hand"
    given = {key: value for key, value in spec.arguments.items() if key not in ("mean", "std")}
    return " ".join([spec.name, *(f"{key}={value}" for key, value in given.items())])


def _expert(name: str, options: Mapping[str, Any], data: Splits) -> nn.Module:
    channels, width, _ = _square(data)
    return build_expert(
        name,
        num_classes=data.num_classes,
        image_size=width,
        channels=channels,
        mean=list(data.mean),
        std=list(data.std),
        **options,
    )


def _square(data: Splits) -> tuple[int, int, int]:
    channels, height, width = data.shape
    if height != width:
        raise InputError(f"images must be square, got {height} x {width}; set data.size")
    return channels, height, width


def _router(config: RouterConfig, data: Splits, num_experts: int, seed: int, threat: ThreatModel | None) -> nn.Module:
    if config.name == "robust":
        return _fitted(config, data, num_experts, seed, threat or ThreatModel())
    options: dict[str, Any] = {"mean": list(data.mean), "std": list(data.std)}
    options |= {} if config.hidden is None else {"hidden": list(config.hidden)}
    options |= {"norm": _lipschitz_norm(config, threat or ThreatModel())} if config.name == "lipschitz" else {}
    if config.groups is not None:
        return build_hierarchical(config.kind, data.shape, num_experts, groups=config.groups, **options)
    return build_router(config.kind, data.shape, num_experts, **options)


def _lipschitz_norm(config: RouterConfig, threat: ThreatModel) -> str:
    norm = config.norm or threat.norm
    if norm == "L1":
        raise InputError("model.router.norm: a lipschitz router is one in L2 or Linf, and the threat is L1; set norm")
    return norm


_fits: dict[tuple[object, ...], RobustRouter] = {}
"""A study checks and trains many models behind one and the same router: each is fitted once in a process."""


def _fitted(config: RouterConfig, data: Splits, num_experts: int, seed: int, threat: ThreatModel) -> RobustRouter:
    given = {key: value for key, value in config.fit_options.items() if value is not None}
    threat = config.threat_within(threat)
    key = (data.train.fingerprint, num_experts, threat, seed, tuple(given.items()))
    if key not in _fits:
        images = data.train.images(fit_rows(len(data.train), seed))
        _fits[key] = fit_robust_router(images, num_experts, threat, seed=seed, **given)
    return copy.deepcopy(_fits[key])


def load_mixtures(runs: Mapping[str, Path]) -> dict[str, MixtureOfExperts]:
    """The deployed mixtures of runs that are to be put together, by what they become.

    Raises InputError unless all are mixtures trained for the same classes, image shape and normalisation; CorruptError
    if a file does not match its sha256.
    """
    described = {name: read_description(run)["data"] for name, run in runs.items()}
    first, *others = runs
    for key, what in (("class_names", "classes"), ("shape", "image shape"), ("mean", "mean"), ("std", "deviation")):
        for other in others:
            if described[first][key] != described[other][key]:
                raise InputError(
                    f"the {first} and the {other} do not fit together: {what} is {_shortened(described[first][key])} "
                    f"in {runs[first]} and {_shortened(described[other][key])} in {runs[other]}; "
                    "join runs on the same data"
                )
    models = {name: load(run) for name, run in runs.items()}
    for name, model in models.items():
        if not isinstance(model, MixtureOfExperts):
            raise InputError(f"the {name}, {runs[name]}, is a {type(model).__name__}; join mixtures")
    return {name: model for name, model in models.items() if isinstance(model, MixtureOfExperts)}


def single_network(name: str, run: Path, model: MixtureOfExperts) -> nn.Module:
    """The one expert of a run of a single network. Raises InputError for a mixture of several."""
    if len(model.experts) > 1:
        raise InputError(f"the {name}, {run}, has {len(model.experts)} experts; give runs of single networks")
    return model.experts[0]


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def build(spec: Mapping[str, Any]) -> nn.Module:
    """The module that a recorded spec describes, freshly initialised. Raises InputError for an unknown one."""
    name, arguments = str(spec["name"]), dict(spec["arguments"])
    kind, _, rest = name.partition(".")
    if name == "router.uniform":
        return UniformRouter(**arguments)
    if name == "router.hierarchical":
        return HierarchicalRouter(build(arguments["top"]), [build(group) for group in arguments["groups"]])
    if kind == "expert":
        return build_expert(rest, **arguments)
    if name == "router.robust":
        return RobustRouter(**arguments)
    if kind == "router":
        return build_router(rest, **arguments)
    if kind == "mixture":
        router = arguments.pop("router")
        experts = [build(expert) for expert in arguments.pop("experts")]
        return MixtureOfExperts(None if router is None else build(router), experts, **arguments)
    if kind == "dual":
        return DualModel(build(arguments.pop("standard")), build(arguments.pop("robust")), **arguments)
    if kind == "layers":
        return layer_mixture(**arguments)
    if kind == "masked":
        return masked_network(**arguments)
    if kind == "two_headed":
        return TwoHeaded(build(arguments["backbone"]))
    if kind == "soe":
        return SynergyOfExperts([build(submodel) for submodel in arguments.pop("submodels")], **arguments)
    if kind == "adaptive":
        return AdaptiveSmoothing(build(arguments.pop("standard")), build(arguments.pop("robust")), **arguments)
    if kind == "nuts":
        return MixedNUTS(build(arguments.pop("standard")), build(arguments.pop("robust")), **arguments)
    if kind == "ensemble":
        return Ensemble([build(member) for member in arguments.pop("members")], **arguments)
    raise InputError(
        f"this version cannot build {name!r}; it knows mixture, layers, masked, dual, adaptive, nuts, ensemble, "
        "soe, two_headed, expert.* and router.*"
    )


def save_description(path: Path, model: nn.Module, data: Splits, made_from: Mapping[str, str] | None = None) -> None:
    """Writes model.json and its sha256: how to build the model, what data it is for, and the sha256 of the weights it
    began with, by half, if those were other runs'."""
    spec = spec_of(model)
    description: dict[str, Any] = {
        "schema": MODEL_SCHEMA,
        "spec": None if spec is None else spec.to_json(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": {
            "name": data.name,
            "shape": list(data.shape),
            "class_names": list(data.class_names),
            "mean": list(data.mean),
            "std": list(data.std),
            "notes": list(data.notes),
            "fingerprint": data.fingerprint,
        },
        "made_from": dict(made_from or {}),
    }
    write_protected(path, render_json(description))


def read_description(run: Path) -> dict[str, Any]:
    """The content of a run's model.json. Raises InputError if the run has none, CorruptError if it is damaged."""
    path = Path(run) / MODEL_NAME
    if not path.is_file():
        raise InputError(f"{run} holds no trained model: it has no {MODEL_NAME}; check the name, or train first")
    try:
        description = parse_json(read_protected(path))
        schema = int(description["schema"])
    except (ValueError, KeyError, TypeError):
        raise CorruptError(f"{path} is damaged: it is no description of a model; restore it from a copy") from None
    if schema > MODEL_SCHEMA:
        raise InputError(f"{path} has schema {schema}, this version reads up to {MODEL_SCHEMA}; use a newer phalanx")
    return dict(description)


def _rebuilt(path: Path, spec: Mapping[str, Any]) -> nn.Module:
    """`build` of what a file says, which need not be true."""
    try:
        with RoomForWeights(available_bytes(torch.device("cpu"))):
            return build(spec)
    except PhalanxError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CorruptError(
            f"{path} describes no model that can be built ({type(error).__name__}: {error}); restore it from a copy"
        ) from error


def load(run: Path | str, *, weights: Weights = "best", factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """A run's deployed model on the CPU, in evaluation mode.

    Args:
        run: the run's folder.
        weights: those that validated best, or the last ones.
        factory: builds the network of a run whose model was made by hand; others need none.

    Raises InputError for a folder without a model or without `factory` where it is needed, CorruptError if a file does
    not match its sha256.
    """
    run = Path(run)
    description = read_description(run)
    path = run / f"{weights}.safetensors"
    if not path.is_file():
        raise InputError(f"{run} has no {weights} weights; the run has not got that far, or was not validated")
    if factory is None and description["spec"] is None:
        raise InputError(f"the model of {run} was built by hand; give load(..., factory=...) a function that builds it")
    with preserved_rng():
        model = _rebuilt(run / MODEL_NAME, description["spec"]) if factory is None else factory()
    tensors, _ = load_tensors(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"the weights in {path} do not fit the model: {str(error).splitlines()[-1].strip()}") from None
    return model.eval()
