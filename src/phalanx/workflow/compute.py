"""Where a run computes."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phalanx import __version__
from phalanx.errors import InputError


def pick_device(name: str) -> torch.device:
    """ "auto" is a GPU if there is one. Raises InputError for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} is not there: {torch.cuda.device_count()} GPUs were found; use device: cpu")
    return device


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Torch uses this many CPU threads inside; None leaves its choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment(device: torch.device, started: str, seconds: float) -> dict[str, Any]:
    """Versions and hardware, for the report."""
    on_gpu = device.type == "cuda"
    return {
        "phalanx": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
        "platform": platform.system() + " " + platform.machine(),
        "processor": torch.cuda.get_device_name(device) if on_gpu else processor_name(),
        "cpus": os.cpu_count(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "started": started,
        "seconds": round(seconds, 1),
    }


def processor_name() -> str:
    """The CPU's model, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
