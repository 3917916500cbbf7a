# SPDX-License-Identifier: GPL-2.0-or-later
"""Comparing two runs: what is the same, what is explained, what is not, and what is stale."""

from __future__ import annotations

from pkvm.check.agreement_picture import svg
from pkvm.check.comparison import Explanation, Verdict, compare, pairs
from pkvm.check.scenarios.observation import Observation


def row(call: str, result: str, *, scenario: str = "good_one", number: int = 0) -> Observation:
    return Observation("psci", scenario, number, call, "", result, "", "", "")


def explanation(call: str, *, kernel: str = "*") -> Explanation:
    return Explanation("psci", "*", call, "*", "*", kernel, f"why {call}", "a book")


def test_each_observation_is_judged() -> None:
    model = [row("a", "1"), row("b", "2"), row("c", "3")]
    kernel = [row("a", "1"), row("b", "20"), row("c", "30")]
    found = compare(model, kernel, [explanation("b")])
    assert [one.verdict for one in found.judged] == list(Verdict)
    assert [pair.words() for pair in found.unexplained()] == [("3", "30")]
    assert not found.stale
    assert not found.holds
    assert found.count(Verdict.SAME) == found.count(Verdict.EXPLAINED, "psci") == 1
    assert found.count(Verdict.SAME, "sysregs") == 0


def test_an_observation_that_one_side_did_not_make_is_a_difference_of_its_own() -> None:
    model = [row("a", "1"), row("c", "3"), row("d", "4")]
    kernel = [row("a", "1"), row("b", "2"), row("c", "3")]
    assert [pair.words() for pair in pairs(model, kernel)] == [
        ("1", "1"),
        ("not reached", "2"),
        ("3", "3"),
        ("4", "not reached"),
    ]
    found = compare(model, kernel, [])
    assert found.count(Verdict.DIFFERENT) == 2


def test_an_explanation_speaks_for_the_outcomes_it_names_alone() -> None:
    model, kernel = [row("a", "1")], [row("a", "2")]
    assert compare(model, kernel, [explanation("a", kernel="3")]).unexplained()
    assert not compare(model, kernel, [explanation("a", kernel="2")]).unexplained()


def test_an_explanation_of_what_no_longer_differs_is_stale() -> None:
    same = [row("a", "1")]
    found = compare(same, same, [explanation("a")])
    assert [one.reason for one in found.stale] == ["why a"]
    assert not found.holds
    elsewhere = Explanation("sysregs", "*", "*", "*", "*", "*", "why", "a book")
    assert compare(same, same, [elsewhere]).holds, "its topic was not compared"


def test_no_more_than_one_in_twenty_may_be_explained() -> None:
    for count, holds in ((1, True), (2, False)):
        model = [row(str(number), "x") for number in range(20)]
        kernel = [row(str(number), "y" if number < count else "x") for number in range(20)]
        found = compare(model, kernel, [explanation("*")])
        assert not found.unexplained()
        assert found.holds == holds


def test_the_picture_has_a_bar_for_each_topic() -> None:
    model = [row("a", "1"), row("b", "2")]
    picture = svg(compare(model, [row("a", "1"), row("b", "<3>")], []), "Linux <7.3>")
    assert picture.startswith("<svg ")
    assert "PSCI" in picture
    assert "1 / 0 / 1" in picture
    assert "Linux &lt;7.3&gt;" in picture
