# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel touches a guest's page where it has no fix-up: it is wiped, and lost to the guest."""

from __future__ import annotations

from pkvm.check.scenarios.bench import PAGE, RAM, Bench, BenchVm, Guest
from pkvm.check.scenarios.handling import change, forced_read, forced_write, fork, memory
from pkvm.check.scenarios.sharing import SHARE, UNSHARE
from pkvm.uapi.memory import Backing, Change, Forced

TITLE = "Forced reclaim"
_WAYS = (Forced.PROC_MEM, Forced.PROCESS_VM, Forced.VMSPLICE)


def _secret(bench: Bench, name: str = "") -> tuple[BenchVm, Guest]:
    """A guest with something in its second page."""
    vm = bench.vm(name=name)
    guest = vm.agent()
    guest.store(RAM + PAGE, 0x5EC2E7)
    return vm, guest


def bad_ways(bench: Bench) -> None:
    """Each way to read: zeroes come, the host may look, KVM_RUN fails for ever."""
    for way in _WAYS:
        vm, guest = _secret(bench, f"{way.name} ")
        forced_read(bench, vm.ram, PAGE, way=way)
        vm.load(PAGE)
        guest.load(RAM + PAGE)
        guest.resume()


def bad_write(bench: Bench) -> None:
    """A write goes into the wiped page, which is the host's then."""
    for way in (Forced.PROC_MEM, Forced.PROCESS_VM):
        vm, guest = _secret(bench, f"{way.name} ")
        forced_write(bench, vm.ram, b"\x11" * 4, PAGE + 2, way=way)
        vm.load(PAGE)
        guest.store(RAM + PAGE, 1)


def bad_neighbours(bench: Bench) -> None:
    """Only the page that was touched goes; the guest has the others."""
    vm, guest = _secret(bench)
    guest.store(RAM, 1)
    guest.store(RAM + 2 * PAGE, 3)
    forced_read(bench, vm.ram, PAGE + 100, 1)
    vm.load(0)
    vm.load(2 * PAGE)
    guest.load(RAM)
    guest.load(RAM + 2 * PAGE)
    guest.load(RAM + 3 * PAGE)
    guest.load(RAM + PAGE)


def bad_two_pages(bench: Bench) -> None:
    """One access across two private pages takes both."""
    vm, guest = _secret(bench)
    guest.store(RAM + 2 * PAGE, 3)
    forced_read(bench, vm.ram, 2 * PAGE - 4, 8)
    vm.load(PAGE)
    vm.load(2 * PAGE)
    guest.load(RAM + 2 * PAGE)


def bad_share_what_is_lost(bench: Bench) -> None:
    """The guest's calls about a page that it has lost."""
    vm, guest = _secret(bench)
    forced_read(bench, vm.ram, PAGE)
    guest.hvc(UNSHARE, RAM + PAGE)
    guest.hvc(SHARE, RAM + PAGE)
    guest.resume()
    vm.load(PAGE)


def good_shared(bench: Bench) -> None:
    """A page that is shared is there for everybody: nothing is taken."""
    vm, guest = _secret(bench)
    guest.hvc(SHARE, RAM + PAGE)
    for way in _WAYS:
        forced_read(bench, vm.ram, PAGE, way=way)
    forced_write(bench, vm.ram, b"\x99", PAGE)
    guest.load(RAM + PAGE)
    guest.hvc(UNSHARE, RAM + PAGE)
    vm.load(PAGE)
    guest.load(RAM + PAGE)


def good_untouched(bench: Bench) -> None:
    """A page that the guest has not touched yet is the host's own."""
    vm, guest = _secret(bench)
    vm.store(5 * PAGE, b"\x42")
    for way in _WAYS:
        forced_read(bench, vm.ram, 5 * PAGE, way=way)
    guest.load(RAM + 5 * PAGE)
    vm.load(5 * PAGE)


def good_not_protected(bench: Bench) -> None:
    """Nothing is taken from a guest that is not protected."""
    vm = bench.vm(protected=False)
    guest = vm.agent()
    guest.store(RAM, 0x77)
    for way in _WAYS:
        forced_read(bench, vm.ram, way=way)
    forced_write(bench, vm.ram, b"\x88")
    guest.load(RAM)


def bad_read_of_the_object(bench: Bench) -> None:
    """read(2) of a memfd whose page a guest has; the file's other pages stay."""
    ram = memory(bench, "ram", 4, Backing.MEMFD)
    assert ram is not None
    vm = bench.vm(ram=ram)
    guest = vm.agent()
    guest.store(RAM, 0x5EC2E7)
    guest.store(RAM + PAGE, 0x5EC2E7)
    forced_read(bench, ram, 0, way=Forced.FILE)
    vm.load(0)
    vm.load(PAGE)
    guest.load(RAM + PAGE)
    guest.load(RAM)


def bad_write_to_the_object(bench: Bench) -> None:
    """write(2) to such a memfd."""
    ram = memory(bench, "ram", 4, Backing.MEMFD)
    assert ram is not None
    vm = bench.vm(ram=ram)
    guest = vm.agent()
    guest.store(RAM, 0x5EC2E7)
    forced_write(bench, ram, b"\x11" * 4, way=Forced.FILE)
    vm.load(0)
    guest.load(RAM)


def bad_fork(bench: Bench) -> None:
    """fork copies the pages that a guest has, where the VMM did not keep them from its children."""
    vm, guest = _secret(bench)
    fork(bench)
    vm.load(PAGE)
    guest.load(RAM + PAGE)
    change(bench, vm.ram, Change.DOFORK, PAGE)
    guest.store(RAM + 2 * PAGE, 2)
    fork(bench)
    vm.load(PAGE)
    vm.load(2 * PAGE)
    guest.load(RAM + 2 * PAGE)
    guest.load(RAM + PAGE)


def good_fork_shared(bench: Bench) -> None:
    """Memory that is shared between processes is not copied, nor a page that the host may read."""
    ram = memory(bench, "ram", 4, Backing.MEMFD)
    assert ram is not None
    vm = bench.vm(ram=ram)
    guest = vm.agent()
    guest.store(RAM, 0x5EC2E7)
    change(bench, ram, Change.DOFORK, 0, None)
    fork(bench)
    vm.load(0)
    guest.load(RAM)
    other, second = _secret(bench, "other ")
    second.hvc(SHARE, RAM + PAGE)
    change(bench, other.ram, Change.DOFORK, 0, None)
    fork(bench)
    other.load(PAGE)
    second.load(RAM + PAGE)


def good_fork_not_protected(bench: Bench) -> None:
    """A guest that is not protected goes on after a fork."""
    vm = bench.vm(protected=False)
    guest = vm.agent()
    guest.store(RAM, 0x77)
    change(bench, vm.ram, Change.DOFORK, 0, None)
    fork(bench)
    guest.load(RAM)
    guest.store(RAM, 0x78)
    vm.load(0)
