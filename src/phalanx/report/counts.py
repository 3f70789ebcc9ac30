"""What a model holds and what its answer to one image costs: the evaluation's counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from phalanx.report.records import Fields

NOTE = (
    "For one image, in evaluation mode. MACs: multiply-adds of convolutions and matrix products, half their "
    "floating-point operations. Active: the parameters that the answer is computed with. Path: the selected experts "
    "and what they share, of a masked network what depends on the image. + router: with the decision, all that the "
    "answer needs. Executed: what really runs."
)
HEAD = ("model", "parameters", "active", "MACs, path", "MACs, + router", "MACs, executed")


@dataclass(frozen=True)
class Counts:
    """Parameters, and multiply-adds for one image."""

    parameters: int
    active_parameters: int
    """The routers', the selected experts' and what they share."""
    path_macs: int
    router_macs: int
    """Beyond what the decision shares with the path."""
    executed_macs: int

    @property
    def total_macs(self) -> int:
        """The path and the router."""
        return self.path_macs + self.router_macs

    @property
    def cells(self) -> tuple[str, ...]:
        """As under `HEAD`, without the model."""
        macs = self.path_macs, self.total_macs, self.executed_macs
        return tuple(f"{count:,}" for count in (self.parameters, self.active_parameters, *macs))

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "total_macs": self.total_macs}


NOT_COUNTED = ("not counted",) * (len(HEAD) - 1)


def read_counts(evaluation: Fields | None) -> Counts | None:
    """Those of an evaluation's record; None of one that did not end or was made before models were counted.

    Raises CorruptError naming the file and the key.
    """
    if evaluation is None or evaluation.values.get("counts") is None:
        return None
    found = evaluation.fields("counts")
    return Counts(**{field.name: found.integer(field.name) for field in fields(Counts)})
