# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_SET_USER_MEMORY_REGION's rules, in Linux's order."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.host_fakes import BLOCK, PAGE, Rig, errno_of
from pkvm.host.memslots import MemSlots
from pkvm.uapi.kvm import MEM_SLOTS_NUM, MEMORY_REGION, Ioctl, MemFlag

EINVAL, EEXIST, EFAULT = 22, 17, 14
USER = 0x7F00_0000_0000
GUEST = 0x4000_0000


def region(
    number: int = 0, flags: int = 0, ipa: int = GUEST, size: int = BLOCK, user: int = USER
) -> bytes:
    return MEMORY_REGION.pack(number, flags, ipa, size, user)


def slots_with_one() -> MemSlots:
    slots = MemSlots(40)
    slots.apply(slots.plan(region()))
    return slots


@pytest.mark.parametrize(
    "bad",
    [
        region(flags=MemFlag.GUEST_MEMFD),
        region(flags=1 << 31),
        region(size=BLOCK + 1),
        region(ipa=GUEST + 8),
        region(user=USER + 1),
        region(user=1 << 48),
        region(user=(1 << 64) - PAGE),
        region(number=MEM_SLOTS_NUM),
        region(number=1 << 16),
        region(ipa=(1 << 64) - PAGE, size=2 * PAGE),
        region(size=1 << 45),
        region(number=9, size=0),
    ],
)
def test_bad_regions_are_invalid(bad: bytes) -> None:
    assert errno_of(lambda: slots_with_one().plan(bad)) == EINVAL


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (region(user=USER + BLOCK), EINVAL),
        (region(size=2 * BLOCK), EINVAL),
        (region(flags=MemFlag.READONLY), EINVAL),
        (region(number=1, ipa=GUEST + BLOCK - PAGE), EEXIST),
        (region(number=1, ipa=GUEST - PAGE, size=2 * PAGE), EEXIST),
        (region(number=1, ipa=1 << 40), EFAULT),
        (region(ipa=(1 << 40) - PAGE), EFAULT),
        (region(), 0),
        (region(flags=MemFlag.LOG_DIRTY_PAGES), 0),
        (region(ipa=GUEST + PAGE), 0),
        (region(size=0), 0),
        (region(number=1, ipa=GUEST + BLOCK), 0),
        (region(number=MEM_SLOTS_NUM - 1, ipa=(1 << 40) - BLOCK), 0),
    ],
)
def test_changes_beside_an_existing_slot(change: bytes, expected: int) -> None:
    assert errno_of(lambda: slots_with_one().plan(change)) == expected


def test_a_slot_without_memory_behind_it_is_accepted() -> None:
    rig = Rig()
    rig.slot(rig.vm(), 0, GUEST, BLOCK, 0x1000_0000)


def test_a_short_buffer_is_efault_and_changes_nothing() -> None:
    rig = Rig()
    vm = rig.vm()
    request = Ioctl.SET_USER_MEMORY_REGION
    assert errno_of(lambda: rig.kernel.ioctl(vm, request, bytearray(31))) == EFAULT
    assert errno_of(lambda: rig.kernel.ioctl(vm, request, 0)) == EFAULT
    rig.slot(vm, 0, GUEST, BLOCK, USER)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 12), st.integers(0, 4)), min_size=1, max_size=30
    ),
    st.integers(0, 16),
)
def test_slots_never_overlap_and_lookup_agrees(
    changes: list[tuple[int, int, int]], probe: int
) -> None:
    slots = MemSlots(40)
    for number, at, count in changes:
        try:
            plan = slots.plan(region(number, 0, at * PAGE, count * PAGE, USER + number * BLOCK))
        except OSError:
            continue
        slots.apply(plan)
    listed = list(slots)
    assert [slot.ipa for slot in listed] == sorted(slot.ipa for slot in listed)
    assert all(a.end <= b.ipa for a, b in pairwise(listed))
    inside = [slot for slot in listed if slot.ipa <= probe * PAGE < slot.end]
    assert slots.at(probe * PAGE + 5) == (inside[0] if inside else None)
