from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.attacks import FGSM, PGD, Attack, JointMargin, ReleasedAPGD, ReleasedPGD, RouteSteering
from phalanx.errors import InputError
from phalanx.evaluation import protocol
from phalanx.threat import ThreatModel

THREAT = ThreatModel("L2", "1/2")


@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("fgsm", FGSM()),
        ("fgsm-margin", FGSM(objective="margin")),
        ("pgd-50", PGD(steps=50)),
        ("pgd-7x10", PGD(steps=7, restarts=10)),
        ("pgd-7x10-margin", PGD(steps=7, restarts=10, objective="margin")),
        ("pgd-999999x9999", PGD(steps=999999, restarts=9999)),
        ("fgsm@dense", FGSM(surface="dense")),
        ("pgd-7x10-margin@expert-3", PGD(steps=7, restarts=10, objective="margin", surface="expert-3")),
        ("steer-7", RouteSteering(steps=7)),
        ("steer-7x3", RouteSteering(steps=7, classes=3)),
        ("joint-7", JointMargin(steps=7)),
        ("joint-7x3", JointMargin(steps=7, classes=3)),
    ],
)
def test_a_name_says_the_whole_budget(name: str, attack: Attack) -> None:
    (member,) = protocol(name, THREAT).members
    assert (member.name, member.attack) == (name, attack.within(THREAT))
    assert (member.attack.norm, str(member.attack.eps)) == ("L2", "1/2")


@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("pgd-released", ReleasedPGD(steps=50)),
        ("pgd-released-10", ReleasedPGD(steps=10)),
        ("pgd-released@experts", ReleasedPGD(steps=50, surface="experts")),
        ("pgd-released-7@expert-3", ReleasedPGD(steps=7, surface="expert-3")),
        ("apgd-released", ReleasedAPGD(steps=10)),
        ("apgd-released-50", ReleasedAPGD(steps=50)),
    ],
)
def test_reproductions_need_company(name: str, attack: Attack) -> None:
    threat = ThreatModel("Linf", "8/255")
    member, other = protocol(f"{name},pgd-50", threat).members
    assert (member.name, member.attack) == (name, attack.within(threat))
    assert member.attack.reproduction and not other.attack.reproduction
    with pytest.raises(InputError, match="only, which says nothing about robustness; add pgd-50") as caught:
        protocol(name, threat)
    assert str(caught.value).startswith(f"protocol {name!r} holds reproductions")
    with pytest.raises(InputError, match="holds reproductions"):
        protocol("pgd-released-3,apgd-released,pgd-released", threat)
    with pytest.raises(InputError, match=f"part '{name}': norm of a released attack must be Linf, got L2; use pgd"):
        protocol(f"pgd-50,{name}", THREAT)


def test_several_in_order_spaces_do_not_matter() -> None:
    found = protocol(" fgsm, pgd-20 ,pgd-20-margin", THREAT)
    assert [member.name for member in found.members] == ["fgsm", "pgd-20", "pgd-20-margin"]
    assert found.name == " fgsm, pgd-20 ,pgd-20-margin"


@pytest.mark.parametrize(
    "part",
    [
        "", "pgd", "pgd-", "pgd-0", "pgd-5x0", "pgd-5x", "pgd-x5", "pgd--5", "pgd-1.5", "pgd-05", "PGD-5", "pgd-5-cw",
        "pgd-5-margin-margin", "pgd-5-marginx", "-margin", "margin", "fgsmx2", "fgsm-5", "pgd-10000000", "pgd-5x10000",
        "pgd-\u0665", "pgd-5 x2", "steer", "steer-0", "steer-5-margin", "routing-0", "pgd-5@", "pgd-5@A",
        "joint", "joint-0", "joint-5x0", "joint-5-margin", "joint-5@halves", "dual", "dual-0", "dual-5x2",
        "pgd-released-0", "pgd-released-", "pgd-released-5x2", "pgd-released-margin", "pgd-released@",
        "apgd", "apgd-5", "apgd-released@experts", "apgd-released-0",
    ],
)  # fmt: skip
def test_what_is_not_understood_is_quoted(part: str) -> None:
    for name in (part, f"fgsm,{part}"):
        with pytest.raises(InputError) as caught:
            protocol(name, THREAT)
        if part.strip() == part:
            assert str(caught.value) == (
                f"protocol has no attack {part!r}; write fgsm[-margin][@SURFACE], "
                "pgd-STEPS[xRESTARTS][-margin][@SURFACE], steer-STEPS[xCLASSES], joint-STEPS[xCLASSES], "
                "routing-STEPS for every surface that the model has, "
                "pgd-released[-STEPS][@SURFACE] or apgd-released[-STEPS], joined by commas; brackets hold what may be "
                "left out; for example pgd-50"
            )


def test_routing_is_every_surface_and_steering() -> None:
    found = protocol("fgsm,routing-9", THREAT)
    assert found.name == "fgsm,routing-9"
    assert [member.name for member in found.members] == [
        "fgsm", "pgd-9", "pgd-9-margin@pinned", "pgd-9@pinned", "pgd-9@experts", "pgd-9@router", "pgd-9@dense",
        "steer-9", "steer-9x9",
    ]  # fmt: skip
    with pytest.raises(InputError, match="protocol names 'pgd-9' twice"):
        protocol("pgd-9,routing-9", THREAT)


def test_routing_of_a_dual_model_adds_its_halves() -> None:
    found = [member.name for member in protocol("routing-9", THREAT, halves=True).members]
    routing = [member.name for member in protocol("routing-9", THREAT).members]
    assert set(found) == {*routing, "pgd-9@standard", "pgd-9@robust", "joint-9x9"} and len(found) == len(routing) + 3
    with pytest.raises(InputError, match="protocol names 'joint-9x9' twice"):
        protocol("joint-9x9,routing-9", THREAT, halves=True)
    assert [member.name for member in protocol("fgsm", THREAT, halves=True).members] == ["fgsm"]


@pytest.mark.parametrize("part", ["pgd-5@halves", "fgsm@halves", "pgd-released@halves"])
def test_a_surface_that_has_its_own_objective(part: str) -> None:
    with pytest.raises(InputError, match=f"part '{part}': surface 'halves' and an objective 'joint-L' go together"):
        protocol(part, THREAT)


def test_an_unknown_surface_lists_those_there_are() -> None:
    with pytest.raises(InputError, match=r"part 'pgd-5@gate': surface must be one of whole, pinned, .*expert-J, got"):
        protocol("pgd-5@gate", THREAT)


def test_the_same_attack_twice() -> None:
    with pytest.raises(InputError, match=r"protocol names 'pgd-5' twice; once is enough"):
        protocol("pgd-5,fgsm, pgd-5", THREAT)


@given(st.text(alphabet="fgsmpd-x,0123456789 \u0661ari", max_size=20))
def test_any_text_is_a_protocol_or_an_input_error(text: str) -> None:
    try:
        found = protocol(text, THREAT)
    except InputError:
        return
    assert [member.name for member in found.members] == [part.strip() for part in text.split(",")]
