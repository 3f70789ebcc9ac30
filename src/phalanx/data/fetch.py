"""Download a named set: only on request, through torchvision, and only what matches its checksum."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from phalanx.data.config import NAMED
from phalanx.data.named import SETS, Upstream, check_files, how_to_get, md5_of, set_folder
from phalanx.errors import DiskError, InputError

Tell = Callable[[str], None]


def fetch(name: str, root: Path | None = None, tell: Tell = print) -> Path:
    """The folder that holds the set, with every upstream file in it; what is there already is only verified.

    Args:
        root: where to; by default where a run looks for it (`set_folder`).
        tell: hears what is done to each file.

    Raises InputError for a set that cannot be fetched or where a download fails, CorruptError for a file that is not
    upstream's, DiskError.
    """
    if name not in NAMED:
        raise InputError(f"no data set is named {name!r}; there are {', '.join(NAMED)}")
    files = SETS[name].files
    if not files:
        raise InputError(f"{name} is not to be had without an account: {how_to_get(name)}")
    folder = root or set_folder(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder} is a file, or below one; choose another folder with --root") from None
    except OSError as error:
        raise DiskError(f"{folder}: {error.strerror or error}; choose another folder with --root") from error
    check_files(folder, files)
    for file in files:
        if (folder / file.name).is_file():
            tell(f"{file.name}: there already, md5 {file.md5}")
            continue
        _download(file, folder)
        check_files(folder, [file])
        tell(f"{file.name}: fetched, md5 {file.md5}")
    return folder


def _download(file: Upstream, folder: Path) -> None:
    """Under another name first: a file that was cut short never takes the real one's."""
    part = folder / f"{file.name}.part"
    # what a kill left would be taken for the whole file
    part.unlink(missing_ok=True)
    try:
        _download_url()(file.url, str(folder), part.name)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(
            f"{file.url} could not be fetched ({error}); try later, or fetch it elsewhere and put it into {folder}"
        ) from error
    except RuntimeError as error:
        raise InputError(f"{file.url} could not be fetched ({error}); try again later") from error
    found = md5_of(part)
    if found != file.md5:
        part.unlink()
        raise InputError(f"{file.url} gave a file with md5 {found}, expected {file.md5}: an error page, or cut short")
    part.rename(folder / file.name)


def _download_url() -> Callable[..., None]:
    try:
        from torchvision.datasets.utils import download_url  # type: ignore[import-untyped]
    except ImportError:
        raise InputError("downloading data needs torchvision; install it with: pip install phalanx[vision]") from None
    found: Callable[..., None] = download_url
    return found
