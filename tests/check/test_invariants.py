# SPDX-License-Identifier: GPL-2.0-or-later
"""Each invariant is broken on purpose, and seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from fakes.memory_rig import DEVICE, HANDLE, SMMU, Rig, RigVm, forget_dma_tlbis
from pkvm.arm64.stage2 import ATTR_DEVICE_RW, ATTR_NORMAL_RWX, TABLE_OR_PAGE, guest_annotation
from pkvm.check.invariants import MAX_PROBLEMS, PrivacyWatch, Snapshot, check
from pkvm.hyp.abi import PROT_RWX
from pkvm.hyp.host_memory import HOST_PAGE
from pkvm.hyp.identity_domain import DMA_PAGE
from pkvm.hyp.vmemmap import (
    GUEST_OWNED,
    GUEST_SHARED_WITH_HOST,
    HOST_OWNED,
    HOST_SHARED,
    HOST_SHARED_WITH_HYP,
    HYP_OWNED,
)

GFN = 0x40000
PRIVATE, SHARED, LENT, WITH_HYP, FREE = range(5)
"""Page numbers of the scene."""


@dataclass
class Scene:
    """A protected VM with a private and a shared page, one that borrows, a page shared with EL2."""

    rig: Rig
    vm: RigVm
    borrower: RigVm

    def pa(self, page: int) -> int:
        return (self.rig.first_pfn + page) << 12

    def host_put(self, page: int, entry: int) -> None:
        """Write the host's leaf of a page, with no rule kept."""
        self.poke(self.rig.mem.host.stage2.find(self.pa(page))[0], entry)

    def dma_put(self, page: int, entry: int) -> None:
        self.poke(self.rig.mem.host.dma.find(self.pa(page))[0], entry)

    def poke(self, index: int, entry: int) -> None:
        self.rig.memory.words[index] = entry


@pytest.fixture
def scene() -> Scene:
    rig = Rig()
    vm, borrower = rig.vm(HANDLE), rig.vm(HANDLE + 1)
    first = rig.first_pfn
    rig.mem.host_donate_guest(vm, first + PRIVATE, GFN, 2)
    rig.mem.guest_share_host(vm, (GFN + 1) << 12, 1)
    rig.mem.host_share_guest(borrower, first + LENT, GFN, 1, PROT_RWX)
    rig.mem.host_share_hyp(first + WITH_HYP)
    rig.host_bus.read((first + FREE) << 12, 8)
    assert check(rig.mem, rig.vms) == []
    rig.recorder.watch = None
    return Scene(rig, vm, borrower)


def state(page: int, value: int) -> Callable[[Scene], None]:
    def break_it(scene: Scene) -> None:
        scene.rig.mem.vmemmap.state[page] = value

    return break_it


def two_owners(scene: Scene) -> None:
    scene.borrower.stage2.put((GFN + 9) << 12, scene.pa(PRIVATE) | HOST_PAGE)


def guest_maps_no_ram(scene: Scene) -> None:
    scene.vm.stage2.put((GFN + 9) << 12, DEVICE | HOST_PAGE)


def strange_guest_entry(scene: Scene) -> None:
    scene.vm.stage2.put((GFN + 9) << 12, 0x3000_0000_0000_0002)


def wrong_guest_state(scene: Scene) -> None:
    index, entry, _ = scene.vm.stage2.find(GFN << 12)
    scene.vm.stage2.set_state(index, entry, 1 << 55)


def host_maps_a_private_page(scene: Scene) -> None:
    scene.host_put(PRIVATE, scene.pa(PRIVATE) | HOST_PAGE)


def host_leaf_of_a_private_page_is_zero(scene: Scene) -> None:
    scene.host_put(PRIVATE, 0)


def host_lost_a_page_of_its_own(scene: Scene) -> None:
    scene.host_put(FREE, guest_annotation(HANDLE, 5))


def host_leaf_is_not_identity(scene: Scene) -> None:
    scene.host_put(FREE, scene.pa(FREE + 1) | HOST_PAGE)


def host_leaf_is_read_only(scene: Scene) -> None:
    scene.host_put(FREE, scene.pa(FREE) | HOST_PAGE & ~0x80)


def host_executes_mmio(scene: Scene) -> None:
    scene.rig.mem.host.stage2.put(DEVICE, DEVICE | ATTR_NORMAL_RWX, 2)


def host_reaches_the_smmu(scene: Scene) -> None:
    scene.rig.mem.host.stage2.put(SMMU, 0)


def host_maps_the_smmu(scene: Scene) -> None:
    stage2 = scene.rig.mem.host.stage2
    stage2.put(SMMU, SMMU | ATTR_DEVICE_RW | TABLE_OR_PAGE)


def annotated_mmio(scene: Scene) -> None:
    scene.rig.mem.host.stage2.put(DEVICE, 0x2000_0000_0000_0002)


