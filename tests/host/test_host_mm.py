# SPDX-License-Identifier: GPL-2.0-or-later
"""The VMM's address space and its memory objects."""

from __future__ import annotations

import pytest

from fakes.host_fakes import BLOCK, PAGE, Rig, errno_of
from pkvm.uapi.errors import ProtectedPageError

EINVAL, ENOMEM, EFAULT = 22, 12, 14


def lose(rig: Rig, pa: int) -> None:
    rig.bus.lost.add(pa // PAGE)


def test_mmap_is_zeroed_rounded_up_and_given_back() -> None:
    rig = Rig()
    memory = rig.kernel.mmap(PAGE + 1)
    assert memory.length == 2 * PAGE
    assert memory.address % PAGE == 0
    assert memory.read(0, 2 * PAGE) == bytes(2 * PAGE)
    memory.write(PAGE - 2, b"abcd")
    assert memory.read(PAGE - 2, 4) == b"abcd"
    memory.close()
    memory.close()
    assert rig.kernel.free_pages == rig.pages_at_start


def test_mmap_refuses_lengths_as_linux_does() -> None:
    rig = Rig()
    assert errno_of(lambda: rig.kernel.mmap(0)) == EINVAL
    assert errno_of(lambda: rig.kernel.mmap(-5)) == EINVAL
    for length in (1 << 40, 1 << 47, 1 << 70):
        assert errno_of(rig.kernel.mmap, length) == ENOMEM


def test_addresses_are_never_used_twice() -> None:
    rig = Rig()
    seen = set()
    for _ in range(4):
        memory = rig.kernel.mmap(BLOCK)
        seen.add(memory.address)
        memory.close()
    assert len(seen) == 4


def test_access_outside_or_after_close_is_the_callers_mistake() -> None:
    memory = Rig().kernel.mmap(PAGE)
    for offset, length in ((-1, 2), (PAGE - 1, 2), (0, -1), (1 << 70, 1)):
        with pytest.raises(ValueError, match="outside"):
            memory.read(offset, length)
    memory.close()
    with pytest.raises(ValueError, match="closed"):
        memory.write(0, b"x")


@pytest.mark.parametrize("system_call", [False, True])
def test_a_lost_page_is_refused_with_the_first_refused_address(system_call: bool) -> None:
    rig = Rig()
    memory = rig.kernel.mmap(4 * PAGE)
    read = memory.syscall_read if system_call else memory.read
    write = memory.syscall_write if system_call else memory.write
    memory.write(0, b"k" * 4 * PAGE)
    lose(rig, memory.mapping.run.pa + 2 * PAGE)

    with pytest.raises(ProtectedPageError) as caught:
        read(100, 3 * PAGE)
    assert caught.value.address == memory.address + 2 * PAGE
    assert caught.value.errno == EFAULT
    with pytest.raises(ProtectedPageError) as caught:
        write(2 * PAGE + 7, b"x")
    assert caught.value.address == memory.address + 2 * PAGE + 7
    assert read(0, 2 * PAGE) == b"k" * 2 * PAGE
    assert read(3 * PAGE, PAGE) == b"k" * PAGE


def test_a_store_writes_what_comes_before_the_refused_page() -> None:
    rig = Rig()
    memory = rig.kernel.mmap(2 * PAGE)
    lose(rig, memory.mapping.run.pa + PAGE)
    with pytest.raises(ProtectedPageError):
        memory.write(PAGE - 1, b"ab")
    assert memory.read(PAGE - 1, 1) == b"a"
