# SPDX-License-Identifier: GPL-2.0-or-later
"""A device of the host's is given to a protected guest, and comes back: who reaches what."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from fakes.device_rig import (
    ASSIGN,
    DEVICE_IPA,
    IOVA,
    MAP_DEVICE,
    PRIVATE,
    PVIOMMU,
    RW,
    VSID,
    DeviceGuest,
    R,
    W,
)
from fakes.el2_rig import PAGE, RAM_IPA, El2
from pkvm.arm64.smccc import INVALID_PARAMETER, SUCCESS, Function, PviommuOp
from pkvm.hyp.abi import HostCall
from pkvm.hyp.policy import ANDROID, RFC, UPSTREAM, Policy
from pkvm.machine.dma import DST, FAULT_IPA, LEN, SRC, STATUS, STATUS_DONE, STATUS_FAULT
from pkvm.machine.machine import DMA_BASE, DMA_STREAM, SG_BASE, SG_STREAM, SMMU_BASE
from pkvm.machine.stage2 import Stage2Fault

INVALID = INVALID_PARAMETER


@pytest.fixture
def guest() -> Iterator[DeviceGuest]:
    guest = DeviceGuest()
    yield guest
    guest.el2.sound()
    guest.el2.machine.close()


@pytest.fixture
def owner(guest: DeviceGuest) -> DeviceGuest:
    """Has the copy engine."""
    guest.assign()
    guest.el2.sound()
    return guest


def register(guest: DeviceGuest, offset: int) -> int:
    return int.from_bytes(guest.el2.machine.memory.read(DMA_BASE + offset, 8), "little")


def test_a_guest_moves_bytes_of_its_own_by_its_device(owner: DeviceGuest) -> None:
    memory = owner.el2.machine.memory
    memory.write(owner.pa(PRIVATE), b"secret of the guest")
    domain = owner.alloc()
    assert owner.map(domain, IOVA, PRIVATE, 2 * PAGE) == (SUCCESS, 2 * PAGE)
    owner.copy(IOVA, IOVA + PAGE, 19)
    assert register(owner, STATUS) == STATUS_FAULT, "it is not attached yet"
    assert owner.attach(domain) == SUCCESS
    owner.el2.sound()
    owner.copy(IOVA, IOVA + PAGE, 19)
    assert register(owner, STATUS) == STATUS_DONE
    assert memory.read(owner.pa(PRIVATE) + PAGE, 19) == b"secret of the guest"
    assert owner.unmap(domain, IOVA, PAGE) == (SUCCESS, PAGE)
    owner.copy(IOVA, IOVA + PAGE, 19)
    assert (register(owner, STATUS), register(owner, FAULT_IPA)) == (STATUS_FAULT, IOVA)
    assert owner.detach(domain) == SUCCESS
    owner.copy(IOVA + PAGE, IOVA + PAGE, 1)
    assert register(owner, STATUS) == STATUS_FAULT


def test_the_host_has_lost_it(owner: DeviceGuest) -> None:
    el2 = owner.el2
    for offset in (0, STATUS, PAGE - 8):
        with pytest.raises(Stage2Fault):
            el2.bus.read_u64(DMA_BASE + offset)
        with pytest.raises(Stage2Fault):
            el2.bus.write_u64(DMA_BASE + offset, 1)
    assert el2.bus.read_u64(SG_BASE) == 0, "its neighbour is the host's still"
    with pytest.raises(Stage2Fault):
        el2.device().read(el2.pages(), 4)
    el2.call(HostCall.IOMMU_ALLOC_DOMAIN, 3, el2.pages(2, align=2 * PAGE))
    el2.assert_refused(errno.EPERM, HostCall.IOMMU_ATTACH, 3, DMA_STREAM)
    el2.assert_refused(errno.EPERM, HostCall.IOMMU_DETACH, 3, DMA_STREAM)
    el2.assert_refused(errno.EPERM, HostCall.IOMMU_MAP, 3, IOVA, DMA_BASE, PAGE, RW | 16)
    domain = owner.alloc()
    assert owner.map(domain, IOVA, PRIVATE) == (SUCCESS, PAGE)
    for number in (65, 72, domain):  # the host's are 1 to 64
        if number != 3:
            el2.assert_refused(errno.ENOENT, HostCall.IOMMU_MAP, number, 0, el2.pages(), PAGE, R)
            el2.assert_refused(errno.ENOENT, HostCall.IOMMU_UNMAP, number, IOVA, PAGE)
            el2.assert_refused(errno.ENOENT, HostCall.IOMMU_FREE_DOMAIN, number)


def test_it_is_reset_on_the_way_to_the_guest_and_back(guest: DeviceGuest) -> None:
    el2 = guest.el2
    for offset, value in ((SRC, 0x1234), (DST, 0x5678), (LEN, 9)):
        el2.bus.write_u64(DMA_BASE + offset, value)
    guest.assign()
    assert [register(guest, offset) for offset in (SRC, DST, LEN)] == [0, 0, 0]
    guest.copy(0x42, 0x43, 1)
    el2.call(HostCall.START_TEARDOWN_VM, guest.handle)
    registers = [el2.bus.read_u64(DMA_BASE + at) for at in (SRC, DST, LEN, STATUS, FAULT_IPA)]
    assert registers == [0] * 5
    page = el2.pages()
    el2.bus.write(page, b"host")
    assert el2.device().read(page, 4) == b"host"


def test_teardown_resets_before_a_page_is_reclaimed(owner: DeviceGuest) -> None:
    """The device reaches nothing of the VM's when the first page of it is the host's."""
    el2 = owner.el2
    domain = owner.alloc()
    assert owner.attach(domain) == SUCCESS
    assert owner.map(domain, IOVA, PRIVATE, 3 * PAGE) == (SUCCESS, 3 * PAGE)
    el2.device().read(IOVA, 4)  # and cached
    el2.assert_refused(errno.EINVAL, HostCall.RECLAIM_DYING_GUEST_PAGE, owner.handle, PRIVATE >> 12)
    el2.call(HostCall.START_TEARDOWN_VM, owner.handle)
    el2.sound()
    with pytest.raises(Stage2Fault):
        el2.device().read(IOVA, 4)
    assert not el2.hyp.mem.domains
    for gfn, nr in ((RAM_IPA >> 12, 8), (0x1_0000_0000 >> 12, 4)):
        el2.call(HostCall.RECLAIM_DYING_GUEST_RANGE, owner.handle, gfn, nr)
    el2.call(HostCall.FINALIZE_TEARDOWN_VM, owner.handle)
    again = DeviceGuest(el2)
    again.assign()
    assert again.attach(again.alloc()) == SUCCESS
    with pytest.raises(Stage2Fault):
        el2.device().read(IOVA, 4)


def test_what_devices_are(owner: DeviceGuest) -> None:
    assert owner.hvc(Function.DEV_REQ_MMIO, DEVICE_IPA) == (SUCCESS, DMA_BASE, 0, 0)
    assert owner.hvc(Function.DEV_REQ_DMA, PVIOMMU, VSID) == (SUCCESS, SMMU_BASE, DMA_STREAM, 0)
    for args in ((PVIOMMU, VSID + 1), (PVIOMMU + 1, VSID), (PVIOMMU, VSID | 1 << 32), (0, 0)):
        assert owner.hvc(Function.DEV_REQ_DMA, *args)[0] == INVALID
    for ipa in (DEVICE_IPA + 8, RAM_IPA, 1 << 40, 1 << 63):
        assert owner.hvc(Function.DEV_REQ_MMIO, ipa)[0] == INVALID
    for number in range(2, 7):
        rest = [int(at == number) for at in range(2, 7)]
        assert owner.hvc(Function.DEV_REQ_MMIO, DEVICE_IPA, *rest)[0] == INVALID
    for number in range(3, 7):
        rest = [int(at == number) for at in range(3, 7)]
        assert owner.hvc(Function.DEV_REQ_DMA, PVIOMMU, VSID, *rest)[0] == INVALID


def test_what_the_host_cannot_give(guest: DeviceGuest) -> None:
    el2, handle = guest.el2, guest.handle
    args = (PVIOMMU, VSID)
    for pa in (0, SMMU_BASE, DMA_BASE + 8, guest.guest.ram, 1 << 63):
        el2.assert_refused(errno.ENOENT, ASSIGN, handle, pa, *args)
    for wrong in (0, handle + 1, 1 << 40):
        el2.assert_refused(errno.ENOENT, ASSIGN, wrong, DMA_BASE, *args)
    for numbers in ((1 << 32, 0), (0, 1 << 32), (1 << 63, 1 << 63)):
        el2.assert_refused(errno.EINVAL, ASSIGN, handle, DMA_BASE, *numbers)
    el2.assert_refused(errno.EPERM, MAP_DEVICE, handle, DMA_BASE, DEVICE_IPA >> 12)
    el2.call(HostCall.IOMMU_ALLOC_DOMAIN, 3, el2.pages(2, align=2 * PAGE))
    el2.call(HostCall.IOMMU_ATTACH, 3, DMA_STREAM)
    el2.assert_refused(errno.EBUSY, ASSIGN, handle, DMA_BASE, *args)
    el2.call(HostCall.IOMMU_DETACH, 3, DMA_STREAM)
    el2.call(HostCall.IOMMU_TOPUP, 3, el2.link([el2.pages() for _ in range(2)]), 2)
    el2.call(HostCall.IOMMU_MAP, 3, IOVA, SG_BASE, PAGE, R | 16)
    el2.call(HostCall.IOMMU_UNMAP, 3, IOVA, PAGE)
    el2.assert_refused(errno.EPERM, ASSIGN, handle, SG_BASE, *args, check_name="tainted")
    el2.call(ASSIGN, handle, DMA_BASE, *args)
    other = DeviceGuest(el2)
    el2.assert_refused(errno.EBUSY, ASSIGN, handle, DMA_BASE, *args)
    el2.assert_refused(errno.EBUSY, ASSIGN, other.handle, DMA_BASE, *args)
    el2.assert_refused(errno.EPERM, MAP_DEVICE, other.handle, DMA_BASE, DEVICE_IPA >> 12)
    el2.assert_refused(errno.EPERM, MAP_DEVICE, handle, SG_BASE, DEVICE_IPA >> 12)
    el2.assert_refused(errno.EINVAL, MAP_DEVICE, handle, DMA_BASE + 8, DEVICE_IPA >> 12)
    for gfn in (1 << 28, 1 << 51, 1 << 63):
        el2.assert_refused(errno.EINVAL, MAP_DEVICE, handle, DMA_BASE, gfn)
    el2.assert_refused(errno.EEXIST, MAP_DEVICE, handle, DMA_BASE, RAM_IPA >> 12)
    el2.call(MAP_DEVICE, handle, DMA_BASE, DEVICE_IPA >> 12)
    el2.assert_refused(errno.EEXIST, MAP_DEVICE, handle, DMA_BASE, (DEVICE_IPA >> 12) + 1)
    el2.call(HostCall.START_TEARDOWN_VM, handle)
    el2.assert_refused(errno.ENOENT, ASSIGN, handle, DMA_BASE, *args)


def test_two_devices_of_one_guest(owner: DeviceGuest) -> None:
    el2 = owner.el2
    el2.assert_refused(errno.EEXIST, ASSIGN, owner.handle, SG_BASE, PVIOMMU, VSID)
    owner.assign(SG_BASE, VSID + 1)
    domain = owner.alloc()
    assert owner.attach(domain) == SUCCESS
    assert owner.attach(domain) == INVALID
    assert owner.attach(domain, VSID + 1) == SUCCESS
    assert owner.map(domain, IOVA, PRIVATE) == (SUCCESS, PAGE)
    for stream in (DMA_STREAM, SG_STREAM):
        assert el2.machine.smmu is not None
        el2.machine.smmu.master(stream, "probe").write(IOVA, b"x")
    assert owner.op(PviommuOp.FREE_DOMAIN, domain)[0] == INVALID
    assert owner.detach(domain) == SUCCESS
    assert owner.detach(domain) == INVALID
    assert owner.detach(domain, VSID + 1) == SUCCESS
    assert owner.op(PviommuOp.FREE_DOMAIN, domain)[0] == SUCCESS
    assert owner.map(domain, IOVA, PRIVATE)[0] == INVALID


def test_a_mapped_page_stays_the_guests(owner: DeviceGuest) -> None:
    domain = owner.alloc()
    relinquish, share = Function.MEM_RELINQUISH, Function.MEM_SHARE
    for at in range(2):  # two references
        assert owner.map(domain, IOVA + at * PAGE, PRIVATE) == (SUCCESS, PAGE)
    for at in range(2):
        assert owner.hvc(relinquish, PRIVATE)[0] == INVALID
        assert owner.el2.refusals()[-1].check == "refcount"
        assert owner.hvc(share, PRIVATE)[0] == INVALID
        assert owner.hvc(share, PRIVATE - PAGE, 3)[0] == INVALID
        owner.el2.sound()
        assert owner.unmap(domain, IOVA + at * PAGE) == (SUCCESS, PAGE)
    assert owner.hvc(share, PRIVATE)[0] == SUCCESS
    assert owner.map(domain, IOVA, PRIVATE)[0] == INVALID, "shared"
    assert owner.hvc(relinquish, PRIVATE + PAGE)[0] == SUCCESS


def test_what_cannot_be_mapped(owner: DeviceGuest) -> None:
    domain = owner.alloc()
    good = (domain, IOVA, PRIVATE, PAGE, RW)
    assert owner.map(*good) == (SUCCESS, PAGE)
    for at, values in enumerate(
        (
            (0, domain + 1, 9, 65, 1 << 63),
            (IOVA, IOVA + 1, 1 << 39, (1 << 39) - PAGE + 1, 1 << 63, (1 << 64) - PAGE),
            (PRIVATE + 8, DEVICE_IPA, 1 << 40, 1 << 63, (1 << 64) - PAGE),
            (0, 1, PAGE + 1, 1 << 40, 1 << 63, (1 << 64) - PAGE),
            (0, 4, 16 | RW, 64 | RW, 1 << 63 | R),
        )
    ):
        for value in values:
            args = [domain, IOVA + 8 * PAGE, PRIVATE, PAGE, RW]
            args[at] = value
            assert owner.op(PviommuOp.MAP, *args)[0] == INVALID, args
    assert owner.op(PviommuOp.MAP, domain, IOVA - PAGE, PRIVATE, 2 * PAGE, R)[0] == INVALID
    for wrong in ((domain, IOVA + 1, PAGE), (domain, IOVA, 0), (domain, 1 << 39, PAGE)):
        assert owner.op(PviommuOp.UNMAP, *wrong)[0] == INVALID
    assert owner.unmap(domain, 0, 1 << 39) == (SUCCESS, PAGE)
    for op in (6, 7, 1 << 32, 1 << 63):
        assert owner.hvc(Function.PVIOMMU_OP, op)[0] == INVALID
    assert owner.op(PviommuOp.ATTACH, PVIOMMU, VSID, 1, domain)[0] == INVALID, "a PASID"


def test_what_is_not_there_yet_comes_first(owner: DeviceGuest) -> None:
    """The host is asked for each page, then the call is executed again."""
    domain, hole = owner.alloc(), RAM_IPA + 8 * PAGE
    assert owner.map(domain, IOVA, hole - PAGE, 3 * PAGE) == (SUCCESS, 3 * PAGE)
    assert owner.asked == [hole, hole + PAGE]


def test_a_call_maps_256_pages(guest: DeviceGuest) -> None:
    big = DeviceGuest(guest.el2, ram_pages=300)
    domain = big.alloc()
    assert big.map(domain, IOVA, RAM_IPA, 300 * PAGE) == (SUCCESS, 256 * PAGE)
    rest = 44 * PAGE
    assert big.map(domain, IOVA + 256 * PAGE, RAM_IPA + 256 * PAGE, rest) == (SUCCESS, rest)
    assert big.unmap(domain, IOVA, 300 * PAGE) == (SUCCESS, 256 * PAGE)
    assert big.unmap(domain, IOVA, 300 * PAGE) == (SUCCESS, rest)
    assert big.unmap(domain, IOVA, 300 * PAGE) == (SUCCESS, 0)


def test_domains_are_counted_and_paid_by_the_host(guest: DeviceGuest) -> None:
    poor = DeviceGuest(guest.el2, tables=4)
    for number in range(1, 9):
        assert poor.alloc() == number
    assert poor.op(PviommuOp.ALLOC_DOMAIN)[0] == INVALID
    for number in range(1, 9):
        assert poor.map(number, IOVA, PRIVATE) == (SUCCESS, PAGE)
    guest.el2.sound()
    poor.guest.end()
    assert not guest.el2.hyp.mem.domains


def test_two_guests_have_their_own(owner: DeviceGuest) -> None:
    other = DeviceGuest(owner.el2)
    other.assign(SG_BASE)
    mine, theirs = owner.alloc(), other.alloc()
    assert mine == theirs == 1
    assert owner.map(mine, IOVA, PRIVATE) == (SUCCESS, PAGE)
    assert other.map(theirs, IOVA, PRIVATE) == (SUCCESS, PAGE)
    assert owner.attach(mine) == other.attach(theirs) == SUCCESS
    smmu = owner.el2.machine.smmu
    assert smmu is not None
    smmu.master(DMA_STREAM, "mine").write(IOVA, b"mine")
    smmu.master(SG_STREAM, "theirs").write(IOVA, b"theirs")
    memory = owner.el2.machine.memory
    assert memory.read(owner.pa(PRIVATE), 6) == b"mine\0\0"
    assert memory.read(other.pa(PRIVATE), 6) == b"theirs"


def test_the_host_learns_nothing_of_a_guests_faults(owner: DeviceGuest) -> None:
    el2 = owner.el2
    page = el2.shared_page()
    assert owner.attach(owner.alloc()) == SUCCESS
    for _ in range(3):
        with pytest.raises(Stage2Fault):
            el2.device().read(IOVA, 4)
    assert el2.call(HostCall.IOMMU_EVENTS, page) == 0
    owner.guest.end()
    assert el2.call(HostCall.IOMMU_EVENTS, page) == 0


@pytest.mark.parametrize("policy", [RFC, UPSTREAM])
def test_no_other_dialect_has_it(policy: Policy) -> None:
    el2 = El2(policy=policy)
    for call in (ASSIGN, MAP_DEVICE):
        assert el2.hyp.host_call(0xC600_0000 + call)[0] == -1
    el2.machine.close()


def test_a_machine_without_protection_has_it_not() -> None:
    el2 = El2(policy=ANDROID, protected=False)
    assert el2.hyp.host_call(0xC600_0000 + ASSIGN)[0] == -1
    el2.machine.close()


def test_permissions(owner: DeviceGuest) -> None:
    domain = owner.alloc()
    assert owner.attach(domain) == SUCCESS
    assert owner.map(domain, IOVA, PRIVATE, PAGE, R | 4 | 8 | 32) == (SUCCESS, PAGE)
    assert owner.map(domain, IOVA + PAGE, PRIVATE, PAGE, W) == (SUCCESS, PAGE)
    device = owner.el2.device()
    device.read(IOVA, 4)
    device.write(IOVA + PAGE, b"x")
    with pytest.raises(Stage2Fault):
        device.write(IOVA, b"x")
    with pytest.raises(Stage2Fault):
        device.read(IOVA + PAGE, 4)


def test_the_mmio_guard_knows_a_device_of_the_guests_own(guest: DeviceGuest) -> None:
    """Whether the guest marks the frame before the host maps the registers there, or after."""
    assert guest.hvc(Function.MMIO_GUARD_ENROLL)[0] == SUCCESS
    assert guest.hvc(Function.MMIO_GUARD_MAP, DEVICE_IPA)[0] == SUCCESS
    guest.assign()
    leaf = guest.guest.vm.stage2.leaf(DEVICE_IPA)
    assert guest.hvc(Function.MMIO_GUARD_MAP, DEVICE_IPA)[0] == SUCCESS
    assert guest.guest.vm.stage2.leaf(DEVICE_IPA) == leaf
    assert guest.hvc(Function.DEV_REQ_MMIO, DEVICE_IPA)[1] == DMA_BASE


@pytest.mark.parametrize(
    "call", [Function.MEM_SHARE, Function.MEM_UNSHARE, Function.MEM_RELINQUISH]
)
def test_registers_are_no_memory(owner: DeviceGuest, call: Function) -> None:
    before = owner.guest.vm.stage2.leaf(DEVICE_IPA)
    assert owner.hvc(call, DEVICE_IPA)[0] == INVALID
    assert owner.guest.vm.stage2.leaf(DEVICE_IPA) == before
    owner.el2.assert_refused(
        errno.EPERM, HostCall.DONATE_GUEST_SGLIST, owner.handle,
        owner.el2.list_page((owner.el2.pages() >> 12, DEVICE_IPA >> 12, 1)), 1,
    )  # fmt: skip
