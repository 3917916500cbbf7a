# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory on a real kernel: pages that this process may not touch are refused, and it lives.

What a protected guest's page is to its VMM, a page without any permission is
to this process: a load is SIGSEGV, a system call EFAULT.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pkvm.kvm import libc
from pkvm.kvm.dev_mapping import DevMapping
from pkvm.kvm.dev_memory import PAGE_SIZE, STAGE_BYTES, DevMemory, Stage
from pkvm.uapi.errors import ProtectedPageError
from pkvm.uapi.memory import Backing

PAGES = 8
NONE, READ, BOTH = mmap.PROT_READ & 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE


@contextmanager
def mapped(length: int) -> Iterator[DevMemory]:
    """Memory that does not ask whose fault a refusal is."""
    mapping = DevMapping.new(Stage(), length, Backing.ANONYMOUS)
    yield DevMemory(Stage(), mapping.address, mapping.length)
    mapping.close()


@pytest.fixture
def memory() -> Iterator[DevMemory]:
    with mapped(PAGES * PAGE_SIZE) as made:
        yield made


@pytest.fixture
def mapping() -> Iterator[DevMapping]:
    made = DevMapping.new(Stage(), PAGES * PAGE_SIZE, Backing.ANONYMOUS)
    yield made
    made.close()


def protect(memory: DevMemory, page: int, protection: int, pages: int = 1) -> None:
    start = memory.address + page * PAGE_SIZE
    assert libc.call("mprotect", start, pages * PAGE_SIZE, protection) == 0


def test_what_is_written_is_read(memory: DevMemory) -> None:
    assert memory.length == PAGES * PAGE_SIZE
    assert memory.address % PAGE_SIZE == 0
    assert memory.read(0, memory.length) == bytes(memory.length)
    memory.write(PAGE_SIZE - 3, b"across")
    memory.syscall_write(2 * PAGE_SIZE, b"by a system call")
    assert memory.read(PAGE_SIZE - 3, 6) == memory.syscall_read(PAGE_SIZE - 3, 6) == b"across"
    assert memory.syscall_read(2 * PAGE_SIZE, 16) == b"by a system call"
    assert memory.read(memory.length, 0) == b""
    memory.write(memory.length, b"")
    # The same bytes that a load of this process's own sees.
    assert ctypes.string_at(memory.address + PAGE_SIZE - 3, 6) == b"across"


def test_more_than_is_moved_at_a_time() -> None:
    data = os.urandom(3 * STAGE_BYTES - 7)
    with mapped(3 * STAGE_BYTES + 1) as memory:
        memory.write(5, data)
        assert memory.read(5, len(data)) == data
        assert memory.read(0, 5) == bytes(5)


@pytest.mark.parametrize("name", ["read", "syscall_read"])
@pytest.mark.parametrize("start", [0, 1, PAGE_SIZE - 1, PAGE_SIZE, 2 * PAGE_SIZE - 5])
def test_a_read_is_refused_at_the_first_byte(memory: DevMemory, name: str, start: int) -> None:
    protect(memory, 2, NONE)
    with pytest.raises(ProtectedPageError) as caught:
        getattr(memory, name)(start, memory.length - start)
    assert caught.value.address == memory.address + 2 * PAGE_SIZE
    assert caught.value.errno == errno.EFAULT
    assert getattr(memory, name)(start, 2 * PAGE_SIZE - start) == bytes(2 * PAGE_SIZE - start)


@pytest.mark.parametrize("name", ["write", "syscall_write"])
@pytest.mark.parametrize("start", [0, 1, PAGE_SIZE - 1, 2 * PAGE_SIZE - 65, 2 * PAGE_SIZE - 1])
@pytest.mark.parametrize("protection", [NONE, READ])
def test_a_write_is_refused_at_the_first_byte(
    memory: DevMemory, name: str, start: int, protection: int
) -> None:
    protect(memory, 2, protection)
    data = b"\xa5" * (memory.length - start)
    with pytest.raises(ProtectedPageError) as caught:
        getattr(memory, name)(start, data)
    assert caught.value.address == memory.address + 2 * PAGE_SIZE
    protect(memory, 2, BOTH)
    # What stands before the refused byte is written, and nothing from there on.
    assert memory.read(0, memory.length) == (
        bytes(start) + b"\xa5" * (2 * PAGE_SIZE - start) + bytes(6 * PAGE_SIZE)
    )


