"""What a model is made of: a mixture of experts, or two of them in a dual model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phalanx.report.records import Fields


@dataclass(frozen=True)
class Mixture:
    """Experts of one kind behind a gate; one expert is a single network."""

    expert: str
    """The experts' architecture."""
    experts: int
    top_k: int | str
    synergy: bool = False
    """Whether the experts choose among themselves, as Synergy-of-Experts does, instead of a gate."""
    scale: float | None = None
    """Of a layer-level mixture each expert's share of the routed layers' channels: `expert` is then their network."""
    kept: float | None = None
    """Of a single masked network the share of filters that the mask keeps."""

    @property
    def text(self) -> str:
        """For example "4 x mlp, top-1", "single mlp", "SoE of 3 x mlp" or "resnet18 of 2 x 0.5, top-1"."""
        if self.synergy:
            return f"SoE of {self.experts} x {self.expert}"
        if self.kept is not None:
            return f"single {self.expert}, {self.kept:g} of the filters"
        if self.experts == 1:
            return f"single {self.expert}" + ("" if self.scale is None else f" at scale {self.scale:g}")
        answering = "all" if self.top_k in ("all", self.experts) else f"top-{self.top_k}"
        if self.scale is not None:
            return f"{self.expert} of {self.experts} x {self.scale:g}, {answering}"
        return f"{self.experts} x {self.expert}, {answering}"


def mixtures_of(model: Fields, record: Fields) -> tuple[Mixture, ...]:
    """The mixture of a run, or the standard and the robust half of a dual model.

    Args:
        model: the run's configuration of its model.
        record: its model.json, where a dual model's halves are described; its configuration names two runs.

    Raises CorruptError naming the file and the key.
    """
    # runs that were made before there were dual models do not say what they are
    if model.values.get("name", "mixture") == "mixture":
        return (_mixture(model.text("expert"), model.integer("experts"), model),)
    if model.text("name") == "soe":
        return (Mixture(model.text("expert"), model.integer("experts"), 1, synergy=True),)
    if model.text("name") == "layers":
        mixture = _mixture(model.text("backbone"), model.integer("experts"), model)
        return (replace(mixture, scale=model.number("scale")),)
    if model.text("name") == "masked":
        return (Mixture(model.text("backbone"), 1, 1, kept=model.number("scale")),)
    if model.text("name") in ("assembled", "upcycled"):
        return (_from_spec(record.fields("spec")),)
    halves = record.fields("spec").fields("arguments")
    return _from_spec(halves.fields("standard")), _from_spec(halves.fields("robust"))


def _mixture(expert: str, experts: int, fields: Fields) -> Mixture:
    top_k = fields.values.get("top_k")
    return Mixture(expert, experts, "all" if top_k == "all" else fields.integer("top_k"))


def _from_spec(spec: Fields) -> Mixture:
    arguments = spec.fields("arguments")
    experts = arguments.items("experts")
    kinds = dict.fromkeys(expert.text("name").removeprefix("expert.") for expert in experts)
    return _mixture(" or ".join(kinds), len(experts), arguments)