def annotation_of_another_vm(scene: Scene) -> None:
    scene.host_put(PRIVATE, guest_annotation(HANDLE + 1, GFN))


def annotation_of_another_frame(scene: Scene) -> None:
    scene.host_put(PRIVATE, guest_annotation(HANDLE, GFN + 1))


def table_of_the_hosts(scene: Scene) -> None:
    scene.rig.mem.vmemmap.state[(scene.vm.stage2.root >> 12) - scene.rig.first_pfn] = HOST_OWNED


def table_refcount(scene: Scene) -> None:
    scene.rig.mem.vmemmap.refcount[(scene.vm.stage2.root >> 12) - scene.rig.first_pfn] += 1


def empty_table(scene: Scene) -> None:
    table = scene.vm.memcache.alloc()
    root = (scene.vm.stage2.root - scene.rig.memory.ram_base) >> 3
    scene.poke(root + 7, table | 3)


def table_used_twice(scene: Scene) -> None:
    scene.poke((scene.vm.stage2.root - scene.rig.memory.ram_base >> 3) + 7,
               scene.borrower.memcache.pages()[1] | 3)  # fmt: skip


def memcache_page_not_zero(scene: Scene) -> None:
    scene.rig.memory.write(scene.vm.memcache.pages()[0] + 64, b"left over")


def memcache_page_in_use(scene: Scene) -> None:
    page = (scene.vm.memcache.pages()[0] >> 12) - scene.rig.first_pfn
    scene.rig.mem.vmemmap.refcount[page] = 1


def carveout_page_of_the_hosts(scene: Scene) -> None:
    scene.rig.mem.vmemmap.state[(scene.rig.carveout[0] >> 12) - scene.rig.first_pfn] = 0


def firmware_page_of_the_hosts(scene: Scene) -> None:
    scene.rig.mem.vmemmap.state[(scene.rig.firmware[0] >> 12) - scene.rig.first_pfn] = 0


def share_count(scene: Scene) -> None:
    scene.rig.mem.vmemmap.share_count[LENT] += 1


def dma_maps_a_private_page(scene: Scene) -> None:
    scene.dma_put(PRIVATE, scene.pa(PRIVATE) | DMA_PAGE)


def dma_misses_a_page(scene: Scene) -> None:
    scene.dma_put(FREE, 0)


def dma_maps_a_device(scene: Scene) -> None:
    scene.rig.mem.host.dma.put(DEVICE, DEVICE | DMA_PAGE)


def dma_leaf_is_executable(scene: Scene) -> None:
    scene.dma_put(FREE, scene.pa(FREE) | ATTR_NORMAL_RWX | TABLE_OR_PAGE)


def stale_host_tlb(scene: Scene) -> None:
    """What a forgotten TLBI looks like."""
    bus = scene.rig.host_bus
    bus.read(scene.pa(FREE), 8)
    bus.invalidate = lambda ipa=None: None  # type: ignore[method-assign]
    scene.rig.mem.host_donate_guest(scene.vm, scene.rig.first_pfn + FREE, GFN + 7, 1)


def stale_dma_tlb(scene: Scene) -> None:
    scene.rig.dma_bus.read(scene.pa(SHARED), 8)
    forget_dma_tlbis(scene.rig)
    scene.rig.mem.guest_unshare_host(scene.vm, (GFN + 1) << 12, 1)


def tlb_leads_astray(scene: Scene) -> None:
    scene.rig.host_bus.read(scene.pa(FREE), 8)
    scene.rig.host_bus._loads.pages[scene.pa(FREE) >> 12] = 4096


def stale_walk(scene: Scene) -> None:
    """What a forgotten flush of EL2's own cache looks like."""
    stage2 = scene.vm.stage2
    stage2.leaf(GFN << 12)
    stage2.walks[GFN >> 9] += 512


def walk_to_nowhere(scene: Scene) -> None:
    scene.rig.mem.host.stage2.walks[0] = 0


def refcount_of_a_host_page(scene: Scene) -> None:
    scene.rig.mem.vmemmap.refcount[FREE] = 1


