# SPDX-License-Identifier: GPL-2.0-or-later
"""The invariants of a transition's pages: each is broken on purpose, and seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from fakes.memory_rig import HANDLE, Rig, RigVm, forget_dma_tlbis
from pkvm.arm64.stage2 import guest_annotation
from pkvm.check.watch import FEW, Watch
from pkvm.events import Transition
from pkvm.hyp.host_memory import HOST_PAGE
from pkvm.hyp.identity_domain import DMA_PAGE
from pkvm.hyp.vmemmap import GUEST_OWNED, HOST_OWNED, HOST_SHARED, HYP_OWNED

GFN = 0x40000
PRIVATE, SHARED, FREE, OF_HYP = 0, 1, 2, 3
"""Page numbers; the guest has its pages at the frames of the same number from GFN."""


@dataclass
class Scene:
    """A VM with a private and a shared page, a page of EL2's, and who watches."""

    rig: Rig
    vm: RigVm
    watch: Watch

    def look(self, page: int, npages: int = 1) -> list[str]:
        pfn = self.rig.first_pfn + page
        event = Transition("any", pfn << 12, npages, HANDLE, (GFN + page) << 12)
        return self.watch.look(event)

    def pa(self, page: int) -> int:
        return (self.rig.first_pfn + page) << 12

    def state(self, page: int, value: int) -> None:
        self.rig.mem.vmemmap.state[page] = value

    def host(self, page: int, entry: int) -> None:
        self.rig.memory.words[self.rig.mem.host.stage2.find(self.pa(page))[0]] = entry

    def dma(self, page: int, entry: int) -> None:
        self.rig.memory.words[self.rig.mem.host.dma.find(self.pa(page))[0]] = entry

    def guest(self, page: int, entry: int) -> None:
        self.rig.memory.words[self.vm.stage2.find((GFN + page) << 12)[0]] = entry


@pytest.fixture
def scene() -> Scene:
    rig = Rig()
    vm = rig.vm(HANDLE)
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 2)
    rig.mem.guest_share_host(vm, (GFN + 1) << 12, 1)
    rig.mem.host_donate_hyp(rig.first_pfn + OF_HYP, 1)
    rig.recorder.watch = None
    scene = Scene(rig, vm, Watch(rig.mem, rig.find_vm, lambda: rig.vms))
    for page in (PRIVATE, SHARED, FREE, OF_HYP):
        assert scene.look(page) == []
    return scene


def private_page_forgotten(s: Scene) -> None:
    s.guest(PRIVATE, 0)


def stale_tlb(s: Scene) -> None:
    s.rig.host_bus.invalidate = lambda ipa=None: None  # type: ignore[method-assign]
    s.rig.host_bus.read(s.pa(PRIVATE + 4), 1)
    s.rig.mem.host_donate_guest(s.vm, s.rig.first_pfn + 4, GFN + 4, 1)


def stale_dma_tlb(s: Scene) -> None:
    s.rig.dma_bus.read(s.pa(SHARED), 1)
    forget_dma_tlbis(s.rig)
    s.rig.mem.guest_unshare_host(s.vm, (GFN + SHARED) << 12, 1)


def not_wiped(s: Scene) -> None:
    s.rig.memory.write(s.pa(PRIVATE) + 4000, b"secret")
    s.rig.mem.zero = lambda pa, nbytes: None  # type: ignore[method-assign]
    s.rig.mem.reclaim_dying_guest_page(s.vm, GFN + PRIVATE)


def refcount_of_a_table(s: Scene) -> None:
    index = s.vm.stage2.find(GFN << 12)[0]
    s.rig.mem.vmemmap.refcount[index >> 9] += 1


def table_of_the_hosts(s: Scene) -> None:
    index = s.rig.mem.host.dma.find(s.pa(FREE))[0]
    s.rig.mem.vmemmap.state[index >> 9] = HOST_OWNED


def share_count(s: Scene) -> None:
    s.rig.mem.vmemmap.share_count[FREE] = 1


def pin(s: Scene) -> None:
    s.rig.mem.vmemmap.refcount[PRIVATE] = 1


