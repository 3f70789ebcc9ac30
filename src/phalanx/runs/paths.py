"""Names that stay inside their folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from phalanx.errors import InputError


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, for a relative `name` that cannot leave `folder`, neither by `..` nor through a link.

    Raises InputError naming the name.
    """
    parts = PurePosixPath(name).parts
    windows = PureWindowsPath(name)
    if not parts or "\0" in name or ".." in parts or ".." in windows.parts or windows.anchor or parts[0] == "/":
        raise InputError(f"{name!r} is no name inside {folder}: give a relative path without '..'")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{name!r} leads out of {folder} through a link; remove the link")
    return path
