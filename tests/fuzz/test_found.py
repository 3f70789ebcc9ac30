"""What mutated recipes and command lines once broke, each with the message that it gets now."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from commands import Command

TEXTS = {
    "mine.yaml": "extends: digits-at\nmodel:\n  options: {hidden: [0]}\nevaluation: {protocol: aa}\n",
    "wide.yaml": "extends: digits-at\nmodel:\n  options: {hidden: [10000000000000]}\n",
    "name.yaml": "runs:\n  ../evil: {recipe: digits-at}\n",
    "set.yaml": "runs:\n  a: {recipe: digits-at}\n  b:\n    recipe: digits-at\n    set: [model.exprts=3]\n",
    "all.yaml": "runs:\n  a: {recipe: digits-at}\nset:\n- evaluation.protocol=aa\n",
    "nested.yaml": "runs:\n  a: {recipe: quickstart}\n",
    "itself.yaml": "runs:\n  a: {recipe: digits-closed-ranks, set: [model.start=a]}\n",
    "broken.py": "def f(:\n",
    "fails.py": "def f():\n    return 1 / 0\n",
}


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    (folder / "bytes.yaml").write_bytes(bytes(range(256)))
    (folder / "some").mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train mine.yaml", "mine.yaml:4  evaluation.protocol: protocol has no attack 'aa'"),
        ("train mine.yaml --set evaluation.protocol=fgsm", "mine.yaml:3  model.options.hidden: expert"),
        ("train wide.yaml", "  model: its weights do not fit into the memory"),
        ("train digits-at --set model.options.hidden=abc", "--set  model.options.hidden: expert 'mlp'"),
        ("train digits-at --set model.experts=100000000", "model.experts: must be at most 1024, got 100000000"),
        ("train digits-at --set model.expert=torch:zeros", "model.expert: expert 'torch:zeros': torch belongs to"),
        ("train digits-at --set training.batch_size=5000", "--set  training.batch_size: is 5000, but digits has 1213"),
        ("train digits-at --set device=cuda:9", "--set  device: 'cuda:9' is not there"),
        ("train digits-at --set data.train_limit=3", "--set  data.train_limit: digits:"),
        ("train digits-closed-ranks --set model.start=nowhere", "--set  model.start: model: the network:"),
        ("train quickstart", "quickstart is a study, not one run: phalanx run quickstart makes it"),
        ("run digits-at --set device=cuda:9", "--set  device: 'cuda:9' is not there"),
        ("run name.yaml", "name.yaml:2  runs.../evil: '../evil' cannot name a run"),
        ("run set.yaml", "set.yaml:5 model.exprts=3  model.exprts: no such key; did you mean 'experts'?"),
        ("run all.yaml", "all.yaml:3  evaluation.protocol: protocol has no attack 'aa'"),
        ("run nested.yaml", "nested.yaml:2  runs.a.recipe: quickstart is a study, not one run"),
        ("run itself.yaml", "itself.yaml:2  model.start: the network must be a mixture"),
        ("run ''", "no recipe is named ''"),
        ("run some", "recipe some is no regular file"),
        ("run digits-at --out /proc/nope", "cannot write /proc/nope/LOCK: No such file"),
        ("train digits-at --out bytes.yaml/x", "Not a directory; choose another place"),
        (f"run digits-at --out {'a' * 300}", "File name too long; give another path, or allow access"),
        ("recipes show bytes.yaml", "bytes.yaml:2  is not UTF-8"),
        ("data describe digits --out bytes.yaml", "bytes.yaml is a file, or below one;"),
        ("data check digits --set seed=٣", "seed: must be an integer, got '٣'"),
        ("data check quickstart", "quickstart is a study, not one run"),
        ("challenge list .", "is not evaluated; run phalanx evaluate first"),
        ("challenge list nowhere", "nowhere is not evaluated; run phalanx evaluate first"),
        ("selftest --out nowhere/x.json", "there is no folder nowhere; make it, or choose another file"),
        ("attack some --attack fgsm --out x", "some is no run folder: it has no run.json; check the name"),
        ("evaluate --model os:system --data digits", "missing a required argument: 'command'"),
        ("evaluate --model torch:zeros --data digits", "--model torch:zeros failed with TypeError"),
        ("evaluate --model ../x:f --data digits", "--model ../x:f must be 'module:function'"),
        ("evaluate --model broken:f --data digits", "importing module 'broken' failed with SyntaxError"),
        ("evaluate --model fails:f --data digits", "fails.py:2); try it by itself"),
        ("evaluate --model torch.nn:Flatten --data nonsense", "--data  data.name: must be 'digits'"),
        ("evaluate --model torch.nn:Flatten --data digits --set model.experts=3", "only data.KEY, device and"),
    ],
)  # fmt: skip
def test_one_message(command: Command, here: Path, line: str, message: str) -> None:
    code, out, err = command(shlex.split(line))
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and message in err
    # an evaluation's folder is bound before its model is built
    assert line.startswith("evaluate") or not list(here.glob("runs/*/run.json"))
