# SPDX-License-Identifier: GPL-2.0-or-later
"""The host pays for guests' tables: lists of pages that EL2 does not trust."""

from __future__ import annotations

import pytest

from fakes.memory_rig import DEVICE, Rig, RigVm
from pkvm.hyp.errors import Errno, Refused
from pkvm.machine.stage2 import Stage2Fault


def test_pages_are_taken_zeroed_and_given_back_linked(rig: Rig) -> None:
    vm = rig.vm(tables=0)
    pages = [(rig.first_pfn + at) << 12 for at in (5, 3, 900)]
    for pa in pages:
        rig.host_bus.write(pa, b"\xff" * 4096)
    assert vm.memcache.topup(rig.link(pages), 3) == 3
    assert vm.memcache.pages() == pages
    for pa in pages:
        assert rig.state(pa >> 12) == ("NOPAGE", "OWNED")
        assert rig.memory.read(pa + 8, 4088) == bytes(4088)
        with pytest.raises(Stage2Fault):
            rig.host_bus.read(pa, 8)
    assert vm.memcache.drain() == (pages[0], 3)
    assert [rig.host_bus.read_u64(pa) for pa in pages] == [pages[1], pages[2], 0]
    assert vm.memcache.drain() == (0, 0)


def test_more_in_the_list_than_asked_for_stays_the_hosts(rig: Rig) -> None:
    vm = rig.vm(tables=0)
    pages = [(rig.first_pfn + at) << 12 for at in range(3)]
    assert vm.memcache.topup(rig.link(pages), 2) == 2
    assert rig.state(rig.first_pfn + 2) == ("OWNED", "NOPAGE")


@pytest.mark.parametrize(
    "bad", ["unaligned", "device", "hyp", "end", "circle", "beyond", "shared", "odd"]
)
@pytest.mark.parametrize("good", [0, 1, 4])
def test_a_bad_page_in_the_list(rig: Rig, vm: RigVm, bad: str, good: int) -> None:
    """None is taken, and those before the bad one are as they were."""
    pages = [(rig.first_pfn + at) << 12 for at in range(good)]
    rig.mem.host_share_hyp(rig.first_pfn + 70)
    last = {
        "unaligned": (rig.first_pfn + 50 << 12) + 8,
        "odd": (rig.first_pfn + 50 << 12) + 1,
        "device": DEVICE,
        "hyp": rig.carveout[0],
        "end": 0,
        "circle": pages[0] if pages else vm.stage2.root,
        "beyond": (1 << 64) - 4096,
        "shared": rig.first_pfn + 70 << 12,
    }[bad]
    if pages:
        rig.link(pages)
        rig.host_bus.write_u64(pages[-1], last)
        rig.host_bus.write(pages[-1] + 8, b"still here")
    with pytest.raises(Refused) as refusal:
        vm.memcache.topup(pages[0] if pages else last, good + 1)
    assert refusal.value.errno == Errno.ENOMEM
    assert refusal.value.pa == last
    assert vm.memcache.available == 8
    for pa in pages:
        assert rig.state(pa >> 12) == ("OWNED", "NOPAGE")
    if pages:
        assert rig.host_bus.read_u64(pages[-1]) == last
        assert rig.host_bus.read(pages[-1] + 8, 10) == b"still here"


@pytest.mark.parametrize("nr", [0, -1, 1 << 40, (1 << 64) - 1])
def test_counts_that_cannot_be(rig: Rig, vm: RigVm, nr: int) -> None:
    with rig.refused(Errno.EINVAL, "count"):
        vm.memcache.topup(rig.first_pfn << 12, nr)


def test_the_link_is_read_when_the_host_cannot_change_it(rig: Rig) -> None:
    """The host rewrites the link in the last moment before the donation: EL2 reads the last
    word, and could not read another later (facts §12, 5)."""
    vm = rig.vm(tables=0)
    pages = [(rig.first_pfn + at) << 12 for at in range(3)]
    rig.link(pages)
    donate = rig.mem.host.take_page

    def race(pa: int, annotation: int) -> None:
        if pa == pages[0]:
            rig.host_bus.write_u64(pages[0], pages[2])
        donate(pa, annotation)
        with pytest.raises(Stage2Fault):
            rig.host_bus.write_u64(pa, rig.carveout[0])

    rig.mem.host.take_page = race  # type: ignore[method-assign]
    assert vm.memcache.topup(pages[0], 2) == 2
    assert vm.memcache.pages() == [pages[0], pages[2]]


def test_roots_are_checked(rig: Rig) -> None:
    cache = rig.mem.new_memcache()
    pa = rig.pages(4)
    assert rig.mem.pgd_bytes == 0x2000
    with rig.refused(Errno.EPERM):
        rig.mem.new_guest_stage2(pa, 1, cache)
    rig.mem.host_donate_hyp(pa >> 12, 4)
    for bad in (pa + 4096, pa + 8):
        with rig.refused(Errno.EINVAL, "alignment"):
            rig.mem.new_guest_stage2(bad, 1, cache)
    rig.memory.write(pa, b"\xff" * 0x2000)
    stage2 = rig.mem.new_guest_stage2(pa, 1, cache)
    assert stage2.leaf(0) == (0, 1)
    with rig.refused(Errno.EBUSY):
        rig.mem.new_guest_stage2(pa, 1, cache)
    with rig.refused(Errno.EBUSY):
        rig.mem.hyp_donate_host(pa >> 12, 4)
    stage2.destroy()
    assert cache.drain()[1] == 2
