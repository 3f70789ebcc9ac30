from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.attacks import (
    APGD,
    FAB,
    FGSM,
    PGD,
    APGDTargeted,
    Attack,
    CarliniWagner,
    ExpertTransfer,
    HopSkipJump,
    JointMargin,
    RayS,
    ReleasedAdvMoE,
    ReleasedAPGD,
    ReleasedPGD,
    RouteSteering,
    Square,
)
from phalanx.errors import InputError
from phalanx.evaluation import protocol
from phalanx.evaluation.protocols import GRAMMAR
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
        ("steer-apgd-7", RouteSteering(steps=7, search_rule="apgd", combine=True)),
        ("steer-apgd-7x3", RouteSteering(steps=7, classes=3, search_rule="apgd", combine=True)),
        ("joint-apgd-7x3", JointMargin(steps=7, classes=3, search_rule="apgd")),
        ("experts-apgd-7", ExpertTransfer(steps=7)),
        ("apgd-margin-7@straight-through", APGD(steps=7, objective="margin", surface="straight-through")),
        ("pgd-7@softened-t3", PGD(steps=7, surface="softened-t3")),
        ("pgd-7-eot:1", PGD(steps=7)),
        ("apgd-100", APGD()),
        ("apgd-dlr-7x5", APGD(steps=7, restarts=5, objective="dlr")),
        ("apgd-7-eot:20@pinned", APGD(steps=7, eot=20, surface="pinned")),
        ("apgd-t-100x9", APGDTargeted()),
        ("apgd-t-7x3-eot:2@dense-t0.1", APGDTargeted(steps=7, targets=3, eot=2, surface="dense-t0.1")),
        ("fab-7x5", FAB(steps=7, restarts=5, targets=0)),
        ("fab-t-100x9", FAB()),
        ("square-5000", Square()),
        ("rays-10000", RayS()),
        ("hsj-500", HopSkipJump(queries=500)),
        ("cw-40", CarliniWagner(steps=40, searches=9)),
        ("cw-40x3@dense", CarliniWagner(steps=40, searches=3, surface="dense")),
        ("square-7x2@expert-1", Square(queries=7, restarts=2, surface="expert-1")),
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
        ("pgd-released-advmoe", ReleasedAdvMoE(steps=10)),
        ("pgd-released-advmoe-50", ReleasedAdvMoE(steps=50)),
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
        "apgd", "apgd-t-5", "apgd-dlr", "apgd-5-dlr", "fab-t-5", "fab-5-eot:2", "square", "square-0", "standard@pinned",
        "standard:4/255", "rays", "rays-0", "rays-9x2", "rays-9@dense", "hsj-9@whole", "cw-0", "cw-5-margin",
        "apgd-released@experts", "apgd-released-0", "pgd-released-advmoe@experts",
        "fgsm:", "fgsm:x", "fgsm:-1", "fgsm:4/", "fgsm:4/255/2", "fgsm:4/255@dense", "pgd-5:4/255-margin", "pgd:0.1",
        "pgd-5-eot", "pgd-5-eot:", "pgd-5-eot:0", "pgd-5-eot:4/255", "pgd-5@dense-eot:4", "pgd-5-eot:4-margin",
        "fgsm-eot:4", "steer-5-eot:4", "routing-5:0.1", "pgd-released:0.1", "apgd-released-5:0.1",
        "steer-apgd", "steer-apgd-5@dense", "experts-5", "experts-apgd-5x2", "joint-apgd", "apgd-margin",
        "apgd-5-margin",
        "thorough@dense", "thorough-5", "quick:4/255",
        "fgsm-sweep:0.1", "fgsm-sweep@dense", "pgd-10..", "pgd-..50", "pgd-10...50", "pgd-0..50", "pgd-10..50@dense",
    ],
)  # fmt: skip
def test_what_is_not_understood_is_quoted(part: str) -> None:
    for name in (part, f"fgsm,{part}"):
        with pytest.raises(InputError) as caught:
            protocol(name, THREAT)
        if part.strip() == part:
            assert str(caught.value) == f"protocol has no attack {part!r}; write {GRAMMAR}; for example pgd-50"


_APGD, _TARGETED, _FAB, _SQUARE = "apgd-100", "apgd-t-100x9", "fab-t-100x9", "square-5000"


def _after(name: str, norm: str = "Linf") -> dict[str, tuple[str, ...]]:
    return {member.name: member.after for member in protocol(name, ThreatModel(norm, "1/2")).members}


