from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_sample as sample
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from phalanx.errors import InputError
from phalanx.loading import RecipeErrors, load_recipe, to_plain


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def page(folder: Path, *args: object, **options: object) -> list[str]:
    """The lines of the error page below its title, paths relative to `folder`."""
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(sample.Recipe, folder / "r.yaml", *args, **options)  # type: ignore[arg-type]
    title, *lines = str(caught.value).replace(f"{folder}/", "").splitlines()
    assert title == f"{len(lines)} problem{'s' * (len(lines) > 1)} in the recipe:"
    return [line.removeprefix("  ") for line in lines]


def test_a_recipe_is_loaded(tmp_path: Path) -> None:
    write(tmp_path, r=sample.TEXT)
    loaded = load_recipe(sample.Recipe, tmp_path / "r.yaml", ["seed=9", "method.attack.steps=2"])
    assert loaded.value == sample.Recipe(
        seed=9,
        model=sample.Model(experts=4, top_k=2, kind="conv", widths=(16, 32), dropout=0.1),
        threat=sample.Threat(norm="Linf", eps="8/255"),
        method=sample.AT(beta=6.0, attack=sample.PGD(steps=2, step_size="2/255")),
        training=sample.Training(
            epochs=3, lr=0.001, precision=sample.Precision.BF16, ema=True, milestones={"half": 0.5}
        ),
        data=sample.Data(name="digits", root=Path("data/digits"), batch_size=64, limit=100),
    )


def test_resolved_holds_every_default_and_loads_again(tmp_path: Path) -> None:
    write(tmp_path, r="training: {epochs: 2}\n")
    loaded = load_recipe(sample.Recipe, tmp_path / "r.yaml")
    assert loaded.resolved["method"]["attack"] == {"name": "pgd", "steps": 50, "step_size": "2/255"}
    assert loaded.resolved == to_plain(loaded.value)
    again = load_recipe(sample.Recipe, None, values=json.loads(json.dumps(loaded.resolved)))
    assert again.value == loaded.value


def test_sources_say_who_gave_what(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="training:\n  epochs: 2\n  lr: 0.5\nmodel:\n  widths: [1]\n",
        r="extends: base.yaml\nmodel: {}\ntraining:\n  lr: 0.25\n",
    )
    loaded = load_recipe(sample.Recipe, tmp_path / "r.yaml", ["data.limit=3"], values={"model": {"experts": 2}})
    assert {key: source.replace(f"{tmp_path}/", "") for key, source in loaded.sources.items()} == {
        "training.epochs": "base.yaml:2",
        "training.lr": "r.yaml:4",
        "model.widths": "base.yaml:5",
        "model.experts": "values",
        "data.limit": "--set",
    }


def test_without_a_file_defaults_and_overrides_remain() -> None:
    assert load_recipe(sample.Recipe, None, ["training.epochs=1"]).value == sample.Recipe(
        training=sample.Training(epochs=1)
    )
    with pytest.raises(RecipeErrors, match=r"  recipe  training: is required; add it$"):
        load_recipe(sample.Recipe, None)


def test_every_mistake_of_every_source_is_on_one_page(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="training:\n  lr: lots\n  epochs: 3\nmodel:\n  num_expert: 4\n",
        r="extends: base.yaml\nseed: -1\nthreat:\n  eps: 8/0\n  norm: Linf\n  norm: L2\nmodel:\n  top_k: 9\n"
        "data: !!set {a}\n",
    )
    assert page(tmp_path, ["training.epocs=3", "method.beta=900", "seed"]) == [
        "r.yaml:2  seed: must be at least 0, got -1; raise it",
        "r.yaml:4  threat.eps: must be a number or a fraction, got '8/0'; write 8/255",
        "r.yaml:6  threat.norm: is given twice, first on line 5; keep one",
        "r.yaml:9  data: YAML tag 'tag:yaml.org,2002:set' is not allowed, a recipe is plain data; remove the tag",
        "base.yaml:2  training.lr: must be a number, got 'lots'",
        "base.yaml:5  model.num_expert: no such key; did you mean 'experts'?",
        "--set seed  is not KEY=VALUE; write --set section.key=value",
        "--set training.epocs=3  training.epocs: no such key; did you mean 'epochs'?",
        "--set method.beta=900  method.beta: must be in 0..100, got 900.0; choose one in range",
    ]


def test_a_recipe_merges_over_the_one_it_extends(tmp_path: Path) -> None:
    write(
        tmp_path,
        root="training: {epochs: 1, lr: 0.5}\nmethod: {name: at, beta: 3, attack: {steps: 4}}\n",
        base="extends: root.yaml\ntraining: {epochs: 2}\nmethod: {beta: 4}\n",
        r="extends: base.yaml\ntraining: {ema: true}\n",
    )
    value = load_recipe(sample.Recipe, tmp_path / "r.yaml").value
    assert value.training == sample.Training(epochs=2, lr=0.5, ema=True)
    assert value.method == sample.AT(beta=4.0, attack=sample.PGD(steps=4))
    assert load_recipe(sample.Recipe, tmp_path / "r.yaml", ["method.name=st"]).value.method == sample.ST()


