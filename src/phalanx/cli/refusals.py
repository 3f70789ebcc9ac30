"""After a command has written everything: an error where its numbers are not to be believed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phalanx.errors import HonestyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phalanx.report import Page


def refuse_dishonest(failed: Sequence[str]) -> None:
    """Raises HonestyError where honesty checks failed: everything is written, and the headline says nothing."""

    if failed:
        raise HonestyError(
            f"honesty checks failed ({', '.join(failed)}): the robust accuracy above is not to be quoted; what each "
            "found stands above and in the report"
        )


def refuse_contradicted(pages: Sequence[Page]) -> None:
    """Raises HonestyError where an attack broke an image inside its certified radius: everything is written before."""
    from phalanx.report.threefold import contradicted

    found = [text for page in pages for row in page.rows for text in contradicted(row.label, row.threefold)]
    if found:
        raise HonestyError("; ".join(found))