def test_autoattack_is_a_cascade_with_the_published_budgets() -> None:
    assert list(_after("standard").items()) == [
        (_APGD, ()), (_TARGETED, (_APGD,)), (_FAB, (_APGD, _TARGETED)), (_SQUARE, (_APGD, _TARGETED, _FAB)),
    ]  # fmt: skip
    assert _after("standard", "L2") == _after("standard")
    assert list(_after("standard", "L1")) == ["apgd-100x5", "apgd-t-100x5", _FAB, _SQUARE]
    assert list(_after("plus")) == ["apgd-100x5", "apgd-dlr-100x5", "fab-100x5", _SQUARE, _TARGETED, _FAB]
    assert _after("plus")[_FAB] == ("apgd-100x5", "apgd-dlr-100x5", "fab-100x5", _SQUARE, _TARGETED)
    assert _after("rand") == {"apgd-100-eot:20": (), "apgd-dlr-100-eot:20": ("apgd-100-eot:20",)}


def test_what_is_asked_for_outside_a_cascade_attacks_everything() -> None:
    assert _after("routing-5,standard")["pgd-5@dense"] == ()
    for name in (f"{_FAB},standard", f"standard,{_FAB}"):
        after = _after(name)
        assert after[_FAB] == () and after[_SQUARE] == (_APGD, _TARGETED, _FAB)


@pytest.mark.parametrize("name", ["standard,plus", "plus,standard"])
def test_a_member_of_two_cascades_attacks_what_either_wants(name: str) -> None:
    after = _after(name)
    # in plus apgd-t comes after square, in standard before: neither waits for the other
    assert after[_TARGETED] == after[_SQUARE] == ()
    assert after[_FAB] == (_TARGETED,)
    order = list(after)
    assert all(order.index(before) < order.index(member) for member, earlier in after.items() for before in earlier)


def test_routing_is_every_surface_and_steering() -> None:
    found = protocol("fgsm,routing-9", THREAT)
    assert found.name == "fgsm,routing-9"
    assert [member.name for member in found.members] == [
        "fgsm", "pgd-9", "pgd-9-margin@pinned", "pgd-9@pinned", "pgd-9@experts", "pgd-9@router", "pgd-9@dense",
        "pgd-9@dense-t0.1", "steer-9", "steer-9x9",
    ]  # fmt: skip
    # what two names share is tried once
    assert protocol("pgd-9,routing-9", THREAT).members == protocol("routing-9", THREAT).members


def test_routing_of_a_dual_model_adds_its_halves() -> None:
    found = [member.name for member in protocol("routing-9", THREAT, halves=True).members]
    routing = [member.name for member in protocol("routing-9", THREAT).members]
    assert set(found) == {*routing, "pgd-9@standard", "pgd-9@robust", "joint-9x9"} and len(found) == len(routing) + 3
    assert [member.name for member in protocol("fgsm", THREAT, halves=True).members] == ["fgsm"]
    with_mixing = [member.name for member in protocol("routing-9", THREAT, halves=True, mixing=True).members]
    assert with_mixing == [*found, "mislead-9"]


@pytest.mark.parametrize("part", ["pgd-5@halves", "fgsm@halves", "pgd-released@halves"])
def test_a_surface_that_has_its_own_objective(part: str) -> None:
    with pytest.raises(InputError, match=f"part '{part}': surface 'halves' and an objective 'joint-L' go together"):
        protocol(part, THREAT)


def test_an_unknown_surface_lists_those_there_are() -> None:
    message = r"part 'pgd-5@gate': surface must be one of whole, pinned, .*expert-J, dense-tT, softened-tT, got"
    with pytest.raises(InputError, match=message):
        protocol("pgd-5@gate", THREAT)


def test_the_same_attack_twice() -> None:
    with pytest.raises(InputError, match=r"protocol names 'pgd-5' twice; once is enough"):
        protocol("pgd-5,fgsm, pgd-5", THREAT)


