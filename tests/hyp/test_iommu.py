# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's paged domains, by its hypercalls: what is mapped is pinned, what is not the host's own
is not mapped, and the device reaches just that."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fakes.el2_rig import El2
from fakes.memory_rig import Rig
from pkvm.arm64.smmu import ABORT_STE
from pkvm.check.invariants import check, check_hyp
from pkvm.hyp.abi import SMMU_EVENTS_A_CALL, HostCall, HostSmmuEvents
from pkvm.hyp.errors import Errno
from pkvm.hyp.host_dma import Domain
from pkvm.hyp.policy import ANDROID, RFC, UPSTREAM, Policy
from pkvm.machine.machine import DMA_BASE, DMA_STREAM, SMMU_BASE
from pkvm.machine.smmu_streams import StreamMaster
from pkvm.machine.stage2 import Stage2Fault

PAGE = 4096
DOMAIN = 3
IOVA = 0x1_2345_6000
R, W, MMIO = 1, 2, 16

ALLOC, FREE, TOPUP = (
    HostCall.IOMMU_ALLOC_DOMAIN,
    HostCall.IOMMU_FREE_DOMAIN,
    HostCall.IOMMU_TOPUP,
)
ATTACH, DETACH = HostCall.IOMMU_ATTACH, HostCall.IOMMU_DETACH
MAP, UNMAP, EVENTS = HostCall.IOMMU_MAP, HostCall.IOMMU_UNMAP, HostCall.IOMMU_EVENTS


def make_domain(el2: El2, number: int = DOMAIN, tables: int = 4) -> None:
    el2.call(ALLOC, number, el2.pages(2, align=2 * PAGE))
    el2.call(TOPUP, number, el2.link([el2.pages() for _ in range(tables)]), tables)


@pytest.fixture
def el2() -> Iterator[El2]:
    el2 = El2()
    yield el2
    assert check_hyp(el2.hyp) == []
    el2.machine.close()


@pytest.fixture
def attached(el2: El2) -> El2:
    make_domain(el2)
    el2.call(ATTACH, DOMAIN, DMA_STREAM)
    return el2


def faults(device: StreamMaster, ipa: int) -> bool:
    try:
        device.read(ipa, 4)
    except Stage2Fault:
        return True
    return False


def test_a_device_reaches_what_is_mapped_and_nothing_else(attached: El2) -> None:
    device, page = attached.device(), attached.pages(2)
    attached.bus.write(page + PAGE, b"second")
    assert faults(device, page), "a paged domain is no identity"
    attached.call(MAP, DOMAIN, IOVA, page, 2 * PAGE, R | W)
    assert device.read(IOVA + PAGE, 6) == b"second"
    device.write(IOVA + PAGE - 2, b"from device")
    assert attached.bus.read(page + PAGE - 2, 11) == b"from device"
    assert faults(device, IOVA - 4)
    assert faults(device, IOVA + 2 * PAGE)
    assert attached.call(UNMAP, DOMAIN, IOVA, PAGE) == PAGE
    assert faults(device, IOVA)
    device.read(IOVA + PAGE, 4)
    assert attached.call(UNMAP, DOMAIN, 0, 1 << 40) == PAGE
    assert faults(device, IOVA + PAGE)
    assert attached.call(UNMAP, DOMAIN, IOVA, PAGE) == 0


@pytest.mark.parametrize(("prot", "reads", "writes"), [(R, True, False), (W, False, True)])
def test_permissions(attached: El2, prot: int, reads: bool, writes: bool) -> None:
    device = attached.device()
    attached.call(MAP, DOMAIN, IOVA, attached.pages(), PAGE, prot)
    assert faults(device, IOVA) != reads
    if writes:
        device.write(IOVA, b"w")
    else:
        with pytest.raises(Stage2Fault):
            device.write(IOVA, b"w")


