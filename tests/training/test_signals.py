from __future__ import annotations

import os
import signal
import threading

import pytest

from phalanx.training.signals import STOP_SIGNALS, stop_requests


@pytest.mark.parametrize("signum", STOP_SIGNALS, ids=lambda signum: signum.name)
def test_the_first_asks_the_second_insists_and_handlers_come_back(signum: signal.Signals) -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with stop_requests() as request:
        assert request.signum is None
        os.kill(os.getpid(), signum)
        assert request.signum == signum
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.signum == signum
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


def test_outside_the_main_thread_nothing_is_installed() -> None:
    seen = []

    def work() -> None:
        with stop_requests() as request:
            seen.append((request.signum, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