BREAKS: list[tuple[str, Callable[[Scene], None]]] = [
    ("P1", state(PRIVATE, HOST_OWNED)),
    ("P1", state(FREE, GUEST_OWNED)),
    ("P1", two_owners),
    ("P1", guest_maps_no_ram),
    ("P2", strange_guest_entry),
    ("P2", wrong_guest_state),
    ("P2", state(SHARED, GUEST_OWNED)),
    ("P2", state(LENT, HOST_OWNED)),
    ("P2", state(FREE, GUEST_SHARED_WITH_HOST)),
    ("P2", state(FREE, 0x22)),
    ("P3", host_maps_a_private_page),
    ("P3", host_leaf_of_a_private_page_is_zero),
    ("P3", host_lost_a_page_of_its_own),
    ("P3", host_leaf_is_not_identity),
    ("P3", host_leaf_is_read_only),
    ("P3", host_executes_mmio),
    ("P8", host_reaches_the_smmu),
    ("P8", host_maps_the_smmu),
    ("P3", state(FREE, HYP_OWNED)),
    ("P4", annotation_of_another_vm),
    ("P4", annotation_of_another_frame),
    ("P5", table_of_the_hosts),
    ("P5", table_refcount),
    ("P5", empty_table),
    ("P5", table_used_twice),
    ("P5", memcache_page_not_zero),
    ("P5", memcache_page_in_use),
    ("P5 (own memory)", carveout_page_of_the_hosts),
    ("P5 (own memory)", firmware_page_of_the_hosts),
    ("P6", share_count),
    ("P6", state(FREE, HOST_SHARED)),
    ("P8", dma_maps_a_private_page),
    ("P8", dma_misses_a_page),
    ("P8", dma_maps_a_device),
    ("P8", annotated_mmio),
    ("P3", dma_leaf_is_executable),
    ("P9", stale_host_tlb),
    ("P9", stale_dma_tlb),
    ("P9", tlb_leads_astray),
    ("P9", stale_walk),
    ("P9", walk_to_nowhere),
    ("refcounts", refcount_of_a_host_page),
]


@pytest.mark.parametrize(("rule", "break_it"), BREAKS)
def test_what_is_broken_is_seen(scene: Scene, rule: str, break_it: Callable[[Scene], None]) -> None:
    break_it(scene)
    problems = check(scene.rig.mem, scene.rig.vms)
    assert any(problem.startswith(f"{rule}: ") for problem in problems), problems


def test_a_vm_that_is_left_out_is_missed(scene: Scene) -> None:
    assert any(problem.startswith("P1: ") for problem in check(scene.rig.mem, [scene.borrower]))


def test_one_broken_range_does_not_drown_the_others(scene: Scene) -> None:
    scene.rig.mem.vmemmap.states[1000:3000] = HYP_OWNED
    problems = check(scene.rig.mem, scene.rig.vms)
    for rule in ("P3", "P4", "P8"):
        assert 1 <= sum(problem.startswith(f"{rule}: ") for problem in problems) <= MAX_PROBLEMS


def test_privacy_watch_sees_what_comes_back_full(scene: Scene) -> None:
    watch = PrivacyWatch()
    assert watch.look(scene.rig.mem) == []
    scene.rig.memory.write(scene.pa(PRIVATE), b"secret")
    assert watch.look(scene.rig.mem) == []
    scene.rig.mem.vmemmap.state[PRIVATE] = HOST_OWNED
    assert watch.look(scene.rig.mem) == [
        f"P7: PA {scene.pa(PRIVATE):#x} was private and is not zero"
    ]
    scene.rig.mem.vmemmap.state[PRIVATE] = GUEST_OWNED
    watch.look(scene.rig.mem)
    scene.rig.mem.vmemmap.state[PRIVATE] = HOST_SHARED_WITH_HYP
    scene.rig.memory.zero(scene.pa(PRIVATE), 4096)
    assert watch.look(scene.rig.mem) == []


def test_privacy_watch_allows_the_guests_own_sharing(scene: Scene) -> None:
    watch = PrivacyWatch()
    scene.rig.memory.write(scene.pa(PRIVATE), b"greeting")
    watch.look(scene.rig.mem)
    scene.rig.mem.guest_share_host(scene.vm, GFN << 12, 1)
    assert watch.look(scene.rig.mem) == []
    scene.rig.mem.reclaim_dying_guest_range(scene.vm, 0, 1 << 28)
    assert watch.look(scene.rig.mem) == []


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("carve-out", lambda scene: refcount_of_a_host_page(scene)),
        ("pool", lambda scene: scene.rig.mem.pool.alloc()),
        ("VM 0x1000's memcache", lambda scene: scene.vm.memcache.alloc()),
        ("VM 0x1000's page", lambda scene: wrong_guest_state(scene)),
        ("the host TLB", lambda scene: scene.rig.host_bus.read(scene.pa(LENT), 8)),
        ("the VMID 0 DMA TLB", lambda scene: scene.rig.dma_bus.read(scene.pa(LENT), 8)),
    ],
)
def test_snapshots_tell_what_changed(
    scene: Scene, part: str, change: Callable[[Scene], object]
) -> None:
    before = Snapshot(scene.rig.mem, scene.rig.vms)
    assert before.differences(Snapshot(scene.rig.mem, scene.rig.vms)) == []
    change(scene)
    differences = before.differences(Snapshot(scene.rig.mem, scene.rig.vms))
    assert any(name.startswith(part) for name in differences), differences
