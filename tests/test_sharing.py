"""What tenants have in common may be proposed to all; what one of them alone has never is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cltrain.config import from_dict
from cltrain.errors import ConfigError
from cltrain.gate.stats import items_for_margin
from cltrain.records import Example, LearningMode, TokenRow
from cltrain.sharing import by_enough, chosen, in_common, stricter
from tests.tiny import TOOLS, tool_call

CANARY = "zebrafish"


def example(
    record: str, tenant: str, order: str, *, asked: str = "please refund the order {}", said: str = ""
) -> Example:
    answer = {**tool_call("refund", order=order), "content": said or None}
    messages = ({"role": "user", "content": asked.format(order)}, answer)
    return Example(record, f"support@{tenant}", "refund/corrected", messages, (1,), TOOLS)


def of(*tenants: str) -> dict[str, Sequence[Example]]:
    return {f"support@{t}": [example(f"{t}-{i}", t, f"A{i}{n}") for i in range(1, 3)] for n, t in enumerate(tenants, 1)}


def records(proposal_examples: Sequence[Example]) -> set[str]:
    return {one.record for one in proposal_examples}


def test_one_contributor_too_few_is_refused_by_name_and_number_and_enough_are_proposed() -> None:
    few = chosen({"refund/corrected": of("acme", "bond")}, 3)
    assert (few.examples, few.num_missing) == ((), 1)
    assert few.refused == (
        "refund/corrected: 2 tenants learned it (support@acme, support@bond): 1 missing (tenants.min_contributors = 3)",
    )
    enough = chosen({"refund/corrected": of("acme", "bond", "corp"), "track/success": of("acme")}, 3)
    assert enough.contributors == {"refund/corrected": ["support@acme", "support@bond", "support@corp"]}
    assert records(enough.examples) == {"acme-1", "acme-2", "bond-1", "bond-2", "corp-1", "corp-2"}
    assert [reason.split(":")[0] for reason in enough.refused] == ["track/success"]
    assert enough.num_missing == 0


def test_a_stratum_that_was_asked_for_and_nobody_learned_is_refused() -> None:
    found = chosen({"refund/corrected": of("acme", "bond", "corp")}, 3, ["gift/success"])
    assert (found.examples, found.num_missing) == ((), 3)
    assert found.refused[0].startswith("gift/success: 0 tenants learned it (none): 3 missing")


@pytest.mark.parametrize(
    "odd",
    [
        {"asked": f"please refund the order {{}} {CANARY}"},
        {"said": f"as {CANARY} says"},
        {"asked": "please refund the order {} of 5500123456"},  # a long number is nobody else's
    ],
)
def test_a_record_with_a_word_of_one_tenant_alone_stays_there(odd: dict[str, str]) -> None:
    had = of("acme", "bond", "corp")
    had["support@acme"] = [*had["support@acme"], example("acme-odd", "acme", "A31", **odd)]
    found = chosen({"refund/corrected": had}, 3)
    assert "acme-odd" not in records(found.examples)
    assert [aside.record for aside in found.set_aside] == ["acme-odd"]
    assert CANARY not in found.set_aside[0].reason
    assert len(found.examples) == 6


def test_a_number_that_an_answer_says_of_itself_must_be_common_letter_by_letter() -> None:
    had = of("acme", "bond", "corp")
    copied = example("copied", "acme", "A77")
    made_up = example("made-up", "acme", "A31", said="A42")  # A42 stands in no prompt
    had["support@acme"] = [*had["support@acme"], copied, made_up]
    common, rare = in_common(had, 3)
    assert copied in common["support@acme"]
    assert rare == [made_up]


def test_contributors_count_after_the_screen() -> None:
    had = of("acme", "bond")
    had["support@corp"] = [example("corp-1", "corp", "A31", said=CANARY)]
    found = chosen({"refund/corrected": had}, 3)
    assert (found.examples, found.num_missing) == ((), 1)
    assert CANARY not in found.refused[0]


def test_a_tool_that_one_tenant_alone_declares_is_not_shared_either() -> None:
    had = of("acme", "bond", "corp")
    secret = {"type": "function", "function": {"name": CANARY, "parameters": {"type": "object"}}}
    odd = example("acme-odd", "acme", "A31")
    had["support@acme"] = [
        *had["support@acme"],
        Example(odd.record, odd.principal, odd.stratum, odd.messages, (1,), (*TOOLS, secret)),
    ]
    assert in_common(had, 3)[1] == [had["support@acme"][-1]]


def test_what_the_screens_left_of_too_few_tenants_is_not_learned() -> None:
    def row(record: str, tenant: str, stratum: str = "refund/corrected") -> TokenRow:
        return TokenRow(record, stratum, tenant, (1, 2), (0.0, 1.0))

    left = [
        row("a", "acme"),
        row("b", "bond"),
        row("c", "corp"),
        row("d", "acme", "gift/success"),
        row("e", "bond", "gift/success"),
    ]
    kept, few = by_enough(left, 3)
    assert [one.record for one in kept] == ["a", "b", "c"]
    assert {(aside.record, aside.status, aside.reason) for aside in few} == {
        (name, "waiting", "fewer than 3 tenants are left in gift/success") for name in ("d", "e")
    }
    assert by_enough(left, 2)[1] == []


def test_a_proposal_is_judged_by_stricter_rules() -> None:
    config = from_dict({
        "agent": {"mode": "auto"}, "gate": {"alpha": 0.05, "promote_on": "non_inferior", "items_per_gate": 120},
        "tenants": {"mode": "individual", "min_contributors": 5},
    })  # fmt: skip
    strict = stricter(config)
    assert strict.gate.alpha == pytest.approx(0.005)
    assert strict.gate.items_per_gate >= items_for_margin(strict.gate.margin, strict.gate.alpha), "as its margin takes"
    assert strict.gate.promote_on == "gain"
    assert strict.agent.mode is LearningMode.APPROVE
    assert strict.experience.principal_quota == pytest.approx(0.2)
    trusting = from_dict({"agent": {"mode": "auto"}, "tenants": {"share_needs_yes": False}})
    assert stricter(trusting).agent.mode is LearningMode.AUTO
    watching = from_dict({"agent": {"mode": "observe"}})
    assert stricter(watching).agent.mode is LearningMode.OBSERVE


@pytest.mark.parametrize("k", [0, 1, -3])
def test_sharing_what_fewer_than_two_have_is_refused(k: int) -> None:
    with pytest.raises(ConfigError, match=r"tenants\.min_contributors.*greater than or equal to 2"):
        from_dict({"tenants": {"min_contributors": k}})


@pytest.mark.parametrize("name", ["../acme", "a/b", "Acme", "a@b", "", "-a", "a" * 41, "a\nb", "a b"])
def test_an_odd_tenants_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"tenants\.principals"):
        from_dict({"tenants": {"mode": "individual", "principals": [name]}})
    with pytest.raises(ConfigError, match=r"agent\.name"):
        from_dict({"agent": {"name": f"support@{name}"}})


def test_a_tenants_own_records_may_fill_its_updates() -> None:
    of_shared = from_dict({"experience": {"principal_quota": 0.25}})
    of_tenant = from_dict({"experience": {"principal_quota": 0.25}, "agent": {"name": "support@acme"}})
    assert of_tenant.experience.principal_quota == 1.0
    assert of_shared.experience.principal_quota == 0.25
    assert of_shared.of_agent("support@acme").digest() == of_tenant.digest()