@pytest.mark.parametrize(
    ("policy", "donate"), [(RFC, errno.EPERM), (UPSTREAM, errno.EPERM), (ANDROID, errno.EINVAL)]
)
def test_a_pinned_page_is_neither_donated_nor_shared(policy: Policy, donate: int) -> None:
    rig = Rig(policy=policy.memory)
    vm, domain = rig.vm(), new_domain(rig)
    pfn = rig.first_pfn
    for _ in range(2):  # two references, of which one is dropped at first
        rig.mem.host_map_dma(domain, IOVA + _ * PAGE, pfn << 12, PAGE, R)
    for left in (1, 0):
        with rig.refused(donate, "refcount"):
            rig.mem.host_donate_guest(vm, pfn, 0x40000, 1)
        with rig.refused(donate, "refcount"):
            rig.mem.host_donate_guest(vm, pfn - 0, 0x40000, 3)
        with rig.refused(donate, "refcount"):
            rig.mem.host_donate_hyp(pfn, 1)
        with rig.refused(donate, "refcount"):
            rig.mem.host_share_hyp(pfn)
        with rig.refused(donate, "refcount"):
            rig.mem.host_share_ffa(pfn, 1)
        with rig.refused(Errno.EPERM, "refcount"):
            rig.mem.host_share_guest(vm, pfn, 0x50000, 1, 7)
        rig.sound()
        rig.mem.host_unmap_dma(domain, IOVA + left * PAGE, PAGE)
    rig.mem.host_donate_guest(vm, pfn, 0x40000, 1)
    with rig.refused(Errno.EPERM, "host_state"):
        rig.mem.host_map_dma(domain, IOVA, pfn << 12, PAGE, R)
    rig.sound()


def new_domain(rig: Rig, number: int = DOMAIN) -> Domain:
    root = rig.pages(2)
    rig.mem.host_donate_hyp(root >> 12, 2)
    memcache = rig.mem.new_memcache()
    stage2 = rig.mem.new_domain_stage2(root, number, memcache)
    domain = rig.mem.domains[number] = Domain(number, stage2, memcache)
    memcache.topup(rig.link([rig.pages(1) for _ in range(6)]), 6)
    return domain


def test_only_pages_of_the_hosts_own_are_mapped(attached: El2) -> None:
    shared, carveout = attached.shared_page(), attached.hyp.mem.carveout[0]
    for pa in (shared, carveout, attached.firmware_pa, DMA_BASE, SMMU_BASE):
        attached.assert_refused(errno.EPERM, MAP, DOMAIN, IOVA, pa, PAGE, R)
    end = attached.machine.memory.ram_end
    attached.assert_refused(errno.EINVAL, MAP, DOMAIN, IOVA, end - PAGE, 2 * PAGE, R)
    page = attached.pages(2)
    attached.call(HostCall.HOST_SHARE_HYP, (page >> 12) + 1)
    attached.assert_refused(errno.EPERM, MAP, DOMAIN, IOVA, page, 2 * PAGE, R)
    attached.call(MAP, DOMAIN, IOVA, page, PAGE, R)
    attached.assert_refused(errno.EEXIST, MAP, DOMAIN, IOVA, page, PAGE, R)
    attached.assert_refused(errno.EEXIST, MAP, DOMAIN, IOVA - PAGE, attached.pages(2), 2 * PAGE, R)


@pytest.mark.parametrize(
    ("iova", "nbytes", "prot"),
    [
        (IOVA + 1, PAGE, R),
        (IOVA, PAGE - 1, R),
        (IOVA, 0, R),
        (IOVA, 1 << 63, R),
        (1 << 40, PAGE, R),
        ((1 << 40) - PAGE, 2 * PAGE, R),
        (IOVA, PAGE, 0),
        (IOVA, PAGE, 4),
        (IOVA, PAGE, R | 32),
        (IOVA, PAGE, R | 1 << 40),
    ],
)
def test_numbers_that_cannot_be(attached: El2, iova: int, nbytes: int, prot: int) -> None:
    attached.assert_refused(errno.EINVAL, MAP, DOMAIN, iova, attached.pages(), nbytes, prot)
    if prot == R:
        attached.assert_refused(errno.EINVAL, UNMAP, DOMAIN, iova, nbytes)


