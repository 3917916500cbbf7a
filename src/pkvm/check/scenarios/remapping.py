# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VMM does to its mapping while a guest has the pages: the guest keeps what it has touched,
and finds whatever is there now where it has not.
"""

from __future__ import annotations

from functools import partial

from pkvm.check.scenarios.bench import PAGE, RAM, Bench, BenchVm, Guest
from pkvm.check.scenarios.handling import change, memory, skip
from pkvm.check.scenarios.sharing import SHARE, UNSHARE
from pkvm.uapi.memory import Backing, Change

TITLE = "Mappings changed under a guest"


def _touched(bench: Bench, *, protected: bool = True, name: str = "") -> tuple[BenchVm, Guest]:
    """A guest that has its first page, and not its second, in which the host left something."""
    vm = bench.vm(protected=protected, name=name)
    vm.ram.write(PAGE, b"\x42")
    guest = vm.agent()
    guest.store(RAM, 0x5EC2E7)
    return vm, guest


def _change(bench: Bench, what: Change, *, protected: bool = True, name: str = "") -> None:
    """Change both pages; look at both from both sides."""
    vm, guest = _touched(bench, protected=protected, name=name)
    change(bench, vm.ram, what, 0, 2 * PAGE)
    for page in range(2):
        vm.load(page * PAGE)
        guest.load(RAM + page * PAGE)
        skip(guest)
        guest.store(RAM + page * PAGE, 0x77)
        skip(guest)
        vm.load(page * PAGE)
    guest.load(RAM + 2 * PAGE)


def bad_munmap(bench: Bench) -> None:
    """munmap."""
    _change(bench, Change.UNMAP)


def bad_map_over(bench: Bench) -> None:
    """mmap with MAP_FIXED: the host sees new pages, the guest its own."""
    _change(bench, Change.REPLACE)


def bad_no_access(bench: Bench) -> None:
    """mprotect: the host may not touch the pages at all."""
    _change(bench, Change.NO_ACCESS)


def bad_read_only(bench: Bench) -> None:
    """mprotect: the host may only read them."""
    _change(bench, Change.READ_ONLY)


def good_dontneed(bench: Bench) -> None:
    """MADV_DONTNEED: the host gets new pages when it looks."""
    _change(bench, Change.DONTNEED)


def good_advice(bench: Bench) -> None:
    """Advice that changes nothing that anybody could see."""
    for what in (Change.FREE, Change.COLD, Change.PAGEOUT, Change.POPULATE, Change.LOCK):
        vm, guest = _touched(bench, name=what.name)
        change(bench, vm.ram, what, 0, 2 * PAGE)
        vm.load(0)
        guest.load(RAM)
        guest.load(RAM + PAGE)


def bad_not_protected(bench: Bench) -> None:
    """A guest that is not protected loses what the VMM loses, and sees what it sees."""
    for what in (Change.UNMAP, Change.REPLACE, Change.NO_ACCESS, Change.READ_ONLY, Change.DONTNEED):
        _change(bench, what, protected=False, name=what.name)


def good_protect_and_back(bench: Bench) -> None:
    """Rights taken and given back."""
    for protected in (True, False):
        vm, guest = _touched(bench, protected=protected, name="" if protected else "other ")
        change(bench, vm.ram, Change.READ_ONLY, 0, None)
        change(bench, vm.ram, Change.READ_WRITE, 0, None)
        guest.load(RAM)
        guest.store(RAM + PAGE, 0x99)
        vm.load(PAGE)
        vm.store(2 * PAGE, b"\x11")


def bad_hole(bench: Bench) -> None:
    """MADV_REMOVE of a memfd's page: the file loses it, the guest does not."""
    for protected in (True, False):
        name = "" if protected else "other "
        ram = memory(bench, f"{name}ram", 4, Backing.MEMFD)
        assert ram is not None
        vm = bench.vm(protected=protected, ram=ram, name=name)
        guest = vm.agent()
        guest.store(RAM, 0x5EC2E7)
        change(bench, ram, Change.REMOVE)
        vm.load(0)
        vm.store(0, b"\x11")
        guest.load(RAM)
        vm.load(0)


def bad_hole_in_private_memory(bench: Bench) -> None:
    """MADV_REMOVE needs a shared object."""
    for backing in (Backing.ANONYMOUS, Backing.MEMFD_PRIVATE, Backing.ZERO):
        ram = memory(bench, "ram", 2, backing)
        assert ram is not None
        change(bench, ram, Change.REMOVE)


def good_shared_object(bench: Bench) -> None:
    """MADV_DONTNEED of a shared object's page: it is there as before."""
    for protected in (True, False):
        name = "" if protected else "other "
        ram = memory(bench, f"{name}ram", 2, Backing.SHARED)
        assert ram is not None
        vm = bench.vm(protected=protected, ram=ram, name=name)
        guest = vm.agent()
        guest.store(RAM, 0x5EC2E7)
        change(bench, ram, Change.DONTNEED)
        vm.load(0)
        guest.load(RAM)
        change(bench, ram, Change.FREE)


def bad_moved(bench: Bench) -> None:
    """mremap: the guest's page goes along, what it touches now is at the old address."""
    for protected in (True, False):
        vm, guest = _touched(bench, protected=protected, name="" if protected else "other ")
        move = partial(vm.ram.move, 0, 2 * PAGE)
        moved = bench.call("mremap", "2 pages", move, lambda _: "ok")
        assert moved is not None
        bench.keep(moved)
        bench.name("moved", moved)
        bench.load(moved, 0)
        bench.load(moved, PAGE)
        vm.load(0)
        guest.load(RAM)
        skip(guest)
        guest.load(RAM + PAGE)
        skip(guest)
        guest.load(RAM + 2 * PAGE)


def good_map_over_while_shared(bench: Bench) -> None:
    """A page that the guest shares, and that the VMM maps over: it shares one nobody sees."""
    vm, guest = _touched(bench)
    guest.hvc(SHARE, RAM)
    vm.load(0)
    change(bench, vm.ram, Change.REPLACE)
    vm.load(0)
    vm.store(0, b"\x11")
    guest.load(RAM)
    guest.hvc(UNSHARE, RAM)
    vm.load(0)
    guest.hvc(SHARE, RAM)
    vm.load(0)


def bad_nothing_mapped(bench: Bench) -> None:
    """Changes where nothing is mapped any more."""
    ram = memory(bench, "ram", 2)
    assert ram is not None
    change(bench, ram, Change.UNMAP)
    bench.load(ram, 0)
    bench.store(ram, 0, b"\x11")
    for what in (Change.DONTNEED, Change.READ_ONLY, Change.POPULATE, Change.LOCK, Change.UNMAP):
        change(bench, ram, what)
    bench.load(ram, PAGE)
