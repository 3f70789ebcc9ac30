from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from phalanx.errors import InputError
from phalanx.nn.factory import TRUST_VARIABLE, own_factory


@pytest.mark.parametrize("name", ["torch.hub:load", "os:system", "antigravity:fly", "sys:exit", "numpy.linalg:norm"])
def test_a_file_may_not_name_a_function_of_an_installed_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = name.partition(":")[0]
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    with pytest.raises(InputError, match=f"{module} belongs to an installed package.*{TRUST_VARIABLE}={module}"):
        own_factory(name, f"expert {name!r}", "a network", from_file=True)
    assert "antigravity" not in sys.modules  # refused before it is imported


def test_trust_names_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, "mine,numpy.linalg")
    import numpy as np

    assert own_factory("numpy.linalg:norm", "expert", "a network", from_file=True) is np.linalg.norm
    with pytest.raises(InputError, match="belongs to an installed package"):
        own_factory("numpy:array", "expert", "a network", from_file=True)


def test_a_file_may_not_name_the_script_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    script = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    script.build = lambda: 3  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"expert: __main__ cannot be imported by whoever .*; put the"):
        own_factory("__main__:build", "expert", "a network", from_file=True)
    assert own_factory("__main__:build", "--model", "a network")() == 3


def test_a_file_may_name_your_own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("")
    (tmp_path / "own_package" / "networks.py").write_text("def build():\n    return 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert own_factory("own_package.networks:build", "expert", "a network", from_file=True)() == 3


def test_what_the_user_names_is_the_users_affair() -> None:
    import torch

    assert own_factory("torch.hub:load", "--model torch.hub:load", "a model") is torch.hub.load
