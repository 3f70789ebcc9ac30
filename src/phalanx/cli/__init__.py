"""The command line: a command is one thin function over `phalanx.workflow`.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from phalanx import __version__
from phalanx.cli import challenge, data, recipes
from phalanx.cli.certifying import certify
from phalanx.cli.evaluating import attack, compare, evaluate, selftest
from phalanx.cli.studies import report, reproduce, run
from phalanx.cli.training import train
from phalanx.errors import DiskError, InputError, PhalanxError

EXIT_CODES = """Exit codes: 0 done, 2 wrong input, 3 training diverged, 4 a file is corrupt, 5 disk full or not
writable, 6 the folder is in use, 7 a check of the numbers failed, 130 or 143 stopped by a signal after saving."""

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)

COMMANDS: tuple[Callable[..., None], ...] = (
    run,
    reproduce,
    train,
    evaluate,
    attack,
    certify,
    selftest,
    compare,
    report,
)
GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "recipes": (
        "What can be run, and with which settings.",
        {"list": recipes.list_recipes, "show": recipes.show_recipe, "schema": recipes.show_schema},
    ),
    "data": (
        "Look at a data set before using it.",
        {"check": data.check_data, "get": data.get_data, "describe": data.describe_data},
    ),
    "challenge": (
        "Judge images that anybody made, and lower a headline with them.",
        {"submit": challenge.submit_images, "list": challenge.list_submissions},
    ),
}


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"phalanx {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


def _assembled() -> typer.Typer:
    whole = typer.Typer(
        name="phalanx",
        help="Train, attack and report on image classifiers that are mixtures of experts.",
        epilog=EXIT_CODES,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    whole.callback()(_root)
    for command in COMMANDS:
        whole.command()(command)
    for name, (help_, members) in GROUPS.items():
        group = typer.Typer(help=help_, no_args_is_help=True, rich_markup_mode=None)
        for member, command in members.items():
            group.command(member)(command)
        whole.add_typer(group, name=name)
    return whole


app = _assembled()


def main() -> None:
    """Runs a command; a user's mistake is one message and an exit code, never a traceback."""
    # read by cuBLAS when it starts: without it, matrix products on a GPU are not repeatable
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        app()
    except PhalanxError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        # wherever a path was first looked at
        if error.filename is None or error.errno not in (*_DENIED, *_NO_PATH):
            raise
        typer.echo(f"error: {error.filename}: {error.strerror}; give another path, or allow access", err=True)
        sys.exit(DiskError.exit_code if error.errno in _DENIED else InputError.exit_code)
