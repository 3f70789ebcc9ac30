from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.loading.problems import Place, RecipeErrors
from phalanx.loading.strict_yaml import MAX_BYTES, read_value, read_yaml


def read(tmp_path: Path, content: str | bytes) -> tuple[object, list[str]]:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    tree, problems = read_yaml(file)
    return tree.plain(), [str(problem).removeprefix(f"{tmp_path}/") for problem in problems]


def refusal(tmp_path: Path, content: str | bytes) -> str:
    with pytest.raises(RecipeErrors) as caught:
        read(tmp_path, content)
    assert len(caught.value.problems) == 1
    return str(caught.value.problems[0]).removeprefix(f"{tmp_path}/")


def test_nested_values_and_the_lines_of_their_keys(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("# head\na:\n  b: 1\n  c:\n    - x\n    - {d: 2.5,\n       e: null}\n")
    tree, problems = read_yaml(file)
    assert tree.plain() == {"a": {"b": 1, "c": ["x", {"d": 2.5, "e": None}]}}
    assert problems == []
    lines = {path: node.place.line for path, node in tree.walk()}
    assert lines == {
        (): 2,  # the mapping begins at its first key
        ("a",): 2,
        ("a", "b"): 3,
        ("a", "c"): 4,
        ("a", "c", 0): 5,
        ("a", "c", 1): 6,
        ("a", "c", 1, "d"): 6,
        ("a", "c", 1, "e"): 7,
    }


def test_a_byte_order_mark_and_crlf_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, b"\xef\xbb\xbfa: 1\r\nb: 2\r\n") == ({"a": 1, "b": 2}, [])


def test_keys_are_names(tmp_path: Path) -> None:
    assert read(tmp_path, "on: 1\n010: 2\n<<: 3\n")[0] == {"on": 1, "010": 2, "<<": 3}


def test_every_refused_node_is_reported_and_left_out(tmp_path: Path) -> None:
    text = "a: !!python/object/apply:os.system [x]\nb: &here 1\nc: *here\nd: 1\nd: 2\ne: [1, !x 2]\nf: 3\n"
    plain, problems = read(tmp_path, text + "? [g]\n: 4\n")
    assert plain == {"d": 1, "f": 3}
    assert [problem.split("; ")[0] for problem in problems] == [
        "recipe.yaml:1  a: YAML tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed, "
        "a recipe is plain data",
        "recipe.yaml:2  b: YAML anchor '&here' is not allowed",
        "recipe.yaml:3  c: alias '*here' is not allowed",
        "recipe.yaml:5  d: is given twice, first on line 4",
        "recipe.yaml:6  e.1: YAML tag '!x' is not allowed, a recipe is plain data",
        "recipe.yaml:8  a key is a list or a mapping",
    ]


def test_a_billion_laughs_are_refused_unexpanded(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    plain, problems = read(tmp_path, "\n".join(lines))
    assert plain == {}
    assert len(problems) == 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "recipe.yaml:1  is empty; write at least one 'key: value'"),
        ("# only a comment\n", "recipe.yaml:1  is empty; write at least one 'key: value'"),
        ("- a\n", "recipe.yaml:1  must be a mapping of 'key: value' lines, got ['a']"),
        ("!!map {a: 1}", "recipe.yaml:1  YAML tag 'tag:yaml.org,2002:map' is not allowed"),
        ("\njust text\n", "recipe.yaml:2  must be a mapping of 'key: value' lines, got 'just text'"),
        ("a: 1\nb:\n\tc: 2\n", "recipe.yaml:3  a tab begins column 1; indent with spaces"),
        (b"a: 1\nb: \xff\n", "recipe.yaml:2  is not UTF-8: byte 0xff; save the file as UTF-8"),
        ("a: 1\n---\nb: 2\n", "recipe.yaml:2  a second document begins after '---'"),
        ("a: 1\nb: [1, 2\n", "recipe.yaml:3  is not valid YAML: expected ',' or ']'"),
        ("a: b: c\n", "recipe.yaml:1  is not valid YAML: mapping values are not allowed here (column 5)"),
        (
            'a: 1\nb: "\\UFFFFFFFF"\n',
            "recipe.yaml:2  is not valid YAML: an escape or a directive is out of range",
        ),
        ("a: 1\nb: \x07\n", "recipe.yaml:2  holds the character U+0007; remove it"),
        ("a: " + "[" * 5000, "recipe.yaml:1  is nested more than 32 levels deep; flatten it"),
        (b"a: 1\n" + b"#" * MAX_BYTES, "recipe.yaml:1  is larger than 1,000,000 bytes"),
    ],
)
def test_what_cannot_be_read_is_one_message(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert refusal(tmp_path, content).startswith(message)


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    for path, message in [
        (tmp_path / "none.yaml", "cannot be read: no such file or directory; check the path"),
        (tmp_path, "is a folder; give a recipe's file"),
        (Path("/dev/null"), "is no regular file; give a recipe's file"),
        (tmp_path / "a\0b", "cannot be read: "),
        (tmp_path / ("x" * 300), "cannot be read: file name too long; check the path"),
    ]:
        with pytest.raises(RecipeErrors, match=message):
            read_yaml(path)


def test_a_value_is_all_at_one_place() -> None:
    place = Place("--set", detail="a=[1, {b: 2}]")
    tree, problems = read_value("[1, {b: 2}]", place)
    assert tree is not None
    assert tree.plain() == [1, {"b": 2}]
    assert {node.place for _, node in tree.walk()} == {place}
    assert problems == []


@given(st.text() | st.text(alphabet="ab:-?[]{}&*!|>'\"%@` \n\t#~01.\\uUx", max_size=40))
def test_no_text_brings_anything_but_a_tree_and_problems(text: str) -> None:
    tree, problems = read_value(text, Place("text"))
    assert tree is not None or problems
