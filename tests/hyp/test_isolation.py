# SPDX-License-Identifier: GPL-2.0-or-later
"""Facts §5.4, proven: a spy learns, and a liar changes, only what the table allows.

See `fakes.isolation` for how.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.isolation import AT_EL0, Leak, Step, Twins
from pkvm.arm64 import registers as r
from pkvm.check.mutants import registers, weakened
from pkvm.hyp.policy import ANDROID, RFC, Policy

MODES = (r.PSTATE_EL1H, r.PSTATE_EL1T, r.PSTATE_EL0T)
ENDIANS = (0, r.SCTLR_E0E, r.SCTLR_EE | r.SCTLR_E0E)
WORDS = st.integers(0, (1 << 64) - 1)


@st.composite
def steps(draw: st.DrawFn, triggers: tuple[str, ...]) -> Step:
    trigger = draw(st.sampled_from(triggers))
    return Step(
        trigger,
        mode=draw(st.sampled_from(MODES if trigger in AT_EL0 else MODES[:2])),
        endian=draw(st.sampled_from(ENDIANS)),
        value=draw(WORDS),
        offset=draw(st.integers(0, 4095)),
        flags=draw(st.integers(0, 3)),
        x0=draw(st.one_of(st.just(0), WORDS)),
        hcr=draw(WORDS),
        nr_lrs=draw(st.one_of(st.integers(0, 5), WORDS)),
        noise=draw(st.integers(0, 1 << 32)),
        visit=draw(st.booleans()),
    )


TWINS: dict[tuple[str, str], Twins] = {}


def twins(policy: Policy, cpu_model: str) -> Twins:
    """Made once: what the machines have been through makes the test harder."""
    key = (policy.name, cpu_model)
    if key not in TWINS:
        TWINS[key] = Twins(policy, cpu_model)
    return TWINS[key]


@pytest.mark.parametrize(
    ("policy", "cpu_model"), [(RFC, "cortex-a72"), (ANDROID, "cortex-a72"), (RFC, "max")]
)
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_spy_and_liar(policy: Policy, cpu_model: str, data: st.DataObject) -> None:
    both = twins(policy, cpu_model)
    for step in data.draw(st.lists(steps(tuple(both.triggers)), min_size=20, max_size=40)):
        both.take(step)


def walk(policy: Policy) -> None:
    """The same 400 steps each time, on machines of their own."""
    both = Twins(policy)
    noise = random.Random(7)
    triggers = sorted(both.triggers)
    for number in range(400):
        trigger = triggers[number % len(triggers)]
        both.take(
            Step(
                trigger,
                mode=noise.choice(MODES if trigger in AT_EL0 else MODES[:2]),
                endian=noise.choice(ENDIANS),
                value=noise.getrandbits(64),
                offset=noise.randrange(4096),
                flags=noise.randrange(4),
                x0=noise.choice((0, noise.getrandbits(64))),
                hcr=noise.getrandbits(64),
                nr_lrs=noise.randrange(6),
                noise=noise.getrandbits(32),
                visit=noise.random() < 0.5,
            )
        )


@pytest.mark.parametrize("policy", [RFC, ANDROID], ids=lambda policy: policy.name)
def test_nothing_leaks_on_the_way(policy: Policy) -> None:
    walk(policy)


@pytest.mark.parametrize("guard", registers.MUTANTS)
def test_spy_or_liar_notices_that_a_guard_is_missing(guard: str) -> None:
    with weakened(guard), pytest.raises(Leak):
        walk(ANDROID)
