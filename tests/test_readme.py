"""Every command and every line of Python in the README and the guides runs."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]

# what each page's commands would take minutes for, cut down: the command itself stays
TINY = [
    f"--set={setting}"
    for setting in (
        *("training.epochs=1", "validation.n=10", "evaluation.protocol=pgd-2", "evaluation.n=10"),
        *("evaluation.analysis=null", "evaluation.checks=0"),
    )
]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _commands(page: Path) -> list[list[str]]:
    lines = [line for block in _blocks(page, "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture
def flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder with the images that the guides speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name in ("daisy", "rose", "tulip"):
        (tmp_path / "flowers" / name).mkdir(parents=True)
        for i in range(80):
            pixels = rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "flowers" / name / f"{i}.png")


@pytest.mark.usefixtures("flowers")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from phalanx.cli import main

    for words in _commands(page):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
            continue
        assert words[0] == "phalanx", words
        tiny = TINY if words[1] in ("run", "train") else []
        monkeypatch.setattr(sys, "argv", [*words, *tiny])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert not exit_.value.code, (words, capsys.readouterr().err)


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = _blocks(ROOT / "README.md", "python")
    exec(compile(block.replace("epochs=30", "epochs=1"), "README.md", "exec"), {})  # noqa: S102
    assert re.search(r"SA .*% \[.*RA .*% \[.* under pgd-50, Linf 3/16, n = 449", capsys.readouterr().out)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
