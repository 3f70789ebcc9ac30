"""Recipes and command lines with one mistake, or several, somewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from hypothesis import strategies as st
from typer.main import get_command

from phalanx.cli import app
from phalanx.config import load_run, shipped_recipes

Key = tuple[str, ...]

ALONE = ("at", "at-dense", "at-moe", "advmoe", "fgsm-rs", "free-at", "rt-er", "single-at", "soe", "st", "trades")
"""Of the recipes on digits, some that need no other run."""

STRANGE: list[Any] = [
    None, True, 0, -1, 2, 7, 10**9, 2**62, 10**30, 0.5, -0.5, 1e-30, 1e30, math.nan, math.inf, "", "x", "8/255",
    "1/0", "-1/255", "9/4", [], [1], ["x"], [0], [-1], [10**9, 10**9], [[]], {}, {"a": 1}, "all", "digits", "folder:",
    "folder:/nowhere", "parquet:/dev/null", "cifar10", "cuda", "cuda:99", "mlp", "timm:nope", "os:system", "nope:x",
    "torch:zeros", "pgd-10", "pgd-0", "pgd-10,pgd-10", "routing-50", "standard", "Linf", "L1", "linear", "robust",
    "at", "sgd", "layers", "masked", "dual", "a" * 300, "猫", "..", "/etc/passwd", "\x1b[31m", "*",
    "!!python/name:os.system", "{{7*7}}", "<script>",
]  # fmt: skip
"""Values that are wrong nearly everywhere, and right somewhere."""


class Mutated(NamedTuple):
    """A recipe, and what was done to it."""

    text: str
    key: str
    """The key that was changed, as it is now: "model.experts"."""
    line: int
    """Where it stands, counted from 1; of a key that was taken out its section, 0 for the top."""
    how: str


@lru_cache
def _resolved(name: str) -> str:
    return json.dumps(load_run(name).resolved)


def _keys(recipe: dict[str, Any], above: Key = ()) -> Iterator[Key]:
    for key, value in recipe.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from _keys(value, (*above, key))


def _written(recipe: dict[str, Any], above: Key = ()) -> Iterator[tuple[Key, str]]:
    """One line for each key."""
    for key, value in recipe.items():
        start = "  " * len(above) + json.dumps(key) + ":"
        if isinstance(value, dict) and value:
            yield (*above, key), start
            yield from _written(value, (*above, key))
        else:
            yield (*above, key), f"{start} {_spelled(value)}"


def _spelled(value: Any) -> str:
    # YAML's own names, and on one line
    return json.dumps(value).replace("NaN", ".nan").replace("-Infinity", "-.inf").replace("Infinity", ".inf")


@st.composite
def recipes(draw: st.DrawFn) -> Mutated:
    """A recipe on digits with one key renamed, taken out, or given another value."""
    recipe: dict[str, Any] = json.loads(_resolved(f"digits-{draw(st.sampled_from(ALONE))}"))
    path = draw(st.sampled_from(list(_keys(recipe))))
    section = recipe
    for key in path[:-1]:
        section = section[key]
    old, how = section[path[-1]], draw(st.sampled_from(["value", "value", "value", "number", "rename", "remove"]))
    match how:
        case "rename":
            name = draw(st.sampled_from([path[-1][:-1], f"{path[-1]}s", path[-1].upper()]) | st.text(max_size=8))
            section |= {name: section.pop(path[-1])}
            path = (*path[:-1], name)
        case "remove":
            del section[path[-1]]
            path = path[:-1]
        case "number" if isinstance(old, int | float) and not isinstance(old, bool):
            section[path[-1]] = draw(st.sampled_from([-1, 0, -old, old * 1000, old / 3, 2**40]) | st.floats())
        case _:
            section[path[-1]] = draw(st.sampled_from(STRANGE))
    lines = list(_written(recipe))
    line = next((number for number, (key, _) in enumerate(lines, 1) if key == path), 0)
    return Mutated("\n".join(text for _, text in lines) + "\n", ".".join(path), line, how)


@st.composite
def broken_texts(draw: st.DrawFn) -> bytes:
    """A shipped recipe, of a run or of a study, with bytes cut out, put in or changed."""
    name = draw(st.sampled_from(["digits-at", "digits-closed-ranks", "quickstart", "robust-classifier"]))
    text = bytearray(shipped_recipes()[name].read_bytes())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text) - 1))
        signs = st.sampled_from([b"\n", b"\t", b": ", b"[", b"- ", b"{", b"#", b"&a *a", b"\0"])
        junk = draw(st.binary(max_size=4) | signs)
        text[at : at + draw(st.integers(0, 12))] = junk
    return bytes(text)


WORDS: dict[str, list[str]] = {
    "run": ["digits-at"], "train": ["digits-at"], "reproduce": ["dual/table1"], "evaluate": ["RUN"], "attack": ["RUN"],
    "certify": ["RUN"], "compare": ["RUN", "RUN"], "report": ["RUN"], "recipes show": ["digits-at"], "recipes list": [],
    "data check": ["digits"], "data describe": ["digits"], "data get": ["imagenet"], "challenge submit": ["FILE"],
    "challenge list": ["RUN"],
}  # fmt: skip
"""Each command with what it is about."""

NEEDED = {"attack": {"--attack": "pgd-2", "--out": "NEW"}, "challenge submit": {"--run": "RUN", "--name": "me"}}
ELSEWHERE = ["--alpha", "--workers", "--nope", "-x", "--", "--set", "--json"]
"""Options that most commands do not have."""

ARGUMENTS = [
    "", "x", "0", "-1", "3", "1e9", "999999999999", "nan", "8/255", "1/0", "FILE", "FOLDER", "FILE/below",
    "/proc/nope", "/dev/null", "nowhere", "..", "digits-at", "quickstart", "model.experts=9999", "model.expert=nope",
    "model.top_k=7", "=", "a=", "=3", "seed=x", "data.name=folder:nowhere", "data.name=FILE",
    "evaluation.protocol=aa", "pgd-2", "pgd-0", "aa", "pgd-2,pgd-2", "best", "middle", "soon", "-5s", "3/2", "1/0",
    "os:system", "torch:zeros", "nope:x", "torch.nn:Linear", "digits", "folder:FOLDER", "parquet:FILE",
    "mnist:FOLDER", "L3", "Linf", "0,0", ",", "1,x", "picked", "2", "pdf", "html", "\x1b[2J", "猫", "a" * 300,
    "../../x",
]  # fmt: skip


@lru_cache
def _options(command: str) -> dict[str, bool]:
    """A command's options; whether each takes a value."""
    found: Any = get_command(app)
    for word in command.split():
        found = found.commands[word]
    return {option: not each.is_flag for each in found.params for option in each.opts if option.startswith("--")}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with arguments left out, changed or added; RUN, FILE, FOLDER and NEW stand for paths."""
    command = draw(st.sampled_from(list(WORDS)))
    line = [*WORDS[command]]
    for option, value in NEEDED.get(command, {}).items():
        line += [option, value]
    if command == "evaluate" and draw(st.booleans()):
        line = ["--model", "torch.nn:Flatten", "--data", "digits"]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(line)))
        options = _options(command)
        argument = draw(st.sampled_from(ARGUMENTS))
        match draw(st.sampled_from(["option", "option", "option", "elsewhere", "argument", "leave out", "replace"])):
            case "option" if options:
                option = draw(st.sampled_from(list(options)))
                line += [option, argument] if options[option] else [option]
            case "elsewhere":
                line += [draw(st.sampled_from(ELSEWHERE)), argument]
            case "argument":
                line[at:at] = [argument]
            case "leave out":
                del line[at : at + 1]
            case _:
                line[at : at + 1] = [argument]
    return [*command.split(), *line]
