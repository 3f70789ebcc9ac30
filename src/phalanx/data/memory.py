"""How much memory is free, for deciding what is held and what is streamed."""

from __future__ import annotations

import os

import torch

SHARE = 4
"""A data set is held in memory only if it fits in one part in SHARE of what is free."""


def free_memory(device: torch.device) -> int:
    """Bytes free on a CUDA device, or in the host's memory for any other."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    names = os.sysconf_names
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes leave the device most of its free memory."""
    return size * SHARE < free_memory(device)
