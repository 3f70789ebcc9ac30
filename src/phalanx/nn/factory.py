"""A user's own builder, named as "module:function"."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phalanx.errors import InputError, PhalanxError

TRUST_VARIABLE = "PHALANX_TRUST"
"""Modules of installed packages, joined by commas, whose functions a recipe or a run may name."""

_INSTALLED = frozenset({"site-packages", "dist-packages"})


def own_factory(name: str, said: str, returns: str, *, from_file: bool = False) -> Callable[..., Any]:
    """The function called `name`, "module:function".

    Args:
        said: how a message names it, such as "--model mine:build".
        returns: what it must return, such as "a network".
        from_file: whether a recipe or a run names it, which may be somebody else's: then not a function of an installed
            package, since some of those run whatever they are given, unless $PHALANX_TRUST names its module, nor of a
            script that is running.

    Raises InputError where there is no such function, or a file may not name it.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or module_name.startswith(".") or not attribute:
        raise InputError(f"{said} must be 'module:function' with the module's full name")
    if from_file and module_name not in os.environ.get(TRUST_VARIABLE, "").split(","):
        _refuse_untrusted(module_name, said)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"{said}: cannot import module {module_name!r} ({error}); is it on PYTHONPATH?") from None
    except Exception as error:
        raise _failed(f"{said}: importing module {module_name!r}", error) from error
    if not hasattr(module, attribute):
        raise InputError(f"{said}: module {module_name!r} has no {attribute!r}")
    made = getattr(module, attribute)
    if not callable(made):
        raise InputError(f"{said} must be a function that returns {returns}, got {type(made).__name__}")
    return made  # type: ignore[no-any-return]


def _refuse_untrusted(module_name: str, said: str) -> None:
    try:
        installed = _installed(module_name)
    except ValueError:
        raise InputError(
            f"{said}: {module_name} cannot be imported by whoever reads the recipe or the run; "
            "put the function into a module of its own"
        ) from None
    if installed:
        raise InputError(
            f"{said}: {module_name} belongs to an installed package, and a recipe or a run may be somebody else's; "
            f"if you trust it set {TRUST_VARIABLE}={module_name}, or name a function of your own module"
        )


def _installed(module_name: str) -> bool:
    """Whether a module is Python's own or in a folder of installed packages. Imports nothing. Raises ValueError for one
    that has no place to be imported from, as a running script."""
    # a submodule's own folder is known only once its package is imported
    found = importlib.util.find_spec(module_name.partition(".")[0])
    if found is None:
        return False
    folders = found.submodule_search_locations or ([found.origin] if found.has_location and found.origin else [])
    standard = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
    places = [Path(folder).resolve() for folder in folders]
    return not places or any(
        _INSTALLED & {*place.parts} or any(place.is_relative_to(library) for library in standard) for place in places
    )


def made_by(factory: Callable[..., Any], said: str, takes: str, /, **arguments: Any) -> Any:
    """What a user's function returns. `said` is as for `own_factory`, `takes` what it must be a function of.

    Raises InputError where it does not take the arguments, or fails itself: its own error is the cause.
    """
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        given = ", ".join(arguments) or "no argument"
        raise InputError(
            f"{said} is called with {given}, which it does not take: {error}; it must be a function of {takes}"
        ) from None
    except ValueError:
        pass  # a built-in function does not say what it takes
    try:
        return factory(**arguments)
    except PhalanxError:
        raise
    except Exception as error:
        raise _failed(said, error) from error


def _failed(said: str, error: Exception) -> InputError:
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<")]
    where = f" ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else ""
    return InputError(f"{said} failed with {type(error).__name__}: {error}{where}; try it by itself")
