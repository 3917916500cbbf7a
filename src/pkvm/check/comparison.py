# SPDX-License-Identifier: GPL-2.0-or-later
"""Two runs of the scenarios side by side: what is the same, what differs, and whether it may.

Within a scenario the observations of both sides are matched by what was asked, in order; one that
only one side made is a difference too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import Enum
from fnmatch import fnmatchcase
from typing import NamedTuple

from pkvm.check.scenarios.observation import Observation

MAX_EXPLAINED = 0.05
"""The largest share of observations that explanations may speak for."""


class Verdict(Enum):
    """What a pair of observations comes to."""

    SAME = "same"
    EXPLAINED = "different and explained"
    DIFFERENT = "different and unexplained"


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why the model and the kernel may differ in some observations: patterns as a shell has them
    (fnmatch) for the observation's fields and for both outcomes in words."""

    topic: str
    scenario: str
    call: str
    arguments: str
    model: str
    kernel: str
    reason: str
    source: str
    """Where that can be read: a document's section, a file of a source tree."""

    def __str__(self) -> str:
        """What it is about, and the reason."""
        return f"{self.topic}, {self.scenario}: {self.call} {self.arguments}: {self.reason}"

    def speaks_for(self, pair: Pair) -> bool:
        """Whether it is about this difference."""
        row = pair.question
        fields = (row.topic, row.scenario, row.call, row.arguments, *pair.words())
        patterns = (
            self.topic, self.scenario, self.call, self.arguments, self.model, self.kernel,
        )  # fmt: skip
        return all(map(fnmatchcase, fields, patterns))


class Pair(NamedTuple):
    """An observation of the model's and of the kernel's; None where one side made none."""

    model: Observation | None
    kernel: Observation | None

    @property
    def question(self) -> Observation:
        """Either: topic, scenario, call and arguments are those of both."""
        row = self.kernel or self.model
        assert row is not None
        return row

    def words(self) -> tuple[str, str]:
        """Both outcomes in words."""
        model, kernel = (
            "not reached" if row is None else row.words() or "nothing"
            for row in (self.model, self.kernel)
        )
        return model, kernel

    @property
    def is_same(self) -> bool:
        """Whether both saw the same."""
        if self.model is None or self.kernel is None:
            return False
        return self.model.outcome() == self.kernel.outcome()


class Judged(NamedTuple):
    """A pair with what it comes to."""

    pair: Pair
    verdict: Verdict
    explanation: Explanation | None


class Comparison(NamedTuple):
    """The whole of it."""

    judged: tuple[Judged, ...]
    stale: tuple[Explanation, ...]
    """Explanations of these topics that explain nothing any more: errors."""

    def count(self, verdict: Verdict, topic: str | None = None) -> int:
        """How many pairs came to `verdict`, in a topic or in all."""
        return sum(
            one.verdict is verdict and topic in (None, one.pair.question.topic)
            for one in self.judged
        )

    def topics(self) -> list[str]:
        """The topics, in their order."""
        return list(dict.fromkeys(one.pair.question.topic for one in self.judged))

    def unexplained(self) -> list[Pair]:
        """The differences that nobody explains."""
        return [one.pair for one in self.judged if one.verdict is Verdict.DIFFERENT]

    @property
    def explains_too_much(self) -> bool:
        """Whether more than MAX_EXPLAINED of the observations are explained."""
        return self.count(Verdict.EXPLAINED) > MAX_EXPLAINED * len(self.judged)

    @property
    def holds(self) -> bool:
        """Whether model and kernel agree, but for what is explained."""
        return not (self.unexplained() or self.stale or self.explains_too_much)


def compare(
    model: Iterable[Observation],
    kernel: Iterable[Observation],
    explanations: Sequence[Explanation],
) -> Comparison:
    """Judge every observation of either side. Explanations of topics that neither side has are
    left alone."""
    judged: list[Judged] = []
    used: set[Explanation] = set()
    for pair in pairs(model, kernel):
        if pair.is_same:
            judged.append(Judged(pair, Verdict.SAME, None))
            continue
        explanation = next((one for one in explanations if one.speaks_for(pair)), None)
        if explanation is not None:
            used.add(explanation)
        verdict = Verdict.DIFFERENT if explanation is None else Verdict.EXPLAINED
        judged.append(Judged(pair, verdict, explanation))
    topics = {one.pair.question.topic for one in judged}
    stale = tuple(
        one
        for one in explanations
        if one not in used and any(fnmatchcase(topic, one.topic) for topic in topics)
    )
    return Comparison(tuple(judged), stale)


def pairs(model: Iterable[Observation], kernel: Iterable[Observation]) -> list[Pair]:
    """The observations of both sides, matched; in the order of the kernel's, then what only the
    model has."""
    ours, theirs = _by_scenario(model), _by_scenario(kernel)
    matched: list[Pair] = []
    for key in dict.fromkeys((*theirs, *ours)):
        matched += _matched(ours.get(key, []), theirs.get(key, []))
    return matched


def _by_scenario(rows: Iterable[Observation]) -> dict[tuple[str, str], list[Observation]]:
    scenarios: dict[tuple[str, str], list[Observation]] = {}
    for row in rows:
        scenarios.setdefault((row.topic, row.scenario), []).append(row)
    return scenarios


def _matched(ours: list[Observation], theirs: list[Observation]) -> list[Pair]:
    """The observations of one scenario, matched by their questions."""
    questions = [[(row.call, row.arguments) for row in rows] for rows in (ours, theirs)]
    if questions[0] == questions[1]:
        return list(map(Pair, ours, theirs))
    matched: list[Pair] = []
    matcher = SequenceMatcher(None, questions[0], questions[1], autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == "equal":
            matched += map(Pair, ours[i1:i2], theirs[j1:j2])
        else:
            matched += [Pair(row, None) for row in ours[i1:i2]]
            matched += [Pair(None, row) for row in theirs[j1:j2]]
    return matched
