# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs and vCPUs come and go: every check, in every order, and every page comes back."""

from __future__ import annotations

import errno

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fakes import a64
from fakes.el2_rig import PAGE, RAM_IPA, SLOT_BYTES, El2, Guest
from pkvm.events import Tlbi
from pkvm.hyp.abi import HANDLE_BASE, MAX_VCPUS, MAX_VMS, HostCall, HostVcpu, HostVm
from pkvm.machine.stage2 import Stage2Fault

MMIO_PA = 0x1000_0000
WEIRD = (MMIO_PA, 0, 1 << 40, (1 << 64) - PAGE, -PAGE)
"""Page-aligned numbers that are no page of the host's RAM."""


@pytest.fixture
def el2() -> El2:
    return El2()


def host_vm(el2: El2, handle: int, *, protected: int = 1, created: int = 1) -> int:
    return el2.shared_page(
        {HostVm.HANDLE: handle, HostVm.PROTECTED: protected, HostVm.CREATED_VCPUS: created}
    )


def root(el2: El2) -> int:
    size = el2.call(HostCall.PGD_INFO)
    return el2.pages(size // PAGE, align=size)


def test_handles_are_255_and_reserved_ones_can_be_given_back(el2: El2) -> None:
    handles = [el2.call(HostCall.RESERVE_VM) for _ in range(MAX_VMS)]
    assert handles == [HANDLE_BASE + index for index in range(MAX_VMS)]
    el2.assert_refused(errno.ENOMEM, HostCall.RESERVE_VM)
    el2.call(HostCall.UNRESERVE_VM, HANDLE_BASE + 7)
    assert el2.call(HostCall.RESERVE_VM) == HANDLE_BASE + 7


@pytest.mark.parametrize("handle", [0, HANDLE_BASE - 1, HANDLE_BASE + MAX_VMS, 1 << 63, -1])
def test_unreserve_of_anything_else_does_nothing(el2: El2, handle: int) -> None:
    el2.call(HostCall.RESERVE_VM)
    el2.call(HostCall.UNRESERVE_VM, handle)
    assert el2.call(HostCall.RESERVE_VM) == HANDLE_BASE + 1


def test_unreserve_does_not_end_a_vm(el2: El2) -> None:
    guest = Guest(el2)
    el2.call(HostCall.UNRESERVE_VM, guest.handle)
    assert el2.vm(guest.handle)


def test_init_vm_wants_a_page_that_is_shared(el2: El2) -> None:
    el2.call(HostCall.RESERVE_VM)
    page = el2.pages()
    args = (el2.pages(), root(el2))
    el2.assert_refused(errno.EPERM, HostCall.INIT_VM, page, *args)
    for weird in WEIRD:
        number = errno.EPERM if weird in (MMIO_PA, 0) else errno.EINVAL
        el2.assert_refused(number, HostCall.INIT_VM, weird, *args)


def test_init_vm_wants_the_pages_address(el2: El2) -> None:
    handle = el2.call(HostCall.RESERVE_VM)
    page = host_vm(el2, handle)
    el2.assert_refused(errno.EINVAL, HostCall.INIT_VM, page + 8, el2.pages(), root(el2))


@pytest.mark.parametrize("created", [0, MAX_VCPUS + 1, (1 << 64) - 1])
def test_init_vm_checks_the_number_of_vcpus(el2: El2, created: int) -> None:
    page = host_vm(el2, el2.call(HostCall.RESERVE_VM), created=created)
    el2.assert_refused(errno.EINVAL, HostCall.INIT_VM, page, el2.pages(), root(el2))


@pytest.mark.parametrize("handle", [0, HANDLE_BASE - 1])
def test_init_vm_checks_the_handle_first(el2: El2, handle: int) -> None:
    page = host_vm(el2, handle)
    el2.assert_refused(errno.EINVAL, HostCall.INIT_VM, page, MMIO_PA, MMIO_PA)


@pytest.mark.parametrize("handle", [HANDLE_BASE, HANDLE_BASE + MAX_VMS, (1 << 64) - 1])
def test_init_vm_wants_a_reserved_handle(el2: El2, handle: int) -> None:
    page = host_vm(el2, handle)
    area, pgd = el2.pages(), root(el2)
    el2.assert_refused(errno.EINVAL, HostCall.INIT_VM, page, area, pgd, tables=False)
    el2.call(HostCall.HOST_UNSHARE_HYP, page >> 12)


def test_init_vm_refuses_areas_that_are_not_the_hosts(el2: El2) -> None:
    handle = el2.call(HostCall.RESERVE_VM)
    page = host_vm(el2, handle)
    area, pgd = el2.pages(), root(el2)
    other = Guest(el2)
    carveout = el2.hyp.mem.carveout[0]
    bad = (*WEIRD, page, other.ram, other.area, other.page, carveout, el2.firmware_pa)
    for pa in bad:
        el2.assert_refused(errno.ENOMEM, HostCall.INIT_VM, page, pa, pgd)
        el2.assert_refused(errno.ENOMEM, HostCall.INIT_VM, page, area, pa, tables=False)
    el2.assert_refused(errno.ENOMEM, HostCall.INIT_VM, page, area + 8, pgd, check_name="alignment")
    el2.assert_refused(
        errno.ENOMEM, HostCall.INIT_VM, page, area, pgd + PAGE, check_name="alignment", tables=False
    )
    el2.assert_refused(errno.ENOMEM, HostCall.INIT_VM, page, pgd, pgd, tables=False)
    el2.call(HostCall.INIT_VM, page, area, pgd)


def test_a_failed_init_vm_gives_zeroed_pages_back(el2: El2) -> None:
    page = host_vm(el2, HANDLE_BASE)
    area, pgd = el2.pages(), root(el2)
    for pa in (area, pgd):
        el2.bus.write(pa, b"x" * PAGE)
    assert el2.x1(HostCall.INIT_VM, page, area, pgd) == -errno.EINVAL
    for pa in (area, pgd):
        assert el2.bus.read(pa, PAGE) == bytes(PAGE)


def test_the_hosts_pages_stay_pinned_while_the_vm_lives(el2: El2) -> None:
    guest = Guest(el2)
    for page in (guest.page, guest.vcpus[0]):
        el2.assert_refused(errno.EBUSY, HostCall.HOST_UNSHARE_HYP, page >> 12)
    guest.end()
    for page in (guest.page, guest.vcpus[0]):
        el2.call(HostCall.HOST_UNSHARE_HYP, page >> 12)


def test_a_vm_is_protected_or_not_and_nothing_between(el2: El2) -> None:
    page = host_vm(el2, el2.call(HostCall.RESERVE_VM), protected=2)
    el2.assert_refused(errno.EINVAL, HostCall.INIT_VM, page, el2.pages(), root(el2))


def test_no_protected_vm_on_a_host_that_is_not_in_protected_mode() -> None:
    el2 = El2(protected=False)
    handle = el2.call(HostCall.RESERVE_VM)
    page = host_vm(el2, handle, protected=1)
    area, pgd = el2.pages(), root(el2)
    el2.assert_refused(errno.EINVAL, HostCall.INIT_VM, page, area, pgd, check_name="vm_kind")
    el2.bus.write_u64(page + HostVm.PROTECTED, 0)
    el2.call(HostCall.INIT_VM, page, area, pgd)


# vCPUs


def test_init_vcpu_checks_in_upstreams_order(el2: El2) -> None:
    guest = Guest(el2, created_vcpus=3)
    area = el2.pages(4)
    shared = el2.shared_page({HostVcpu.VCPU_IDX: 1, HostVcpu.VCPU_ID: 1})
    private = el2.pages()
    call = HostCall.INIT_VCPU
    for pa in (*WEIRD, area + 0x800, guest.ram, guest.areas[0], shared):
        el2.assert_refused(errno.ENOMEM, call, guest.handle + 1, private, pa)
    for handle in (0, guest.handle + 1, guest.handle - (1 << 32), -1):
        el2.assert_refused(errno.ENOENT, call, handle, private, area, tables=False)
    for pa in (private, *WEIRD, guest.ram, shared + 8):
        el2.assert_refused(errno.EBUSY, call, guest.handle, pa, area, tables=False)
    for offset, value in (
        (HostVcpu.FEATURES, 2),
        (HostVcpu.VCPU_IDX, 0),
        (HostVcpu.VCPU_IDX, 3),
        (HostVcpu.VCPU_IDX, (1 << 64) - 1),
        (HostVcpu.VCPU_ID, 0),
        (HostVcpu.VCPU_ID, 1 << 20),
    ):
        before = el2.bus.read_u64(shared + offset)
        el2.bus.write_u64(shared + offset, value)
        el2.assert_refused(errno.EINVAL, call, guest.handle, shared, area, tables=False)
        el2.bus.write_u64(shared + offset, before)
    el2.call(call, guest.handle, shared, area)
    el2.assert_refused(errno.EINVAL, call, guest.handle, shared, el2.pages(4), tables=False)


def test_a_reserved_handle_is_no_vm_yet(el2: El2) -> None:
    handle = el2.call(HostCall.RESERVE_VM)
    page, area = el2.shared_page(), el2.pages(4)
    el2.assert_refused(errno.ENOENT, HostCall.INIT_VCPU, handle, page, area, tables=False)
    el2.assert_refused(errno.ENOENT, HostCall.TOPUP_MEMCACHE, handle, el2.pages(), 1)
    el2.assert_refused(errno.EINVAL, HostCall.START_TEARDOWN_VM, handle)


def test_no_vcpu_is_made_in_a_dying_vm(el2: El2) -> None:
    guest = Guest(el2, created_vcpus=2)
    el2.call(HostCall.START_TEARDOWN_VM, guest.handle)
    page, area = el2.shared_page({HostVcpu.VCPU_IDX: 1, HostVcpu.VCPU_ID: 1}), el2.pages(4)
    args = (guest.handle, page, area)
    el2.assert_refused(errno.ENOENT, HostCall.INIT_VCPU, *args, check_name="dying", tables=False)
    el2.assert_refused(errno.ENOENT, HostCall.TOPUP_MEMCACHE, guest.handle, el2.pages(), 1)
    el2.assert_refused(errno.ENOENT, HostCall.DONATE_GUEST_SGLIST, guest.handle, el2.pages(), 1)


# Teardown


def test_teardown_has_an_order(el2: El2) -> None:
    guest = Guest(el2)
    handle = guest.handle
    gfn = RAM_IPA >> 12
    for call, *args in (
        (HostCall.RECLAIM_DYING_GUEST_PAGE, handle, gfn),
        (HostCall.RECLAIM_DYING_GUEST_RANGE, handle, gfn, 4),
        (HostCall.FINALIZE_TEARDOWN_VM, handle),
    ):
        el2.assert_refused(errno.EINVAL, call, *args, check_name="dying")
    el2.call(HostCall.START_TEARDOWN_VM, handle)
    el2.assert_refused(errno.EINVAL, HostCall.START_TEARDOWN_VM, handle, check_name="dying")
    for handle in (0, guest.handle + 1, -1):
        el2.assert_refused(errno.EINVAL, HostCall.START_TEARDOWN_VM, handle, check_name="handle")
        el2.assert_refused(errno.EINVAL, HostCall.FINALIZE_TEARDOWN_VM, handle)
    el2.call(HostCall.RECLAIM_DYING_GUEST_RANGE, guest.handle, 0, 1 << 28)
    el2.call(HostCall.FINALIZE_TEARDOWN_VM, guest.handle)
    el2.assert_refused(errno.EINVAL, HostCall.FINALIZE_TEARDOWN_VM, guest.handle)


def test_a_loaded_vcpu_keeps_its_vm(el2: El2) -> None:
    guest = Guest(el2)
    guest.load()
    el2.assert_refused(errno.EINVAL, HostCall.START_TEARDOWN_VM, guest.handle, check_name="users")
    el2.call(HostCall.VCPU_PUT)
    el2.call(HostCall.START_TEARDOWN_VM, guest.handle)
    guest.load()
    assert el2.x1(HostCall.VCPU_RUN) == -errno.EINVAL


def test_reclaim_says_what_was_there(el2: El2) -> None:
    guest = Guest(el2, ram_pages=4)
    el2.call(HostCall.START_TEARDOWN_VM, guest.handle)
    gfn = RAM_IPA >> 12
    assert el2.call(HostCall.RECLAIM_DYING_GUEST_PAGE, guest.handle, gfn) == 0
    args = (guest.handle, gfn)
    el2.assert_refused(errno.ENOENT, HostCall.RECLAIM_DYING_GUEST_PAGE, *args)
    assert el2.call(HostCall.RECLAIM_DYING_GUEST_RANGE, guest.handle, gfn - 5, 100) == 3
    for number in (1 << 28, (1 << 52) - 1, (1 << 64) - 1):
        el2.assert_refused(errno.EINVAL, HostCall.RECLAIM_DYING_GUEST_PAGE, guest.handle, number)


def test_every_page_comes_back_zeroed_and_in_the_list(el2: El2) -> None:
    mem = el2.hyp.mem
    before = mem.vmemmap.states.tobytes()
    guest = Guest(el2, [*a64.mov(0, 0x5EC2E7), a64.WFI], vcpus=2, ram_pages=3)
    shared = [guest.page, *guest.vcpus]
    guest.run()
    guest.end()
    head = el2.bus.read_u64(guest.page + HostVm.TEARDOWN_HEAD)
    nr = el2.bus.read_u64(guest.page + HostVm.TEARDOWN_NR)
    returned = []
    while head:
        returned.append(head)
        content = el2.bus.read(head, PAGE)
        assert content[8:] == bytes(PAGE - 8)
        head = int.from_bytes(content[:8], "little")
    areas = [area + PAGE * page for area in guest.areas for page in range(4)]
    expected = [guest.area, guest.root, guest.root + PAGE, *areas, *guest.tables]
    assert sorted(returned) == sorted(expected)
    assert nr == len(expected)
    for page in shared:
        el2.call(HostCall.HOST_UNSHARE_HYP, page >> 12)
    for pa, npages in ((guest.ram, 3), (guest.slot, SLOT_BYTES // PAGE)):
        assert el2.bus.read(pa, npages * PAGE) == bytes(npages * PAGE)
    assert mem.vmemmap.states.tobytes() == before
    el2.sound()


def test_the_vmid_is_flushed_before_the_entry_is_free(el2: El2) -> None:
    guest = Guest(el2)
    handle = guest.handle
    el2.call(HostCall.START_TEARDOWN_VM, handle)
    el2.call(HostCall.RECLAIM_DYING_GUEST_RANGE, handle, 0, 1 << 28)
    known = len(el2.recorder.events)
    el2.call(HostCall.FINALIZE_TEARDOWN_VM, handle)
    first, *_ = el2.recorder.events[known:]
    assert isinstance(first, Tlbi)
    assert (first.vmid, first.ipa) == (1, -1)
    assert el2.call(HostCall.RESERVE_VM) == handle


@pytest.mark.parametrize("protected", [True, False])
def test_a_vm_does_not_end_before_its_last_page(el2: El2, protected: bool) -> None:
    guest = Guest(el2, protected=protected)
    gfn = RAM_IPA >> 12
    el2.call(HostCall.START_TEARDOWN_VM, guest.handle)
    for page in range(4):
        el2.assert_refused(
            errno.EBUSY, HostCall.FINALIZE_TEARDOWN_VM, guest.handle, check_name="guest_pages"
        )
        if protected:
            el2.call(HostCall.RECLAIM_DYING_GUEST_PAGE, guest.handle, gfn + page)
        else:
            el2.call(HostCall.HOST_UNSHARE_GUEST, guest.handle, gfn + page, 1)
    if protected:
        with pytest.raises(Stage2Fault):
            el2.bus.read(guest.slot, 8)
        el2.call(HostCall.RECLAIM_DYING_GUEST_RANGE, guest.handle, 0, 1 << 28)
    el2.call(HostCall.FINALIZE_TEARDOWN_VM, guest.handle)
    el2.sound()


class Lives(RuleBasedStateMachine):
    """Calls in any order with any handle: every answer is the model's, nothing is ever lost."""

    def __init__(self) -> None:
        super().__init__()
        self.el2 = El2()
        self.state: dict[int, str] = {}
        self.vcpus: dict[int, set[int]] = {}
        self.loaded: tuple[int, int] | None = None

    def expect(self, result: int, wanted: int) -> None:
        assert result == wanted, (result, wanted, self.el2.recorder.events[-3:])

    handles = st.integers(HANDLE_BASE - 1, HANDLE_BASE + 3)

    @rule()
    def reserve(self) -> None:
        if len(self.state) == 3:
            return
        handle = self.el2.call(HostCall.RESERVE_VM)
        assert handle not in self.state
        self.state[handle] = "reserved"

    @rule(handle=handles)
    def unreserve(self, handle: int) -> None:
        self.expect(self.el2.x1(HostCall.UNRESERVE_VM, handle), 0)
        if self.state.get(handle) == "reserved":
            del self.state[handle]

    @rule(handle=handles, protected=st.booleans())
    def init_vm(self, handle: int, protected: bool) -> None:
        el2 = self.el2
        page = host_vm(el2, handle, protected=int(protected), created=2)
        result = el2.x1(HostCall.INIT_VM, page, el2.pages(), root(el2))
        good = self.state.get(handle) == "reserved"
        self.expect(result, 0 if good else -errno.EINVAL)
        if good:
            self.state[handle] = "vm"
            self.vcpus[handle] = set()

    @rule(handle=handles, index=st.integers(0, 2))
    def init_vcpu(self, handle: int, index: int) -> None:
        el2 = self.el2
        page = el2.shared_page({HostVcpu.VCPU_IDX: index, HostVcpu.VCPU_ID: index})
        result = el2.x1(HostCall.INIT_VCPU, handle, page, el2.pages(4))
        if self.state.get(handle) != "vm":
            self.expect(result, -errno.ENOENT)
        elif index == 2 or index in self.vcpus[handle]:
            self.expect(result, -errno.EINVAL)
        else:
            self.expect(result, 0)
            self.vcpus[handle].add(index)

    @rule(handle=handles, index=st.integers(0, 2))
    def load(self, handle: int, index: int) -> None:
        self.expect(self.el2.x1(HostCall.VCPU_LOAD, handle, index, 0), 0)
        there = self.state.get(handle) == "vm" and index in self.vcpus[handle]
        if self.loaded is None and there:
            self.loaded = handle, index

    @rule()
    def put(self) -> None:
        self.expect(self.el2.x1(HostCall.VCPU_PUT), 0)
        self.loaded = None

    @rule()
    def run_something(self) -> None:
        result = self.el2.x1(HostCall.VCPU_RUN)
        if self.loaded is None:
            self.expect(result, -errno.EINVAL)
        elif self.el2.vm(self.loaded[0]).protected:
            self.expect(result, 3)

    @rule(handle=handles)
    def start_teardown(self, handle: int) -> None:
        busy = self.loaded is not None and self.loaded[0] == handle
        good = self.state.get(handle) == "vm" and not busy
        result = self.el2.x1(HostCall.START_TEARDOWN_VM, handle)
        self.expect(result, 0 if good else -errno.EINVAL)
        if good:
            self.state[handle] = "dying"

    @rule(handle=handles)
    def reclaim(self, handle: int) -> None:
        result = self.el2.x1(HostCall.RECLAIM_DYING_GUEST_RANGE, handle, 0, 1 << 28)
        self.expect(result, 0 if self.state.get(handle) == "dying" else -errno.EINVAL)

    @rule(handle=handles)
    def finalize(self, handle: int) -> None:
        result = self.el2.x1(HostCall.FINALIZE_TEARDOWN_VM, handle)
        good = self.state.get(handle) == "dying"
        self.expect(result, 0 if good else -errno.EINVAL)
        if good:
            del self.state[handle]

    @invariant()
    def agrees(self) -> None:
        vms = {handle for handle, state in self.state.items() if state != "reserved"}
        assert {vm.handle for vm in self.el2.hyp.vms()} == vms
        for vm in self.el2.hyp.vms():
            assert vm.users == (self.loaded is not None and self.loaded[0] == vm.handle)
        self.el2.sound()

    def teardown(self) -> None:
        self.el2.machine.close()


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=12,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