def test_domains_and_streams_that_are_not_there(el2: El2) -> None:
    root, page = el2.pages(2, align=2 * PAGE), el2.pages()
    for number in (0, 65, 1 << 63):
        el2.assert_refused(errno.EINVAL, ALLOC, number, root)
    for call, args in (
        (FREE, ()), (TOPUP, (page, 1)), (ATTACH, (DMA_STREAM,)), (DETACH, (DMA_STREAM,)),
        (MAP, (IOVA, page, PAGE, R)), (UNMAP, (IOVA, PAGE)),
    ):  # fmt: skip
        el2.assert_refused(errno.ENOENT, call, DOMAIN, *args)
    for pa in (root + PAGE, 8, DMA_BASE, el2.hyp.mem.carveout[0]):
        el2.assert_refused(errno.ENOMEM, ALLOC, DOMAIN, pa)
    make_domain(el2)
    el2.assert_refused(errno.EEXIST, ALLOC, DOMAIN, el2.pages(2, align=2 * PAGE))
    for stream in (0, 40, 64, 1 << 40):
        el2.assert_refused(errno.ENOENT, ATTACH, DOMAIN, stream)
    el2.assert_refused(errno.EINVAL, DETACH, DOMAIN, DMA_STREAM)
    el2.call(ATTACH, DOMAIN, DMA_STREAM)
    make_domain(el2, DOMAIN + 1)
    el2.assert_refused(errno.EBUSY, ATTACH, DOMAIN + 1, DMA_STREAM)
    el2.assert_refused(errno.EINVAL, DETACH, DOMAIN + 1, DMA_STREAM)
    el2.assert_refused(errno.EBUSY, FREE, DOMAIN)


def test_a_stream_that_el2_has_blocked_is_not_the_hosts_to_move(el2: El2) -> None:
    make_domain(el2)
    smmu = el2.hyp.mem.smmu
    assert smmu is not None
    smmu.configure(DMA_STREAM, ABORT_STE)
    el2.assert_refused(errno.EBUSY, ATTACH, DOMAIN, DMA_STREAM)
    el2.assert_refused(errno.EINVAL, DETACH, DOMAIN, DMA_STREAM)
    assert faults(el2.device(), el2.pages())


def test_tables_are_paid_by_the_host_and_come_back(el2: El2) -> None:
    root = el2.pages(2, align=2 * PAGE)
    el2.call(ALLOC, DOMAIN, root)
    page, tables = el2.pages(), [el2.pages(), el2.pages()]
    el2.assert_refused(errno.ENOMEM, MAP, DOMAIN, IOVA, page, PAGE, R)
    el2.call(TOPUP, DOMAIN, el2.link(tables), 2)
    el2.call(MAP, DOMAIN, IOVA, page, PAGE, R)
    el2.call(ATTACH, DOMAIN, DMA_STREAM)
    device = el2.device()
    device.read(IOVA, 4)
    el2.call(DETACH, DOMAIN, DMA_STREAM)
    assert faults(device, IOVA)
    device.read(page, 4)
    found, head = [], el2.call(FREE, DOMAIN)
    while head:
        found.append(head)
        head = el2.bus.read_u64(head)
    assert sorted(found) == sorted([root, root + PAGE, *tables])
    el2.call(HostCall.HOST_SHARE_HYP, page >> 12)
    el2.call(ALLOC, DOMAIN, root)
    el2.call(ATTACH, DOMAIN, DMA_STREAM)
    assert faults(device, IOVA), "the VMID's old translations are gone"


def test_a_devices_registers_as_a_target_taint_it_for_ever(attached: El2) -> None:
    devices = attached.hyp.mem.devices
    attached.assert_refused(errno.EPERM, MAP, DOMAIN, IOVA, SMMU_BASE, PAGE, R | MMIO)
    attached.assert_refused(errno.EPERM, MAP, DOMAIN, IOVA, attached.pages(), PAGE, R | MMIO)
    attached.assert_refused(errno.EPERM, MAP, DOMAIN, IOVA, DMA_BASE, 2 * PAGE, R | MMIO)
    assert not devices.is_tainted(0)
    attached.call(MAP, DOMAIN, IOVA, DMA_BASE, PAGE, R | W | MMIO)
    attached.device().write_u64(IOVA, 0x1234)
    assert attached.bus.read_u64(DMA_BASE) == 0x1234
    attached.call(UNMAP, DOMAIN, IOVA, PAGE)
    attached.call(DETACH, DOMAIN, DMA_STREAM)
    attached.call(FREE, DOMAIN)
    assert devices.is_tainted(0)


