# SPDX-License-Identifier: GPL-2.0-or-later
"""Backing memory of every kind: what KVM can pin for a guest, and who sees what is in it."""

from __future__ import annotations

from pkvm.check.scenarios.bench import PAGE, RAM, Bench
from pkvm.check.scenarios.handling import forced_read, memory
from pkvm.check.scenarios.sharing import SHARE
from pkvm.uapi.memory import Backing, Forced

TITLE = "Backing memory of every kind"


def _touch(bench: Bench, backing: Backing, *, protected: bool) -> None:
    pages = 512 if backing is Backing.HUGE else 4
    ram = memory(bench, "ram", pages, backing)
    if ram is None:
        return
    vm = bench.vm(protected=protected, ram=ram)
    guest = vm.agent()
    guest.load(RAM)
    if bench.error is not None:
        guest.resume()
        return
    guest.store(RAM + PAGE, 0x77)
    vm.load(0)
    vm.load(PAGE)
    if protected:
        guest.hvc(SHARE, RAM + PAGE)
        vm.load(PAGE)


def good_anonymous(bench: Bench) -> None:
    """Anonymous memory."""
    _touch(bench, Backing.ANONYMOUS, protected=True)


def good_shared_anonymous(bench: Bench) -> None:
    """Anonymous memory that children would share."""
    _touch(bench, Backing.SHARED, protected=True)


def good_zero(bench: Bench) -> None:
    """A private mapping of /dev/zero."""
    _touch(bench, Backing.ZERO, protected=True)


def good_huge(bench: Bench) -> None:
    """A transparent huge page."""
    _touch(bench, Backing.HUGE, protected=True)


def good_memfd(bench: Bench) -> None:
    """A memfd."""
    _touch(bench, Backing.MEMFD, protected=True)


def good_memfd_private(bench: Bench) -> None:
    """A private mapping of a memfd: copies of its pages."""
    _touch(bench, Backing.MEMFD_PRIVATE, protected=True)


def good_tmpfs(bench: Bench) -> None:
    """A file on tmpfs."""
    _touch(bench, Backing.TMPFS, protected=True)


def good_tmpfs_private(bench: Bench) -> None:
    """A private mapping of a file on tmpfs."""
    _touch(bench, Backing.TMPFS_PRIVATE, protected=True)


def bad_hugetlb(bench: Bench) -> None:
    """Huge pages of the pool cannot be pinned for a protected guest."""
    _touch(bench, Backing.HUGETLB, protected=True)


def bad_hugetlb_shared(bench: Bench) -> None:
    """Shared ones neither."""
    _touch(bench, Backing.HUGETLB_SHARED, protected=True)


def bad_hugetlb_memfd(bench: Bench) -> None:
    """Those of a memfd neither."""
    _touch(bench, Backing.HUGETLB_MEMFD, protected=True)


def bad_file(bench: Bench) -> None:
    """A file that is written back to a disk."""
    _touch(bench, Backing.FILE, protected=True)


def good_file_private(bench: Bench) -> None:
    """Copies of such a file's pages."""
    _touch(bench, Backing.FILE_PRIVATE, protected=True)


def bad_secret(bench: Bench) -> None:
    """memfd_secret, which nobody may pin."""
    _touch(bench, Backing.SECRET, protected=True)


def good_not_protected(bench: Bench) -> None:
    """A guest that is not protected takes nearly everything."""
    for backing in (Backing.SHARED, Backing.MEMFD, Backing.HUGETLB, Backing.HUGE, Backing.FILE):
        _touch(bench, backing, protected=False)


def bad_secret_not_protected(bench: Bench) -> None:
    """But no memfd_secret."""
    _touch(bench, Backing.SECRET, protected=False)


def good_two_mappings(bench: Bench) -> None:
    """A second mapping of the same object sees no more of a private page."""
    for backing in (Backing.MEMFD, Backing.TMPFS):
        ram = memory(bench, "ram", 2, backing)
        assert ram is not None
        alias = bench.call("mmap", "the same object", ram.alias, lambda _: "ok")
        assert alias is not None
        bench.keep(alias)
        bench.name("alias", alias)
        vm = bench.vm(ram=ram, name=backing.name)
        bench.store(alias, 0, b"\x55")
        guest = vm.agent()
        guest.load(RAM)
        bench.load(alias, 0)
        bench.store(alias, 0, b"\x66")
        guest.hvc(SHARE, RAM)
        bench.load(alias, 0)
        bench.load(alias, PAGE)


def good_private_mapping(bench: Bench) -> None:
    """The guest's stores do not get into the file behind a private mapping."""
    for backing in (Backing.MEMFD_PRIVATE, Backing.TMPFS_PRIVATE):
        ram = memory(bench, "ram", 2, backing)
        assert ram is not None
        vm = bench.vm(ram=ram, name=backing.name)
        guest = vm.agent()
        guest.store(RAM, 0x5EC2E7)
        forced_read(bench, ram, way=Forced.FILE)
        vm.load(0)
        guest.load(RAM)


def bad_secret_by_force(bench: Bench) -> None:
    """Not even the kernel looks into memfd_secret."""
    ram = memory(bench, "ram", 1, Backing.SECRET)
    if ram is not None:
        bench.store(ram, 0, b"\x11")
        bench.load(ram, 0)
        for way in (Forced.PROC_MEM, Forced.PROCESS_VM, Forced.VMSPLICE):
            forced_read(bench, ram, way=way)
