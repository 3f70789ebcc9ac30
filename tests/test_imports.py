"""Rooms import one way only, the light ones stay light, and nothing is declared that nobody reads."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import phalanx
from phalanx.config import RunConfig, StudyConfig

PACKAGE = Path(phalanx.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# what a room may import besides itself, phalanx.errors and the version
ALLOWED = {
    "errors": "", "rng": "", "nn": "", "runs": "", "loading": "",
    "threat": "rng",
    "bounds": "nn threat",
    "data": "rng",
    "experts": "nn",
    "routing": "nn bounds threat rng",
    "attacks": "threat rng routing nn",
    "methods": "attacks routing rng threat nn",
    "training": "methods.base data runs routing bounds threat rng nn",
    "evaluation": "attacks routing data runs threat rng nn",
    "certification": "bounds routing experts data runs threat rng nn",
    "report": "runs",
    "config": "data.config loading methods rng threat training.config",
    "models": "config data experts nn routing runs threat",
    "compat": "attacks data evaluation nn rng routing runs threat",
    "console": "training",
    "worker": "training",
    "workers": "runs training worker",
    "workflow": "attacks certification config data evaluation loading methods models nn report routing runs threat "
    "training workers",
    "api": "*", "cli": "*", "__init__": "*",
}  # fmt: skip


def _imports(path: Path) -> set[str]:
    """Dotted names below `phalanx` that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            # `from phalanx import data` imports a room, `from phalanx import __version__` nothing
            names = (
                [f"phalanx.{alias.name}" for alias in node.names] if node.module == "phalanx" else [node.module or ""]
            )
            found.update(name for name in names if name != "phalanx.__version__")
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name.removeprefix("phalanx.") for name in found if name.startswith("phalanx.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_room_imports_only_what_lies_below_it(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in ALLOWED, f"{room} is a new room: say what it may import"
    allowed = {room, "errors", *ALLOWED[room].split()}
    if "*" in allowed:
        return
    wrong = [name for name in _imports(path) if not any(f"{name}.".startswith(f"{below}.") for below in allowed)]
    assert not wrong, f"{room} may import {sorted(allowed)}, not {wrong}"


@pytest.mark.parametrize(
    "name", ["phalanx", "phalanx.runs", "phalanx.report", "phalanx.loading", "phalanx.cli", "phalanx.workers"]
)
def test_these_do_not_load_torch(name: str) -> None:
    program = f"import sys, {name}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


_FORBIDDEN = {
    ("torch", "load"), ("torch", "save"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"),
    ("os", "system"), ("pickle", "loads"), ("pickle", "load"),
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_that_could_execute_a_file(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not {"pickle", "dill", "cloudpickle", "marshal", "shelve"} & modules
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name):
                assert function.id not in {"eval", "exec", "__import__"}
            elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                assert (function.value.id, function.attr) not in _FORBIDDEN
                if function.attr == "load" and function.value.id in ("np", "numpy"):
                    assert any(k.arg == "allow_pickle" and ast.literal_eval(k.value) is False for k in node.keywords)


def _dataclasses(kind: object, found: dict[str, type]) -> dict[str, type]:
    """Every dataclass that can stand in a recipe, from the type of the whole."""
    if isinstance(kind, type) and is_dataclass(kind) and kind.__name__ not in found:
        found[kind.__name__] = kind
        for hint in get_type_hints(kind).values():
            _dataclasses(hint, found)
    for part in get_args(kind):
        _dataclasses(part, found)
    return found


CONFIGURATION = _dataclasses(RunConfig, _dataclasses(StudyConfig, {}))


def _reads(path: Path) -> set[str]:
    """Attributes read in a file, but for those that a dataclass only checks in its `__post_init__`."""
    tree = ast.parse(path.read_text())
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"]
    skipped = {id(inner) for check in checks for inner in ast.walk(check)}
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in skipped)
    return {node.attr for node in attributes if isinstance(node.ctx, ast.Load)}


def test_every_field_of_the_configuration_is_read() -> None:
    assert {"RunConfig", "StudyConfig", "DataConfig", "AT", "ST", "PGD", "FGSM", "SGD", "Cyclic", "ThreatModel"} <= set(
        CONFIGURATION
    )
    read = set().union(*(_reads(path) for path in FILES))
    unread = {
        (name, each.name)
        for name, kind in CONFIGURATION.items()
        for each in fields(kind)
        # a union is told apart by `name`, which the loader reads
        if each.name not in read and each.name != "name"
    }
    assert not unread