def test_the_host_reads_its_devices_events(attached: El2) -> None:
    page, device = attached.shared_page(), attached.device()
    assert attached.call(EVENTS, page) == 0
    for number in range(200):
        with pytest.raises(Stage2Fault):
            device.write(number * PAGE + 8, b"x")
    with pytest.raises(Stage2Fault):
        attached.machine.smmu.master(9, "unknown").read(0, 1)  # type: ignore[union-attr]
    seen = []
    while count := attached.call(EVENTS, page):
        assert count <= SMMU_EVENTS_A_CALL
        for index in range(count):
            at = page + HostSmmuEvents.RECORDS + index * 32
            seen.append([attached.bus.read_u64(at + 8 * word) for word in range(4)])
    assert seen == [[0x10, DMA_STREAM, 0, number * PAGE + 8] for number in range(128)]
    assert attached.bus.read_u64(page + HostSmmuEvents.OVERFLOWS) == 1
    attached.assert_refused(errno.EPERM, EVENTS, attached.pages())
    attached.assert_refused(errno.EPERM, EVENTS, attached.hyp.mem.carveout[0])
    attached.assert_refused(errno.EINVAL, EVENTS, page + 8)


def test_without_protection_or_an_smmu_there_are_no_such_calls() -> None:
    el2 = El2(protected=False)
    for call in (ALLOC, FREE, TOPUP, ATTACH, DETACH, MAP, UNMAP, EVENTS):
        assert el2.hyp.host_call(0xC600_0000 + call)[0] == -1
    el2.machine.close()


class Pins(RuleBasedStateMachine):
    """Maps, unmaps and transitions in any order: the model is who has what, and a page is mapped
    only while it is the host's own."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(16 << 20)
        self.vm = self.rig.vm()
        self.domains = [new_domain(self.rig, 1), new_domain(self.rig, 2)]
        self.maps: dict[tuple[int, int], int] = {}
        self.owned = set(range(6))
        self.device = self.rig.dma_bus

    @rule(domain=st.integers(0, 1), slot=st.integers(0, 5), page=st.integers(0, 5))
    def map(self, domain: int, slot: int, page: int) -> None:
        free = (domain, slot) not in self.maps
        pa = (self.rig.first_pfn + page) << 12
        args = (self.domains[domain], slot * PAGE, pa, PAGE, R)
        if page in self.owned and free:
            self.rig.mem.host_map_dma(*args)
            self.maps[domain, slot] = page
            return
        with self.rig.refused(Errno.EPERM if page not in self.owned else Errno.EEXIST):
            self.rig.mem.host_map_dma(*args)

    @rule(domain=st.integers(0, 1), slot=st.integers(0, 5), pages=st.integers(1, 3))
    def unmap(self, domain: int, slot: int, pages: int) -> None:
        gone = [key for key in self.maps if key[0] == domain and slot <= key[1] < slot + pages]
        nbytes = self.rig.mem.host_unmap_dma(self.domains[domain], slot * PAGE, pages * PAGE)
        assert nbytes == len(gone) * PAGE
        for key in gone:
            del self.maps[key]

    @rule(page=st.integers(0, 5))
    def donate_or_reclaim(self, page: int) -> None:
        pfn, gfn = self.rig.first_pfn + page, 0x40000 + page
        if page not in self.owned:
            assert self.rig.mem.reclaim_dying_guest_range(self.vm, gfn, 1) == 1
            self.owned.add(page)
            return
        if page not in self.maps.values():
            self.rig.mem.host_donate_guest(self.vm, pfn, gfn, 1)
            self.owned.discard(page)
            return
        with self.rig.refused(Errno.EPERM, "refcount"):
            self.rig.mem.host_donate_guest(self.vm, pfn, gfn, 1)

    @invariant()
    def sound(self) -> None:
        assert check(self.rig.mem, self.rig.vms) == []


TestPins = Pins.TestCase
TestPins.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
