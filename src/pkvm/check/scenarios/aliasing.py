# SPDX-License-Identifier: GPL-2.0-or-later
"""The same host memory in two places: twice in a VM, in two VMs, protected or not.

First come, first served.
"""

from __future__ import annotations

from pkvm.check.scenarios.bench import CODE, FREE, FREE_SLOT, PAGE, RAM, Bench, BenchVm, Guest
from pkvm.check.scenarios.handling import forced_read, memory, skip
from pkvm.check.scenarios.sharing import SHARE, UNSHARE
from pkvm.uapi.memory import Backing

TITLE = "Double donation and aliasing between VMs"


def _pair(bench: Bench, first: bool, second: bool) -> tuple[BenchVm, Guest, Guest]:
    """Two VMs, each protected or not, with the same RAM."""
    one = bench.vm(protected=first)
    other = bench.vm(protected=second, ram=one.ram, name="other ")
    return one, one.agent(), other.agent()


def bad_twice_in_one_vm(bench: Bench) -> None:
    """Two slots of a VM with the same memory: a page is in one of them, where it was touched."""
    vm = bench.vm()
    vm.slot(FREE_SLOT, FREE, vm.ram)
    guest = vm.agent()
    guest.store(RAM, 0x11)
    guest.load(FREE)
    guest.resume()
    skip(guest)
    guest.load(FREE + PAGE)
    guest.load(RAM + PAGE)
    skip(guest)
    guest.load(RAM)


def bad_share_the_other_alias(bench: Bench) -> None:
    """The guest's calls about an alias of a page that it has elsewhere."""
    vm = bench.vm()
    vm.slot(FREE_SLOT, FREE, vm.ram)
    guest = vm.agent()
    guest.store(RAM, 0x11)
    guest.hvc(SHARE, FREE)
    skip(guest)
    guest.hvc(SHARE, RAM)
    guest.load(FREE)
    skip(guest)
    guest.hvc(UNSHARE, RAM)
    vm.load(0)


def good_twice_not_protected(bench: Bench) -> None:
    """A guest that is not protected sees one page at two addresses."""
    vm = bench.vm(protected=False)
    vm.slot(FREE_SLOT, FREE, vm.ram)
    guest = vm.agent()
    guest.store(RAM, 0x11)
    guest.load(FREE)
    guest.store(FREE, 0x22)
    guest.load(RAM)
    vm.load(0)


def bad_two_protected(bench: Bench) -> None:
    """Two protected VMs: who touches a page first has it."""
    vm, one, other = _pair(bench, True, True)
    one.store(RAM, 0x11)
    other.load(RAM)
    other.resume()
    skip(other)
    other.store(RAM + PAGE, 0x22)
    one.load(RAM + PAGE)
    skip(one)
    one.load(RAM)
    vm.load(0)
    vm.load(PAGE)


def bad_shared_by_the_other(bench: Bench) -> None:
    """A page that a guest shares is still its own: no other guest gets it."""
    vm, one, other = _pair(bench, True, True)
    one.store(RAM, 0x11)
    one.hvc(SHARE, RAM)
    other.load(RAM)
    skip(other)
    one.hvc(UNSHARE, RAM)
    other.load(RAM)
    skip(other)
    vm.load(0)


def bad_protected_then_not(bench: Bench) -> None:
    """A page of a protected VM, wanted by one that is not."""
    vm, one, other = _pair(bench, True, False)
    one.store(RAM, 0x11)
    other.load(RAM)
    other.resume()
    skip(other)
    one.hvc(SHARE, RAM)
    other.load(RAM)
    skip(other)
    one.load(RAM)
    vm.load(0)


def bad_not_then_protected(bench: Bench) -> None:
    """A page that a VM which is not protected maps, wanted by a protected one."""
    vm, one, other = _pair(bench, False, True)
    one.store(RAM, 0x11)
    other.load(RAM)
    other.resume()
    skip(other)
    one.load(RAM)
    vm.load(0)
    other.load(RAM + PAGE)
    one.load(RAM + PAGE)
    skip(one)


def good_two_not_protected(bench: Bench) -> None:
    """Two VMs that are not protected share memory with each other."""
    vm, one, other = _pair(bench, False, False)
    one.store(RAM, 0x11)
    other.load(RAM)
    other.store(RAM, 0x22)
    one.load(RAM)
    vm.load(0)
    vm.store(0, b"\x33")
    one.load(RAM)
    other.load(RAM)


def bad_code_in_two(bench: Bench) -> None:
    """Two protected VMs that run the same code: the second does not even start."""
    vm = bench.vm()
    assert vm.code is not None
    guest = vm.agent()
    guest.load(RAM)
    other = bench.vm(name="other ", code=False)
    other.slot(1, CODE, vm.code)
    second = other.guest(other.vcpu())
    second.start()
    second.start()
    guest.load(RAM)


def bad_after_the_first_has_gone(bench: Bench) -> None:
    """Once the first VM is gone its pages are the host's, and the other's for the touching."""
    vm, one, other = _pair(bench, True, True)
    one.store(RAM, 0x11)
    other.load(RAM)
    one.vcpu.close()
    vm.vm.close()
    vm.load(0)
    other.resume()
    vm.load(0)


def bad_after_forced_reclaim(bench: Bench) -> None:
    """A page taken from one guest by force can be given to another."""
    vm, one, other = _pair(bench, True, True)
    one.store(RAM, 0x11)
    forced_read(bench, vm.ram)
    vm.store(0, b"\x99")
    other.load(RAM)
    vm.load(0)
    one.load(RAM)


def bad_shifted(bench: Bench) -> None:
    """The same memory at another offset of another VM's."""
    vm = bench.vm()
    other = bench.vm(name="other ")
    other.slot(FREE_SLOT, FREE, vm.ram, offset=4 * PAGE)
    one, second = vm.agent(), other.agent()
    one.store(RAM + 4 * PAGE, 0x44)
    second.load(FREE + PAGE)
    second.load(FREE)
    skip(second)
    one.load(RAM + 5 * PAGE)
    skip(one)
    one.load(RAM + 3 * PAGE)


def bad_two_mappings_of_an_object(bench: Bench) -> None:
    """Two mappings of a memfd, one for each VM: the pages are the same."""
    ram = memory(bench, "ram", 4, Backing.MEMFD)
    assert ram is not None
    alias = ram.alias()
    bench.keep(alias)
    bench.name("alias", alias)
    one = bench.vm(ram=ram).agent()
    other = bench.vm(ram=alias, name="other ").agent()
    one.store(RAM, 0x11)
    other.load(RAM)
    skip(other)
    other.store(RAM + PAGE, 0x22)
    bench.load(alias, 0)
    bench.load(ram, PAGE)
    one.load(RAM + PAGE)
    skip(one)