def test_a_radius_in_the_name_is_the_attacks_own() -> None:
    """In the evaluation's norm, kept as written."""
    names = {
        "fgsm:0.03": FGSM(eps="0.03"),
        "fgsm-margin@dense:1/255": FGSM(objective="margin", surface="dense", eps="1/255"),
        "pgd-7x10-margin@expert-3:.25": PGD(steps=7, restarts=10, objective="margin", surface="expert-3", eps=".25"),
        "pgd-7:4/255": PGD(steps=7, eps="4/255"),
        "steer-7x3:4/255": RouteSteering(steps=7, classes=3, eps="4/255"),
        "joint-7:4/255": JointMargin(steps=7, eps="4/255"),
        "mislead-7:4/255": PGD(steps=7, objective="mislead", surface="mixing", eps="4/255"),
        "pgd-7@dense-t0.03:.25": PGD(steps=7, surface="dense-t0.03", eps=".25"),
    }
    found = protocol(",".join(names), THREAT).members
    assert {member.name: member.attack for member in found} == {
        name: attack.within(THREAT) for name, attack in names.items()
    }
    assert [(member.attack.norm, member.attack.eps) for member in found] == [
        ("L2", "0.03"), ("L2", "1/255"), ("L2", ".25"), ("L2", "4/255"), ("L2", "4/255"), ("L2", "4/255"),
        ("L2", "4/255"), ("L2", ".25"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("fgsm:1/0", "eps must be a number or a fraction such as '8/255', got '1/0'"),
        ("pgd-5:1..2", "eps must be a number or a fraction such as '8/255', got '1..2'"),
        ("pgd-5:8", "eps must be at most 1 for Linf, since pixels lie in [0, 1], got '8'; is it 8/255?"),
    ],
)
def test_a_radius_that_is_none(part: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        protocol(f"pgd-50,{part}", ThreatModel("Linf", "8/255"))
    assert str(caught.value) == f"protocol part {part!r}: {says}"


def test_passes_of_a_random_model() -> None:
    names = {
        "pgd-100-eot:4": PGD(steps=100, eot=4),
        "pgd-7x2-margin-eot:20@dense:1/255": PGD(
            steps=7, restarts=2, objective="margin", eot=20, surface="dense", eps="1/255"
        ),
    }
    assert {member.name: member.attack for member in protocol(",".join(names), THREAT).members} == {
        name: attack.within(THREAT) for name, attack in names.items()
    }


def test_sweeps_are_many_attacks() -> None:
    assert [member.name for member in protocol("fgsm-sweep, pgd-10..50", THREAT).members] == [
        "fgsm:0.01", "fgsm:0.02", "fgsm:0.03", "fgsm:0.04", "fgsm:0.05", "fgsm:0.06", "fgsm:0.07", "fgsm:0.08",
        "fgsm:0.09", "pgd-10", "pgd-20", "pgd-30", "pgd-40", "pgd-50",
    ]  # fmt: skip
    assert [member.name for member in protocol("pgd-990..1000", THREAT).members] == ["pgd-990", "pgd-1000"]
    overlapping = protocol("routing-50,pgd-10..50", THREAT).members
    assert len({member.name for member in overlapping}) == len(overlapping) == 13


@pytest.mark.parametrize("part", ["pgd-5..50", "pgd-10..55", "pgd-50..10", "pgd-10..10"])
def test_steps_go_up_by_tens(part: str) -> None:
    with pytest.raises(InputError) as caught:
        protocol(part, THREAT)
    assert str(caught.value) == (
        f"protocol part {part!r} must go up from one multiple of 10 to another; write for example pgd-10..50"
    )


def test_attacks_outside_the_threat_and_reproductions_stand_aside() -> None:
    threat = ThreatModel("Linf", "8/255")
    found = protocol("pgd-50,fgsm-sweep,pgd-released,steer-5:8/255,joint-5:9/255", threat, halves=True)
    # 8/255 = 0.0314
    outside = tuple(f"fgsm:0.0{hundredths}" for hundredths in range(4, 10))
    assert found.aside(threat) == (*outside, "pgd-released", "joint-5:9/255")


def test_a_protocol_needs_an_attack_within_the_threat() -> None:
    threat = ThreatModel("Linf", "8/255")
    for name in ("fgsm:0.04", "fgsm:0.04,pgd-50:16/255,pgd-released"):
        with pytest.raises(InputError) as caught:
            protocol(name, threat)
        assert str(caught.value) == (
            f"protocol {name!r} holds no attack within the threat Linf 8/255, so it says nothing about it; add pgd-50"
        )
    assert protocol("fgsm:0.04,fgsm:0.01", threat).aside(threat) == ("fgsm:0.04",)


@given(st.text(alphabet="fgsmpd-x,0123456789 \u0661ariot:./", max_size=20))
def test_any_text_is_a_protocol_or_an_input_error(text: str) -> None:
    try:
        found = protocol(text, THREAT)
    except InputError:
        return
    if ".." not in text:
        assert [member.name for member in found.members] == [part.strip() for part in text.split(",")]
