# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages taken back by force: zeroed, poisoned, and the VM goes on without."""

from __future__ import annotations

import errno

import pytest

from fakes import a64
from fakes.el2_rig import NOWHERE, RAM_IPA, El2, Guest
from fakes.memory_rig import DEVICE, HANDLE, Rig, RigVm
from pkvm.check.census import census
from pkvm.events import Tlbi, Transition
from pkvm.hyp.abi import HOST_CALL_BASE, ExitCode, HostCall
from pkvm.hyp.errors import Errno
from pkvm.machine.stage2 import Stage2Fault

GFN = 0x40000
IPA = GFN << 12


def test_the_page_is_destroyed(rig: Rig, vm: RigVm) -> None:
    """Facts C4: unmapped, flushed, zeroed, and only then within the host's reach."""
    pa = rig.first_pfn << 12
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 2)
    rig.memory.write(pa, b"secret")
    seen = []
    rig.mem._invalidate_code = lambda pa, nbytes: seen.append(
        (rig.guest_state(vm, GFN), rig.mem.host.stage2.leaf(pa)[0] & 1)
    )
    rig.recorder.events.clear()
    rig.mem.host_force_reclaim_page_guest(pa + 0x123, rig.find_vm)
    assert seen == [("POISON", 0)]
    assert rig.recorder.events == [
        Tlbi(1, IPA),
        Transition("host_force_reclaim", pa, 1, HANDLE, IPA),
    ]
    assert rig.host_bus.read(pa, 8) == rig.dma_bus.read(pa, 8) == bytes(8)
    assert rig.state(rig.first_pfn) == ("OWNED", "NOPAGE")
    assert rig.guest_state(vm, GFN + 1) == "OWNED"
    assert rig.mem.is_poisoned(vm, IPA + 5)
    assert not rig.mem.is_poisoned(vm, IPA + 4096)
    rig.sound()


def test_a_page_of_a_block(rig: Rig, vm: RigVm) -> None:
    """The other 511 keep their state, and what is in them."""
    first = rig.first_pfn
    rig.mem.host_donate_guest(vm, first, GFN, 512)
    rig.memory.write((first + 6) << 12, b"neighbour")
    rig.mem.host_force_reclaim_page_guest((first + 7) << 12, rig.find_vm)
    states = [rig.guest_state(vm, GFN + page) for page in range(512)]
    assert states == ["OWNED"] * 7 + ["POISON"] + ["OWNED"] * 504
    assert rig.memory.read((first + 6) << 12, 9) == b"neighbour"
    rig.sound()


def test_a_block_without_table_pages(rig: Rig) -> None:
    vm = rig.vm(HANDLE, tables=1)
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 512)
    with rig.refused(Errno.ENOMEM, "memcache") as caught:
        rig.mem.host_force_reclaim_page_guest(rig.first_pfn << 12, rig.find_vm)
    assert caught.refusal is not None
    rig.topup(vm, caught.refusal.pages_needed)
    rig.mem.host_force_reclaim_page_guest(rig.first_pfn << 12, rig.find_vm)
    rig.sound()


def test_refusals(rig: Rig, vm: RigVm) -> None:
    """Facts §3.3, in the order of the checks."""
    call, first = rig.mem.host_force_reclaim_page_guest, rig.first_pfn
    for pa in (DEVICE, rig.memory.ram_end, rig.memory.ram_base - 1, 1 << 52, 0):
        with rig.refused(Errno.EFAULT, "ram_range"):
            call(pa, rig.find_vm)
    with rig.refused(Errno.EAGAIN, "host_state"):
        call(first << 12, rig.find_vm)
    with rig.refused(Errno.EPERM, "owner"):
        call(rig.carveout[0], rig.find_vm)
    with rig.refused(Errno.EPERM, "owner"):
        call(vm.stage2.root, rig.find_vm)
    rig.mem.host_donate_guest(vm, first, GFN, 1)
    with rig.refused(Errno.EAGAIN, "handle"):
        call(first << 12, lambda handle: None)
    rig.mem.guest_share_host(vm, IPA, 1)
    with rig.refused(Errno.EAGAIN, "host_state"):
        call(first << 12, rig.find_vm)


@pytest.mark.parametrize("entry", [0, 1 << 60])
def test_a_page_that_nobody_has(entry: int) -> None:
    """Only a bug of EL2's could make one; even then the answer is an errno."""
    rig = Rig()
    vm = rig.vm()
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 1)
    index, _, _ = rig.mem.host.stage2.find(rig.first_pfn << 12)
    rig.memory.words[index] = entry
    with rig.refused(Errno.EINVAL, "annotation"):
        rig.mem.host_force_reclaim_page_guest(rig.first_pfn << 12, rig.find_vm)


@pytest.mark.parametrize(
    ("entry", "number"), [(0, Errno.ENOENT), (3 << 60, Errno.EHWPOISON), (None, Errno.EPERM)]
)
def test_a_page_that_the_guest_has_not(entry: int | None, number: Errno) -> None:
    rig = Rig()
    vm = rig.vm()
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 1)
    index, leaf, _ = vm.stage2.find(IPA)
    rig.memory.words[index] = leaf | 1 << 55 if entry is None else entry
    with rig.refused(number, "guest_state"):
        rig.mem.host_force_reclaim_page_guest(rig.first_pfn << 12, rig.find_vm)


