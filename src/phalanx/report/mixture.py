"""What a model is made of: a mixture of experts, or two of them in a dual model."""

from __future__ import annotations

from dataclasses import dataclass

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

    @property
    def text(self) -> str:
        """For example "4 x mlp, top-1", "single mlp" or "SoE of 3 x mlp"."""
        if self.synergy:
            return f"SoE of {self.experts} x {self.expert}"
        if self.experts == 1:
            return f"single {self.expert}"
        answering = "all" if self.top_k in ("all", self.experts) else f"top-{self.top_k}"
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
    if model.text("name") == "assembled":
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