def test_a_refusal_inside_a_later_move_names_its_byte() -> None:
    page = (STAGE_BYTES + STAGE_BYTES // 2) // PAGE_SIZE
    with mapped(2 * STAGE_BYTES) as memory:
        protect(memory, page, NONE)
        for access in (
            lambda: memory.read(0, memory.length),
            lambda: memory.write(0, bytes(memory.length)),
        ):
            with pytest.raises(ProtectedPageError) as caught:
                access()
            assert caught.value.address == memory.address + page * PAGE_SIZE


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda m: m.read(0, 1), "load"),
        (lambda m: m.write(0, b"x"), "store"),
        (lambda m: m.syscall_read(0, 1), "system call's read"),
        (lambda m: m.syscall_write(0, b"x"), "system call's write"),
    ],
)
def test_the_words_are_those_of_the_model(
    memory: DevMemory, act: Callable[[DevMemory], object], words: str
) -> None:
    protect(memory, 0, NONE)
    with pytest.raises(ProtectedPageError, match=f"^\\[Errno 14\\] {words} of {memory.address:#x}"):
        act(memory)


def test_forced_access_goes_past_permissions(memory: DevMemory) -> None:
    memory.write(0, b"secret")
    protect(memory, 0, NONE)
    assert memory.forced_read(0, 6) == b"secret"
    memory.forced_write(PAGE_SIZE - 2, b"ab" * 3)
    assert memory.forced_read(PAGE_SIZE - 2, 6) == b"ababab"
    protect(memory, 0, BOTH)
    assert memory.read(PAGE_SIZE - 2, 6) == b"ababab"


def test_bounds_and_use_after_close(mapping: DevMapping) -> None:
    for offset, length in ((-1, 1), (0, -1), (0, mapping.length + 1), (mapping.length, 1)):
        with pytest.raises(ValueError, match="outside the mapping"):
            mapping.read(offset, length)
        with pytest.raises(ValueError, match="outside the mapping"):
            mapping.forced_read(offset, length)
    address = mapping.address
    mapping.close()
    mapping.close()
    assert not any(line.startswith(f"{address:x}-") for line in maps())
    with pytest.raises(ValueError, match="closed"):
        mapping.read(0, 1)


@pytest.mark.parametrize("length", [0, -1])
def test_nothing_cannot_be_mapped(length: int) -> None:
    with pytest.raises(OSError, match="cannot map") as caught:
        DevMapping.new(Stage(), length, Backing.ANONYMOUS)
    assert caught.value.errno == errno.EINVAL


def test_what_does_not_fit_is_enomem() -> None:
    with pytest.raises(OSError, match="Cannot allocate") as caught:
        DevMapping.new(Stage(), 1 << 62, Backing.ANONYMOUS)
    assert caught.value.errno == errno.ENOMEM


def test_a_right_that_this_process_lacks_is_not_el2s_doing(mapping: DevMapping) -> None:
    protect(mapping, 1, READ)
    assert mapping.read(0, 2 * PAGE_SIZE) == bytes(2 * PAGE_SIZE)
    with pytest.raises(OSError, match=f"no access to {mapping.address + PAGE_SIZE:#x}") as caught:
        mapping.write(PAGE_SIZE - 1, b"two")
    assert not isinstance(caught.value, ProtectedPageError)
    assert "it is mapped r--p" in str(caught.value)
    protect(mapping, 1, BOTH)


def test_an_int_that_is_minus_one_is_an_error() -> None:
    """As a long it may be 0xFFFFFFFF: open(3) gives an int."""
    with pytest.raises(OSError, match="Bad address") as caught:
        libc.call("open", 1, os.O_RDONLY)
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(OSError, match="Invalid argument"):
        libc.call("munmap", 1, PAGE_SIZE)


def test_a_child_does_not_get_it(mapping: DevMapping) -> None:
    """fork(2) makes a real kernel take a guest's pages by force: it must not copy them."""
    mapping.write(0, b"guest")
    child = os.fork()
    if not child:
        there = any(line.startswith(f"{mapping.address:x}-") for line in maps())
        os._exit(there)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert mapping.read(0, 5) == b"guest"


def test_threads_do_not_mix_their_bytes(memory: DevMemory) -> None:
    """One stage serves all memory of a kernel."""
    wrong: list[bytes] = []

    def work(page: int) -> None:
        content = bytes([page]) * PAGE_SIZE
        for _ in range(200):
            memory.write(page * PAGE_SIZE, content)
            found = memory.read(page * PAGE_SIZE, PAGE_SIZE)
            if found != content:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(page,)) for page in range(PAGES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_stage_is_closed_with_its_last_user() -> None:
    before = set(Path("/proc/self/fd").iterdir())
    stage = Stage()
    assert len(set(Path("/proc/self/fd").iterdir()) - before) > 0
    del stage
    assert set(Path("/proc/self/fd").iterdir()) == before


def maps() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()
