# SPDX-License-Identifier: GPL-2.0-or-later
"""The same things done to memory of this computer's kernel and of the built-in host: the same ends.

No guest has the memory here; what changes then, the scenarios hold against a real pKVM host.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvm.kvm.dev_kernel import DevKernel
from pkvm.kvm.kernel import Kernel, Memory
from pkvm.system import System
from pkvm.uapi.errors import ProtectedPageError
from pkvm.uapi.memory import Backing, Change, Forced, SystemCall

PAGE = 4096
KINDS = (
    Backing.ANONYMOUS, Backing.SHARED, Backing.ZERO, Backing.HUGE, Backing.MEMFD,
    Backing.MEMFD_PRIVATE, Backing.TMPFS, Backing.TMPFS_PRIVATE,
)  # fmt: skip
"""What every Linux has: huge pages of the pool, files on a disk and memfd_secret not."""
WAYS = (Forced.PROC_MEM, Forced.PROCESS_VM, Forced.VMSPLICE)
CALLS = tuple(
    what
    for what in SystemCall
    if what not in (SystemCall.OPEN, SystemCall.NANOSLEEP, SystemCall.URANDOM)
)


@pytest.fixture(scope="module")
def kernels() -> Iterator[tuple[Kernel, Kernel]]:
    with System(dialect="upstream", memory=128 << 20) as system:
        yield DevKernel(), system.kernel


def end_of(memory: Memory, method: str, *arguments: object) -> str:
    """What comes of calling a method, in words."""
    try:
        value = getattr(memory, method)(*arguments)
    except ProtectedPageError:
        return "protected"
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return value.hex() if isinstance(value, bytes) else str(value)


def look(memory: Memory) -> list[str]:
    """Everything that can be seen of the first three pages, and what storing to them does."""
    ends = []
    for at in (0, PAGE, 2 * PAGE):
        ends += [end_of(memory, "read", at, 8), end_of(memory, "syscall_read", at, 8)]
        ends += [end_of(memory, "write", at + 4, b"new"), end_of(memory, "read", at, 8)]
        ends += [end_of(memory, "forced_read", at, 8, way) for way in WAYS]
        ends += [end_of(memory, "system_call", what, at, 8) for what in CALLS]
        ends.append(end_of(memory, "system_call", SystemCall.PWRITE, at + PAGE - 4, 8))
    return [*ends, end_of(memory, "read", PAGE - 4, 8)]


def filled(kernel: Kernel, backing: Backing) -> Memory:
    memory = kernel.mmap(8 * PAGE, backing)
    for page in range(8):
        memory.write(page * PAGE, bytes([page + 1]) * 8)
    return memory


@pytest.mark.parametrize("what", Change)
@pytest.mark.parametrize("backing", KINDS)
def test_changes(kernels: tuple[Kernel, Kernel], backing: Backing, what: Change) -> None:
    seen = []
    for kernel in kernels:
        memory = filled(kernel, backing)
        ends = [end_of(memory, "change", what, PAGE, PAGE), *look(memory)]
        ends.append(end_of(memory, "change", what, 0, 3 * PAGE))
        ends += look(memory)
        ends.append(end_of(memory, "change", Change.READ_WRITE, 0, 3 * PAGE))
        ends += look(memory)
        memory.close()
        seen.append(ends)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("first", [None, Change.NO_ACCESS, Change.READ_ONLY, Change.REPLACE])
@pytest.mark.parametrize("backing", KINDS)
def test_moves(kernels: tuple[Kernel, Kernel], backing: Backing, first: Change | None) -> None:
    seen = []
    for kernel in kernels:
        memory = filled(kernel, backing)
        if first is not None:
            memory.change(first, 0, 4 * PAGE)
        moved = memory.move(0, 4 * PAGE)
        assert moved.address != memory.address
        ends = look(moved) + look(memory)
        ends.append(end_of(memory, "move", 0, PAGE))
        ends.append(end_of(memory, "read", 4 * PAGE, 8))
        memory.close()
        ends += look(moved)
        moved.close()
        seen.append(ends)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("first", [None, Change.UNMAP, Change.REPLACE, Change.REMOVE])
@pytest.mark.parametrize("backing", [kind for kind in KINDS if kind.has_file])
def test_aliases(kernels: tuple[Kernel, Kernel], backing: Backing, first: Change | None) -> None:
    seen = []
    for kernel in kernels:
        memory = filled(kernel, backing)
        before = memory.alias()
        ends = [] if first is None else [end_of(memory, "change", first, PAGE, PAGE)]
        after = memory.alias()
        ends.append(end_of(memory, "forced_read", PAGE, 8, Forced.FILE))
        if backing.shared:
            ends.append(end_of(memory, "forced_write", 0, b"file", Forced.FILE))
        for one in (before, after, memory, after, before):
            ends += look(one)
        memory.close()
        ends += look(after)
        for one in (before, after):
            one.close()
        seen.append(ends)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("backing", [kind for kind in KINDS if not kind.has_file])
def test_anonymous_memory_has_no_alias(kernels: tuple[Kernel, Kernel], backing: Backing) -> None:
    for kernel in kernels:
        memory = kernel.mmap(PAGE, backing)
        assert end_of(memory, "alias") == "EINVAL"
        assert end_of(memory, "forced_read", 0, 1, Forced.FILE) in (
            "EBADF", "00",  # a read of /dev/zero, which has a descriptor
        )  # fmt: skip
        memory.close()


PARTS = st.tuples(st.integers(0, 5), st.integers(1, 6)).map(
    lambda part: (part[0] * PAGE, min(part[1], 6 - part[0]) * PAGE)
)
STEPS = st.one_of(
    st.tuples(st.just("change"), st.sampled_from(Change), PARTS),
    st.tuples(st.sampled_from(["write", "forced_write"]), st.integers(0, 255), PARTS),
    st.tuples(st.sampled_from(["read", "forced_read"]), st.sampled_from(WAYS), PARTS),
    st.tuples(st.just("alias"), st.none(), st.none()),
)


@settings(max_examples=60, deadline=None)
@given(backing=st.sampled_from(KINDS), steps=st.lists(STEPS, max_size=12))
def test_any_steps(kernels: tuple[Kernel, Kernel], backing: Backing, steps: list[Any]) -> None:
    seen = []
    for kernel in kernels:
        memories = [kernel.mmap(6 * PAGE, backing)]
        ends = []
        for number, (name, argument, part) in enumerate(steps):
            memory = memories[number % len(memories)]
            match name:
                case "change":
                    ends.append(end_of(memory, name, argument, *part))
                case "alias":
                    if backing.has_file:
                        memories.append(memory.alias())
                case "write" | "forced_write":
                    data = bytes([argument]) * (part[1] - 1)
                    ends.append(end_of(memory, name, part[0], data))
                case "read":
                    ends.append(end_of(memory, name, *part))
                case "forced_read":
                    ends.append(end_of(memory, name, *part, argument))
        for memory in memories:
            ends += [end_of(memory, "read", page * PAGE, PAGE) for page in range(6)]
            memory.close()
        seen.append(ends)
    assert seen[0] == seen[1]


def test_a_childs_memory_is_a_copy(kernels: tuple[Kernel, Kernel]) -> None:
    for kernel in kernels:
        memory = filled(kernel, Backing.ANONYMOUS)
        memory.change(Change.DOFORK)
        kernel.fork()
        assert memory.read(0, 8) == b"\1" * 8
        memory.close()


def test_a_file_needs_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    with pytest.raises(OSError, match="is on no disk: name a folder on one") as refused:
        DevKernel().mmap(PAGE, Backing.FILE)
    assert refused.value.errno == errno.ENODEV


def test_what_was_unmapped_is_not_unmapped_again() -> None:
    kernel = DevKernel()
    memory = kernel.mmap(4 * PAGE)
    memory.change(Change.UNMAP, PAGE, 2 * PAGE)
    others = [kernel.mmap(PAGE) for _ in range(64)]
    for other in others:
        other.write(0, b"another's")
    memory.close()
    assert all(other.read(0, 9) == b"another's" for other in others)
    for other in others:
        other.close()


def test_nothing_comes_where_something_was() -> None:
    kernel = DevKernel()
    with pytest.raises(OSError, match="allocate"):
        kernel.mmap(1 << 46)
    memory = kernel.mmap(16 * PAGE)
    memory.change(Change.UNMAP, 0, 8 * PAGE)
    moved = memory.move(8 * PAGE, 8 * PAGE)
    anywhere = [mmap.mmap(-1, PAGE) for _ in range(256)]
    others = [kernel.mmap(PAGE) for _ in range(64)]
    for page in range(16):
        with pytest.raises(OSError, match="nothing is mapped there"):
            memory.write(page * PAGE, b"lost")
    for one in (*others, moved, memory):
        one.close()
    assert len(anywhere) == 256, "held until here"


def test_descriptors_are_closed() -> None:
    kernel = DevKernel()
    before = len(list(Path("/proc/self/fd").iterdir()))
    memory = kernel.mmap(2 * PAGE, Backing.MEMFD)
    moved, alias = memory.move(0, PAGE), memory.alias()
    for one in (memory, moved, alias, memory):
        one.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_limit_of_locked_memory_holds_for_root_and_goes_back() -> None:
    kernel = DevKernel()
    memory = kernel.mmap(4 * PAGE)
    try:
        kernel.limit_memlock(PAGE)
        memory.change(Change.LOCK, 0, PAGE)
        with pytest.raises(OSError, match="mlock") as refused:
            memory.change(Change.LOCK, PAGE, PAGE)
        assert refused.value.errno in (errno.ENOMEM, errno.EPERM)
    finally:
        kernel.limit_memlock(None)
    memory.close()
