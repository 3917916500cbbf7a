# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs scenarios, one after the other, each on VMs of its own, and collects what they saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from types import ModuleType

from pkvm.check.scenarios import PREFIXES, TOPICS
from pkvm.check.scenarios.bench import SECONDS, After, Bench, HungError
from pkvm.check.scenarios.observation import Observation, Outcome
from pkvm.check.scenarios.watchdog import Watchdog
from pkvm.kvm import Kvm

Scenario = Callable[[Bench], None]


class UnknownTopicError(Exception):
    """There is no such topic; the text says which there are."""


def topic_module(topic: str) -> ModuleType:
    """The module of a topic. Raises UnknownTopicError."""
    if topic not in TOPICS:
        raise UnknownTopicError(f"there is no topic {topic!r}; there are {', '.join(TOPICS)}")
    return import_module(f"pkvm.check.scenarios.{topic}")


def title(topic: str) -> str:
    """What a topic is about, in words. Raises UnknownTopicError."""
    words: str = topic_module(topic).TITLE
    return words


def scenarios(topic: str) -> Iterator[tuple[str, Scenario]]:
    """The scenarios of a topic by name, in the order of the module. Raises UnknownTopicError."""
    for name, value in vars(topic_module(topic)).items():
        if name.startswith(PREFIXES) and callable(value):
            yield name, value


def run(
    kvm: Kvm,
    topics: Iterable[str] = TOPICS,
    *,
    seconds: float = SECONDS,
    progress: Callable[[str, str], None] | None = None,
    after: After | None = None,
) -> list[Observation]:
    """Run the scenarios of `topics` on the kernel behind `kvm`. `progress` is told topic and
    scenario before each; `after` is for a machine whose time is its own. Raises
    UnknownTopicError; whatever a scenario does is in what it saw."""
    observations: list[Observation] = []
    with Watchdog() as watchdog:
        for topic in topics:
            for name, scenario in scenarios(topic):
                if progress is not None:
                    progress(topic, name)
                bench = Bench(kvm, topic, name, after=after)
                watchdog.start(seconds, bench.expire)
                observations += run_one(bench, scenario)
                watchdog.stop()
    return observations


def run_one(bench: Bench, scenario: Scenario) -> list[Observation]:
    """What one scenario saw. One that raises, or whose time was up, says so last."""
    end = ""
    try:
        with bench:
            scenario(bench)
    except HungError:
        end = "stopped: it took too long"
    except Exception as error:
        # A scenario that fails must not stop the others, whatever it is that went wrong.
        end = f"ended by {type(error).__name__}: {error}"
    if end:
        bench.observations.append(bench.row("scenario", "", Outcome(end)))
    return bench.observations