BREAKS: list[tuple[str, int, Callable[[Scene], None]]] = [
    ("P1", PRIVATE, private_page_forgotten),
    ("P1", FREE, lambda s: s.state(FREE, GUEST_OWNED)),
    ("P2", PRIVATE, lambda s: s.state(PRIVATE, HOST_OWNED)),
    ("P2", SHARED, lambda s: s.state(SHARED, HOST_SHARED)),
    ("P2", FREE, lambda s: s.state(FREE, 0x22)),
    ("P2", PRIVATE, lambda s: s.guest(PRIVATE, s.pa(PRIVATE) | HOST_PAGE | 1 << 55)),
    ("P3", PRIVATE, lambda s: s.host(PRIVATE, s.pa(PRIVATE) | HOST_PAGE)),
    ("P3", PRIVATE, lambda s: s.host(PRIVATE, 0)),
    ("P3", FREE, lambda s: s.host(FREE, guest_annotation(HANDLE, 5))),
    ("P3", FREE, lambda s: s.host(FREE, s.pa(PRIVATE) | HOST_PAGE)),
    ("P4", PRIVATE, lambda s: s.host(PRIVATE, guest_annotation(HANDLE, GFN + 1))),
    ("P4", PRIVATE, lambda s: s.host(PRIVATE, guest_annotation(HANDLE + 1, GFN))),
    ("P4", OF_HYP, lambda s: s.host(OF_HYP, guest_annotation(HANDLE, GFN))),
    ("P5", PRIVATE, refcount_of_a_table),
    ("P5", FREE, table_of_the_hosts),
    ("P6", FREE, share_count),
    ("P7", PRIVATE, not_wiped),
    ("P8", PRIVATE, lambda s: s.dma(PRIVATE, s.pa(PRIVATE) | DMA_PAGE)),
    ("P8", FREE, lambda s: s.dma(FREE, 0)),
    ("P8", FREE, lambda s: s.dma(FREE, s.pa(FREE) | HOST_PAGE)),
    ("P9", PRIVATE + 4, stale_tlb),
    ("P9", SHARED, stale_dma_tlb),
    ("refcounts", PRIVATE, pin),
]


@pytest.mark.parametrize(("rule", "page", "break_it"), BREAKS)
def test_what_is_broken_is_seen(
    scene: Scene, rule: str, page: int, break_it: Callable[[Scene], None]
) -> None:
    break_it(scene)
    problems = scene.look(page)
    assert any(problem.startswith(f"{rule}: ") for problem in problems), problems


def test_what_comes_back_is_looked_at_once(scene: Scene) -> None:
    """What the host writes afterwards is its own business."""
    scene.rig.mem.reclaim_dying_guest_page(scene.vm, GFN)
    assert scene.look(PRIVATE) == []
    scene.rig.memory.write(scene.pa(PRIVATE), b"the host's")
    assert scene.look(PRIVATE) == []


def test_many_pages(scene: Scene) -> None:
    mem, first = scene.rig.mem, scene.rig.first_pfn + 512
    mem.host_donate_guest(scene.vm, first, GFN + 512, 512)
    assert scene.look(512, 512) == []
    scene.rig.memory.write(scene.pa(512 + 77), b"secret")
    zero = mem.zero
    mem.zero = lambda pa, nbytes: None  # type: ignore[method-assign]
    mem.reclaim_dying_guest_range(scene.vm, GFN + 512, 512)
    assert scene.look(512, 512) == [f"P7: PA {scene.pa(512 + 77):#x} was private and is not zero"]
    mem.zero = zero  # type: ignore[method-assign]
    assert scene.look(512, 512) == []
    scene.state(1000, HYP_OWNED)
    assert scene.look(512, FEW + 1), "a look at everything"


def test_a_host_that_is_not_protected() -> None:
    rig = Rig(protected=False)
    rig.mem.host_share_guest(rig.vm(), rig.first_pfn, GFN, 1, 7)
    rig.mem.host_donate_hyp(rig.first_pfn + 9, 100)
    rig.sound()
