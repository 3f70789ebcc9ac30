"""What a signal does to work whose results are on disk, or not worth keeping."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from phalanx.errors import Interrupted
from phalanx.training.signals import STOP_SIGNALS

KEPT = "the verdicts of every finished batch are kept, the same command goes on"


@contextmanager
def stopped_by_signals(kept: str = KEPT) -> Iterator[None]:
    """A stop signal ends the work at once and by name; `kept` says what there is of it."""

    def stop(signum: int, frame: FrameType | None) -> None:
        del frame
        raise Interrupted(signum, f"stopped; {kept}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, stop) for signum in STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