def test_what_an_override_says_survives_its_change_of_name(tmp_path: Path) -> None:
    write(tmp_path, r="training: {epochs: 1}\nmethod: {name: at, beta: 3}\n")
    changed = load_recipe(sample.Recipe, tmp_path / "r.yaml", ["method.smoothing=0.1", "method.name=st"])
    assert changed.value.method == sample.ST(smoothing=0.1)
    assert page(tmp_path, ["method.beta=1", "method.name=st"]) == [
        "--set method.beta=1  method.beta: no such key here, only with 'at'; remove it"
    ]


def test_a_base_can_be_found_by_name(tmp_path: Path) -> None:
    write(tmp_path, r="extends: built-in\n", b="training: {epochs: 5}\n")
    found = load_recipe(sample.Recipe, tmp_path / "r.yaml", extends=lambda name: tmp_path / f"{name[0]}.yaml")
    assert found.value.training.epochs == 5

    def unknown(name: str) -> Path:
        raise InputError(f"no recipe is called {name!r}; see the list of recipes")

    assert page(tmp_path, extends=unknown) == [
        "r.yaml:1  extends: no recipe is called 'built-in'; see the list of recipes"
    ]


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("none.yaml", "no such recipe, got 'none.yaml'; check the name and the folder"),
        ("3", "must be the name of another recipe, got 3"),
        ("", "must be the name of another recipe, got null"),
        ("[a]", "must be the name of another recipe, got ['a']"),
        ("r.yaml", "recipes extend one another in a circle, r.yaml -> r.yaml; remove one 'extends'"),
        ('"a\\0b"', "no such recipe, got 'a\\x00b'; check the name and the folder"),
        ("x" * 300, "no such recipe, got '" + "x" * 56 + "...; check the name and the folder"),
    ],
)
def test_a_base_that_cannot_be_read(tmp_path: Path, extends: str, message: str) -> None:
    write(tmp_path, r=f"seed: 1\nextends: {extends}\n")
    assert page(tmp_path) == [f"r.yaml:2  extends: {message}"]


def test_a_circle_is_named_where_it_closes(tmp_path: Path) -> None:
    write(tmp_path, r="extends: a.yaml\n", a="seed: 1\nextends: b.yaml\n", b="extends: r.yaml\n")
    assert page(tmp_path) == [
        "b.yaml:1  extends: recipes extend one another in a circle, "
        "r.yaml -> a.yaml -> b.yaml -> r.yaml; remove one 'extends'"
    ]


def test_a_broken_base_is_reported_beside_the_recipes_own_yaml(tmp_path: Path) -> None:
    write(tmp_path, r="extends: b.yaml\nseed: 1\nseed: 2\n", b="a: [\n")
    assert [line.split(": ")[0] for line in page(tmp_path)] == ["r.yaml:3  seed", "b.yaml:2  is not valid YAML"]


def test_loading_needs_no_torch() -> None:
    code = "import sys, phalanx.loading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Mutations of the sample recipe, each with the line and the key that the page must name.

LINES = sample.TEXT.splitlines()


def keys_by_line() -> list[str]:
    """The dotted key that each line of the sample recipe holds."""
    found: list[str] = []
    above: list[str] = []
    for line in LINES:
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], line.split(":")[0].strip()]
        found.append(".".join(above))
    return found


KEYS = keys_by_line()
LEAVES = [index for index, line in enumerate(LINES) if not line.endswith(":")]
OUT_OF_RANGE = {
    "seed": ["-1", "9223372036854775808"],
    "model.experts": ["0", "-3"],
    "model.top_k": ["0", "5"],
    "model.kind": ["modle", "''"],
    "model.dropout": ["1", "-0.5", ".inf", ".nan"],
    "threat.norm": ["Lfin", "linf"],
    "threat.eps": ["8/0", "300/255", "-1", "eight", ".nan", "1/2/3"],
    "method.name": ["tta", "pgd"],
    "method.beta": ["101", "-1"],
    "method.attack.name": ["pdg", "at"],
    "method.attack.steps": ["0"],
    "training.precision": ["fp16"],
    "training.lr": [".inf", "1e999"],
}
# no key of the sample takes any of these, but for text, paths and the table
WRONG_TYPE = ["[1, x]", "{a: {}}", "[[]]", "[{a: 1}]"]
WRONG_FOR_NUMBERS = ["lots", "'4'", "no", "true", "12:30:45", "1_000", "null", '"\\u732b\\0"']
NUMBERS = ["seed", "model.experts", "model.top_k", "model.dropout", "method.beta", "method.attack.steps"]
NUMBERS += ["training.epochs", "training.lr", "training.milestones.half", "data.batch_size"]

