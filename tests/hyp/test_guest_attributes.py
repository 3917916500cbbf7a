# SPDX-License-Identifier: GPL-2.0-or-later
"""What the host may do with the mappings that it lends: permissions, young and old, blocks."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from fakes import a64
from fakes.el2_rig import RAM_IPA, El2, Guest
from fakes.memory_rig import HANDLE, Rig, RigVm
from pkvm.arm64.stage2 import AF, S2AP_R, S2AP_W, SW_STATE_MASK, XN_MASK
from pkvm.hyp.abi import PROT_R, PROT_RWX, PROT_W, PROT_X, ExitCode, HostCall, RunResult
from pkvm.hyp.errors import Errno

GFN = 0x40000
FSC_ACCESS_FLAG, FSC_PERMISSION = 0x0B, 0x0F
"""At level 3."""
WNR = 1 << 6
DABT = 0x24


def leaf(vm: RigVm, gfn: int = GFN) -> int:
    return vm.stage2.leaf(gfn << 12)[0]


def lend(rig: Rig, vm: RigVm, nr: int = 1, prot: int = PROT_R) -> None:
    rig.mem.host_share_guest(vm, rig.first_pfn, GFN, nr, prot)


def test_permissions_are_added_and_never_taken(rig: Rig, vm: RigVm) -> None:
    lend(rig, vm)
    flushes = rig.guest_flushes
    rig.mem.host_relax_perms_guest(vm, GFN, PROT_W)
    assert leaf(vm) & (S2AP_R | S2AP_W | XN_MASK) == S2AP_R | S2AP_W | 2 << 53
    rig.mem.host_relax_perms_guest(vm, GFN, PROT_X)
    assert leaf(vm) & (S2AP_R | S2AP_W | XN_MASK) == S2AP_R | S2AP_W
    rig.mem.host_relax_perms_guest(vm, GFN, 0)
    assert leaf(vm) & (S2AP_R | S2AP_W | XN_MASK) == S2AP_R | S2AP_W
    assert rig.guest_flushes > flushes
    assert rig.guest_state(vm, GFN) == "SHARED_BORROWED"


def test_write_protection(rig: Rig, vm: RigVm) -> None:
    lend(rig, vm, prot=PROT_RWX)
    rig.mem.host_share_guest(vm, rig.first_pfn + 1, GFN + 1, 1, PROT_RWX)
    flushes = rig.guest_flushes
    rig.mem.host_wrprotect_guest(vm, GFN, 1)
    assert leaf(vm) & (S2AP_R | S2AP_W) == S2AP_R
    assert leaf(vm, GFN + 1) & S2AP_W
    assert rig.guest_flushes == flushes + 1
    rig.mem.host_wrprotect_guest(vm, GFN & ~511, 512)
    assert not leaf(vm, GFN + 1) & S2AP_W
    rig.mem.host_wrprotect_guest(vm, GFN + 512, 512)


def test_young_and_old(rig: Rig, vm: RigVm) -> None:
    lend(rig, vm)
    young = rig.mem.host_test_clear_young_guest
    assert young(vm, GFN, 1, make_old=False)
    assert young(vm, GFN, 1, make_old=True)
    assert not leaf(vm) & AF
    assert not young(vm, GFN, 1, make_old=True)
    assert not young(vm, GFN + 1, 1, make_old=True)
    rig.mem.host_mkyoung_guest(vm, GFN)
    assert leaf(vm) & AF
    assert young(vm, GFN & ~511, 512, make_old=True)
    assert rig.guest_state(vm, GFN) == "SHARED_BORROWED"


def test_a_block_is_one_mapping(rig: Rig, vm: RigVm) -> None:
    lend(rig, vm, 512, PROT_RWX)
    rig.mem.host_wrprotect_guest(vm, GFN + 5, 1)
    assert not leaf(vm) & S2AP_W
    rig.mem.host_relax_perms_guest(vm, GFN + 9, PROT_W)
    assert leaf(vm) & S2AP_W
    assert rig.mem.host_test_clear_young_guest(vm, GFN, 512, make_old=True)
    assert not leaf(vm) & AF


def test_splitting_keeps_everything(rig: Rig, vm: RigVm) -> None:
    lend(rig, vm, 512, PROT_R)
    rig.mem.host_test_clear_young_guest(vm, GFN, 512, make_old=True)
    block = leaf(vm)
    flushes, tables = rig.guest_flushes, vm.memcache.available
    rig.mem.host_split_guest(vm, GFN, 512)
    assert rig.guest_flushes > flushes
    assert vm.memcache.available == tables - 1
    for page in range(512):
        assert leaf(vm, GFN + page) == (block | 2) + (page << 12)
    rig.sound()
    for page in range(512):
        rig.mem.host_unshare_guest(vm, GFN + page, 1)
    assert vm.memcache.available == tables + 1


def test_what_cannot_be_split(rig: Rig, vm: RigVm) -> None:
    call = rig.mem.host_split_guest
    for gfn, nr in ((GFN, 1), (GFN + 1, 512), (GFN, 511), (GFN, 1 << 18), (1 << 28, 512)):
        with rig.refused(Errno.EINVAL):
            call(vm, gfn, nr)
    with rig.refused(Errno.E2BIG, "leaf_size"):
        call(vm, GFN, 512)
    lend(rig, vm)
    with rig.refused(Errno.E2BIG, "leaf_size"):
        call(vm, GFN, 512)
    with rig.refused(Errno.ENOENT, "guest_state"):
        call(vm, GFN + 512, 512)


def test_a_split_without_table_pages(rig: Rig) -> None:
    vm = rig.vm(HANDLE, tables=1)
    lend(rig, vm, 512)
    with rig.refused(Errno.ENOMEM, "memcache") as caught:
        rig.mem.host_split_guest(vm, GFN, 512)
    assert caught.refusal is not None
    assert caught.refusal.pages_needed == 1


def attribute_calls(rig: Rig, vm: RigVm) -> list[Callable[[int], object]]:
    mem = rig.mem
    return [
        lambda gfn: mem.host_relax_perms_guest(vm, gfn, PROT_R),
        lambda gfn: mem.host_mkyoung_guest(vm, gfn),
        lambda gfn: mem.host_wrprotect_guest(vm, gfn, 1),
        lambda gfn: mem.host_test_clear_young_guest(vm, gfn, 1, make_old=True),
    ]


@pytest.mark.parametrize("shared", [False, True])
def test_a_protected_guests_mappings_are_its_own(rig: Rig, vm: RigVm, shared: bool) -> None:
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 1)
    if shared:
        rig.mem.guest_share_host(vm, GFN << 12, 1)
    for call in attribute_calls(rig, vm):
        with rig.refused(Errno.EPERM, "guest_state"):
            call(GFN)


def test_numbers(rig: Rig, vm: RigVm) -> None:
    for call in attribute_calls(rig, vm):
        for gfn in (1 << 28, 1 << 52, -1, (1 << 64) - 1):
            with rig.refused(Errno.EINVAL, "gfn_range"):
                call(gfn)
    for gfn, nr in ((GFN, 0), (GFN, 2), (GFN + 1, 512), (GFN, 1 << 52)):
        with rig.refused(Errno.EINVAL, "size"):
            rig.mem.host_wrprotect_guest(vm, gfn, nr)
        with rig.refused(Errno.EINVAL, "size"):
            rig.mem.host_test_clear_young_guest(vm, gfn, nr, make_old=False)
    lend(rig, vm)
    for prot in (8, 1 << 63, -1):
        with rig.refused(Errno.EINVAL, "prot"):
            rig.mem.host_relax_perms_guest(vm, GFN, prot)


def test_nothing_there(rig: Rig, vm: RigVm) -> None:
    relax, mkyoung, *ranged = attribute_calls(rig, vm)
    for call in (relax, mkyoung):
        with rig.refused(Errno.EAGAIN, "guest_state"):
            call(GFN)
    for call in ranged:
        call(GFN)


def test_the_state_bits_are_no_attributes(rig: Rig, vm: RigVm) -> None:
    lend(rig, vm)
    before = leaf(vm) & SW_STATE_MASK
    for call in attribute_calls(rig, vm):
        call(GFN)
    assert leaf(vm) & SW_STATE_MASK == before


# With a CPU


def writer(el2: El2) -> Guest:
    """Writes a word to its second page, again after each WFI."""
    store = a64.store(2, 1, size=3)
    return Guest(
        el2,
        [*a64.mov(1, RAM_IPA + 4096), *a64.mov(2, 7), *[store, a64.WFI] * 4],
        protected=False,
    )


def test_dirty_logging() -> None:
    """Protect, fault, note, relax, retry: what KVM_MEM_LOG_DIRTY_PAGES is made of."""
    el2 = El2()
    guest = writer(el2)
    gfn = (RAM_IPA >> 12) + 1
    assert guest.run() == ExitCode.TRAP
    assert guest.ec() == 1
    el2.call(HostCall.WRPROTECT_GUEST, guest.handle, gfn, 1)
    el2.bus.write_u64(guest.ram + 4096, 0)
    assert guest.run(flags=1) == ExitCode.TRAP
    assert guest.ec() == DABT
    assert guest.esr() & (WNR | 0x3F) == WNR | FSC_PERMISSION
    assert guest.shown[RunResult.HPFAR] << 8 == gfn << 12
    assert guest.ram_word(4096) == 0
    guest.load()
    el2.call(HostCall.RELAX_PERMS_GUEST, gfn, PROT_W)
    el2.call(HostCall.VCPU_PUT)
    assert guest.run() == ExitCode.TRAP
    assert guest.ec() == 1
    assert guest.ram_word(4096) == 7
    el2.sound()


def test_cold_pages() -> None:
    el2 = El2()
    guest = writer(el2)
    gfn = (RAM_IPA >> 12) + 1
    guest.run()
    old = (HostCall.TEST_CLEAR_YOUNG_GUEST, guest.handle, gfn, 1, 1)
    assert el2.call(*old) == 1
    assert el2.call(*old) == 0
    guest.run(flags=1)
    assert (guest.ec(), guest.esr() & 0x3F) == (DABT, FSC_ACCESS_FLAG)
    guest.load()
    el2.call(HostCall.MKYOUNG_GUEST, gfn)
    el2.call(HostCall.VCPU_PUT)
    guest.run()
    assert guest.ec() == 1
    assert el2.call(HostCall.TEST_CLEAR_YOUNG_GUEST, guest.handle, gfn, 1, 0) == 1
    el2.call(HostCall.TLB_FLUSH_VMID, guest.handle)
    el2.sound()


def test_calls_are_for_non_protected_vms() -> None:
    el2 = El2()
    guest = Guest(el2)
    handle, gfn = guest.handle, RAM_IPA >> 12
    for call, args in (
        (HostCall.WRPROTECT_GUEST, (handle, gfn, 1)),
        (HostCall.TEST_CLEAR_YOUNG_GUEST, (handle, gfn, 1, 1)),
        (HostCall.TLB_FLUSH_VMID, (handle,)),
    ):
        el2.assert_refused(errno.EINVAL, call, *args, check_name="vm_kind")
        el2.assert_refused(errno.ENOENT, call, handle + 7, *args[1:], check_name="handle")
    for call in (HostCall.RELAX_PERMS_GUEST, HostCall.MKYOUNG_GUEST):
        numbers = (gfn, PROT_RWX)
        el2.assert_refused(errno.EINVAL, call, *numbers, check_name="loaded")
        guest.load()
        el2.assert_refused(errno.EINVAL, call, *numbers, check_name="vm_kind")
        el2.call(HostCall.VCPU_PUT)