def test_poison_is_for_ever(rig: Rig, vm: RigVm) -> None:
    first = rig.first_pfn
    rig.mem.host_donate_guest(vm, first, GFN, 3)
    rig.mem.host_force_reclaim_page_guest((first + 1) << 12, rig.find_vm)
    for nr in (1, 2):
        with rig.refused(Errno.EPERM, "guest_state"):
            rig.mem.host_donate_guest(vm, first + 9, GFN + 1, nr)
    with rig.refused(Errno.EPERM, "guest_state"):
        rig.mem.host_share_guest(vm, first + 9, GFN + 1, 1, 7)
    for call in (rig.mem.guest_share_host, rig.mem.guest_unshare_host):
        with rig.refused(Errno.EHWPOISON, "guest_state"):
            call(vm, IPA + 4096, 1)
    with rig.refused(Errno.EHWPOISON, "guest_state"):
        rig.mem.guest_share_host(vm, IPA, 3)
    with rig.refused(Errno.EHWPOISON, "guest_state"):
        rig.mem.guest_relinquish_host(vm, IPA + 4096)
    rig.mem.host_donate_guest(vm, first + 1, GFN + 3, 1)
    rig.sound()


@pytest.mark.parametrize("one_by_one", [True, False])
def test_the_end_of_a_poisoned_vm(rig: Rig, vm: RigVm, one_by_one: bool) -> None:
    """Facts §3.3: reclaim of a poisoned page succeeds, and everything comes back."""
    before = census(rig.mem, rig.vms)
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 4)
    for page in (0, 2):
        rig.mem.host_force_reclaim_page_guest((rig.first_pfn + page) << 12, rig.find_vm)
    assert census(rig.mem, rig.vms).vms[HANDLE]["owned"] == 2
    assert rig.mem.has_pages(vm)
    if one_by_one:
        for page in range(4):
            rig.mem.reclaim_dying_guest_page(vm, GFN + page)
        with rig.refused(Errno.ENOENT, "guest_state"):
            rig.mem.reclaim_dying_guest_page(vm, GFN + 4)
    else:
        assert rig.mem.reclaim_dying_guest_range(vm, 0, 1 << 28) == 2
    assert not rig.mem.has_pages(vm)
    rig.sound()
    found = census(rig.mem, rig.vms)
    assert (found.host, found.guest) == (
        {**before.host, "owned": before.host["owned"]},
        before.guest,
    )
    tables = vm.memcache.available
    rig.end(vm)
    rig.sound()
    after = census(rig.mem, rig.vms)
    assert after.guest == {"owned": 0, "shared_with_host": 0}
    assert after.host["owned"] > before.host["owned"] + tables, "tables and root came back too"


# Through the door


def guest_that_reads(el2: El2, ipa: int) -> Guest:
    return Guest(el2, [*a64.mov(1, ipa), a64.load(2, 1, size=3), a64.WFI])


def test_a_vcpu_in_a_poison_fault() -> None:
    el2 = El2()
    guest = guest_that_reads(el2, RAM_IPA + 2 * 4096)
    el2.assert_refused(errno.EINVAL, HostCall.VCPU_IN_POISON_FAULT, check_name="loaded")
    guest.load()
    el2.assert_refused(errno.EINVAL, HostCall.VCPU_IN_POISON_FAULT, check_name="exit_class")
    el2.call(HostCall.VCPU_PUT)
    pa = guest.ram + 2 * 4096
    el2.machine.memory.write(pa, b"secret")
    el2.call(HostCall.FORCE_RECLAIM_GUEST_PAGE, pa)
    assert el2.bus.read(pa, 6) == bytes(6)
    assert guest.run() == ExitCode.TRAP
    guest.load()
    assert el2.call(HostCall.VCPU_IN_POISON_FAULT) == 1
    el2.call(HostCall.VCPU_PUT)
    other = guest_that_reads(el2, RAM_IPA + 7 * 4096)
    assert other.run() == ExitCode.TRAP
    guest.load()
    assert el2.call(HostCall.VCPU_IN_POISON_FAULT) == 1, "the answer is about this vCPU's exit"
    el2.call(HostCall.VCPU_PUT)
    other.load()
    assert el2.call(HostCall.VCPU_IN_POISON_FAULT) == 0
    el2.call(HostCall.VCPU_PUT)
    other.end()
    guest.end()
    el2.sound()


def test_no_oracle_for_what_is_no_page() -> None:
    """Where a guest has no table there is no page that could be poisoned."""
    el2 = El2()
    guest = guest_that_reads(el2, NOWHERE)
    guest.run()
    guest.load()
    el2.assert_refused(errno.EINVAL, HostCall.VCPU_IN_POISON_FAULT, check_name="leaf_size")


def test_the_guests_tlb_forgets_the_page() -> None:
    """A guest that has used the page faults on it afterwards."""
    el2 = El2()
    loop = [*a64.mov(1, RAM_IPA + 4096), a64.load(2, 1, size=3), a64.WFI, a64.load(2, 1, size=3)]
    guest = Guest(el2, loop)
    assert guest.run() == ExitCode.TRAP
    assert guest.ec() == 1
    el2.call(HostCall.FORCE_RECLAIM_GUEST_PAGE, guest.ram + 4096)
    guest.run(flags=1)
    assert guest.ec() == 0x24
    with pytest.raises(Stage2Fault):
        el2.bus.read(guest.ram, 1)


def test_where_the_dialect_has_it_not() -> None:
    """Android's host dies of such an access instead."""
    el2 = El2()
    calls = el2.hyp._calls
    del calls[HostCall.FORCE_RECLAIM_GUEST_PAGE]
    assert el2.hyp.host_call(HOST_CALL_BASE + HostCall.FORCE_RECLAIM_GUEST_PAGE, 0) == (-1, 0)
