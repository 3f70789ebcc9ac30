"""Commands in this process, up to where training or an attack would start."""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import pytest

import phalanx.workflow.attacking
import phalanx.workflow.certifying
import phalanx.workflow.measuring
import phalanx.workflow.training
from phalanx.cli import main


class Done(NamedTuple):
    """How a command ended."""

    code: int | str
    """The exit code; "started" where the work would have started, "traceback" for what is our mistake."""
    out: str
    err: str


Command = Callable[[Sequence[str]], Done]

WORK = [
    (phalanx.workflow.training, "train"),
    (phalanx.workflow.measuring, "_evaluated"),
    (phalanx.workflow.attacking, "_search"),
    (phalanx.workflow.certifying, "certify"),
]


class _Started(BaseException):
    """Every check has been passed."""


def _start(*_: Any, **__: Any) -> None:
    raise _Started


@contextmanager
def commands() -> Iterator[Command]:
    """What runs a command line."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in WORK:
            patch.setattr(module, name, _start)

        def run(arguments: Sequence[str]) -> Done:
            patch.setattr(sys, "argv", ["phalanx", *arguments])
            out, err = io.StringIO(), io.StringIO()
            with redirect_stdout(out), redirect_stderr(err):
                code = _code()
            return Done(code, out.getvalue(), err.getvalue())

        yield run


def _code() -> int | str:
    try:
        main()
    except SystemExit as exit_:
        return exit_.code or 0
    except _Started:
        return "started"
    except BaseException:
        traceback.print_exc()
        return "traceback"
    return 0
