# SPDX-License-Identifier: GPL-2.0-or-later
"""P15, P16 and what the other rules say of the secure world's pages: each broken, each seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fakes.doors import SP, Doors
from pkvm.arm64.ffa import Function
from pkvm.arm64.registers import hcr
from pkvm.arm64.stage2 import ANNOTATION_HYP
from pkvm.hyp.host_memory import HOST_PAGE
from pkvm.hyp.policy import ANDROID
from pkvm.hyp.vmemmap import GUEST_OWNED, HOST_OWNED, HOST_SHARED, SECURE_OWNED
from pkvm.machine.host_cpus import HostCpu

SHARED, LENT, FREE = range(3)


class Scene(Doors):
    """A page that is shared with the secure world and one that is lent to it; a second CPU."""

    def __init__(self) -> None:
        super().__init__(policy=ANDROID)
        driver = self.driver()
        self.base = self.pages(3)
        driver.give([(self.pa(SHARED), 1)], SP)
        driver.give([(self.pa(LENT), 1)], SP, Function.FFA_MEM_LEND_64)
        self.machine.host_cpus.slow = False
        self.smc(0xC400_0003, 1, self.pa(FREE), 0)
        assert self.problems() == []

    def pa(self, page: int) -> int:
        return self.base + page * 4096

    @property
    def second(self) -> HostCpu:
        return self.machine.host_cpus.cpus[1]

    def state(self, page: int, state: int) -> None:
        first = self.machine.memory.ram_base
        self.hyp.mem.vmemmap.state[(self.pa(page) - first) >> 12] = state

    def host_entry(self, page: int, entry: int) -> None:
        index, _, _ = self.hyp.mem.host.stage2.find(self.pa(page))
        self.machine.memory.words[index] = entry


def stale_tlb_of_another_cpu(scene: Scene) -> None:
    bus = scene.second.bus
    bus.read(scene.pa(FREE), 8)
    invalidate = type(scene.bus).invalidate
    type(scene.bus).invalidate = lambda self, ipa=None: None  # type: ignore[method-assign]
    try:
        scene.hyp.mem.host_donate_hyp(scene.pa(FREE) >> 12, 1)
    finally:
        type(scene.bus).invalidate = invalidate  # type: ignore[method-assign]


BROKEN: list[tuple[str, Callable[[Scene], object]]] = [
    ("P15", lambda scene: scene.second.bus.attach(None)),
    ("P15", lambda scene: setattr(scene.second, "el", 2)),
    ("P15", lambda scene: setattr(scene.second, "hcr_el2", hcr("VM"))),
    ("P15", lambda scene: setattr(scene.machine.host_cpus.boot, "hcr_el2", hcr("TSC"))),
    ("P16", lambda scene: scene.state(SHARED, HOST_OWNED)),
    ("P16", lambda scene: scene.state(LENT, GUEST_OWNED)),
    ("P6", lambda scene: scene.state(FREE, HOST_SHARED)),
    ("P6", lambda scene: scene.state(FREE, SECURE_OWNED)),
    ("P3", lambda scene: scene.host_entry(LENT, scene.pa(LENT) | HOST_PAGE)),
    ("P4", lambda scene: scene.host_entry(LENT, ANNOTATION_HYP)),
]


@pytest.mark.parametrize(("rule", "break_it"), BROKEN)
def test_what_is_broken_is_seen(rule: str, break_it: Callable[[Scene], object]) -> None:
    scene = Scene()
    break_it(scene)
    assert any(problem.startswith(rule) for problem in scene.problems())


def test_a_translation_that_another_cpu_keeps_is_seen() -> None:
    scene = Scene()
    scene.recorder.watch = None
    stale_tlb_of_another_cpu(scene)
    assert any(problem.startswith("P9: the host-cpu1") for problem in scene.problems())
