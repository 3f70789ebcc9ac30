"""A user's own builder, named as "module:function"."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from phalanx.errors import InputError


def own_factory(name: str, said: str, returns: str) -> Callable[..., Any]:
    """The function called `name`, "module:function".

    Args:
        said: how a message names it, such as "--model mine:build".
        returns: what it must return, such as "a network".

    Raises InputError where there is no such function.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or module_name.startswith(".") or not attribute:
        raise InputError(f"{said} must be 'module:function' with the module's full name")
    try:
        made = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise InputError(f"{said}: cannot import module {module_name!r} ({error}); is it on PYTHONPATH?") from None
    except AttributeError:
        raise InputError(f"{said}: module {module_name!r} has no {attribute!r}") from None
    if not callable(made):
        raise InputError(f"{said} must be a function that returns {returns}, got {type(made).__name__}")
    return made  # type: ignore[no-any-return]
