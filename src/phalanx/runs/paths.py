"""Names that stay inside their folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from phalanx.errors import InputError


def not_through_links(run: Path, folder: Path) -> None:
    """Raises InputError for a folder that is below `run` by its name and leads out of it through a link."""
    if folder != run and folder.is_relative_to(run):
        inside(run, folder.relative_to(run).as_posix())


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