Mutation = tuple[list[str], int, str]
"""The lines, and the line number and key to be named."""


def valued(index: int, value: str) -> Mutation:
    lines = [*LINES]
    lines[index] = f"{LINES[index].split(':')[0]}: {value}"
    return lines, index + 1, KEYS[index]


def escaped(text: str) -> str:
    """`text` as a quoted YAML scalar, whatever it holds."""
    return '"' + "".join(f"\\U{ord(char):08x}" for char in text) + '"'


@st.composite
def mutations(draw: st.DrawFn) -> Mutation:
    kind = draw(st.sampled_from(["rename", "type", "number", "range", "twice", "tag", "delete", "section"]))
    match kind:
        case "rename":
            index = draw(st.sampled_from(range(len(LINES))))
            old = LINES[index].split(":")[0].strip()
            name = draw(st.text(st.characters(codec="utf-8"), max_size=20) | st.just(old[:-1]) | st.just(f"{old}s"))
            assume(name != "extends" and name not in {key.rpartition(".")[2] for key in KEYS})
            assume(KEYS[index] != "training.milestones.half")  # a table takes any key
            lines = [*LINES]
            lines[index] = LINES[index].replace(old, escaped(name), 1)
            section = KEYS[index].rpartition(".")[0]
            return lines, index + 1, f"{section}.{name}" if section else name
        case "type":
            return valued(draw(st.sampled_from(LEAVES)), draw(st.sampled_from(WRONG_TYPE)))
        case "number":
            return valued(KEYS.index(draw(st.sampled_from(NUMBERS))), draw(st.sampled_from(WRONG_FOR_NUMBERS)))
        case "range":
            key = draw(st.sampled_from(sorted(OUT_OF_RANGE)))
            return valued(KEYS.index(key), draw(st.sampled_from(OUT_OF_RANGE[key])))
        case "twice":
            index = draw(st.sampled_from(LEAVES))
            return [*LINES[: index + 1], *LINES[index:]], index + 2, KEYS[index]
        case "tag":
            tag = draw(st.sampled_from(["!!python/name:os.system", "!x", "!!str", "&anchor", "*alias #"]))
            index = draw(st.sampled_from(LEAVES))
            return valued(index, f"{tag} {LINES[index].split(': ')[1]}")
        case "delete":
            # the one key without a default, reported at its section
            index = KEYS.index("training.epochs")
            return [*LINES[:index], *LINES[index + 1 :]], index, "training.epochs"
    key = draw(st.sampled_from(["model", "threat", "method", "method.attack", "training", "data"]))
    value = draw(st.sampled_from(["3", "text", "[]", "null", ""]))
    index = KEYS.index(key)
    inside = [i for i, other in enumerate(KEYS) if other.startswith(f"{key}.")]
    lines, line, _ = valued(index, value)
    return [text for i, text in enumerate(lines) if i not in inside], line, key


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(mutation=([*LINES[:9], "  eps: 8/0", *LINES[10:]], 10, "threat.eps"))
@given(mutation=mutations())
def test_a_mutated_recipe_is_reported_at_its_line_and_key(tmp_path: Path, mutation: Mutation) -> None:
    lines, line, key = mutation
    file = tmp_path / "r.yaml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(sample.Recipe, file)
    # what has no default is also missing when its name is changed, and that is said where its section begins
    problems = [p for p in caught.value.problems if p.place.line == line or "is required" not in p.message]
    assert problems
    assert {problem.place.line for problem in problems} == {line}
    assert all(named(problem.path, key) for problem in problems), str(caught.value)
    assert str(caught.value).isascii() or str(caught.value).replace("\n", "").isprintable()


def named(path: tuple[str | int, ...], key: str) -> bool:
    """Whether `path` is that of `key`, or of a part of its value."""
    return ".".join(map(str, path)) == key or ".".join(map(str, path)).startswith(f"{key}.")


@settings(max_examples=150, deadline=None)
@example(path="[key]", value="")  # what pydantic calls a wrong key of a table
@given(
    path=st.sampled_from(KEYS) | st.text(max_size=15),
    value=st.text(max_size=15) | st.sampled_from(["[", "{a: 1}", "!x 1", "1e999", "~", "[1, 2]", "8/0"]),
)
def test_no_override_brings_anything_but_a_page(path: str, value: str) -> None:
    try:
        loaded = load_recipe(sample.Recipe, None, ["training.epochs=1", f"{path}={value}"])
    except RecipeErrors as errors:
        assert {problem.place.source for problem in errors.problems} <= {"--set"}
    else:
        assert load_recipe(sample.Recipe, None, values=loaded.resolved).value == loaded.value
