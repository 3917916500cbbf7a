# SPDX-License-Identifier: GPL-2.0-or-later
"""The system calls of the /dev/kvm back-end, on this computer's kernel: errors, numbers, kicks.

A KVM_RUN that blocks is stood in for by another ioctl that waits until a signal
comes: the one that receives a seccomp notification (seccomp(2)).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkvm.kvm import dev_kernel, kicks
from pkvm.kvm.advice import NOT_PROTECTED, explained
from pkvm.kvm.dev_kernel import DevKernel
from pkvm.uapi.kvm import TYPE_PROTECTED, Ioctl


@pytest.fixture
def kernel() -> DevKernel:
    return DevKernel()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_open_and_close(kernel: DevKernel) -> None:
    fd = kernel.open("/dev/null")
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    kernel.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        kernel.close(fd)
    assert caught.value.errno == errno.EBADF
    with pytest.raises(FileNotFoundError):
        kernel.open("/dev/there-is-none")


@pytest.mark.parametrize("fd", [-1, 1 << 31, 1 << 70])
def test_a_number_that_is_no_descriptor_is_ebadf(kernel: DevKernel, fd: int) -> None:
    for call in (
        lambda: kernel.ioctl(fd, Ioctl.GET_API_VERSION),
        lambda: kernel.close(fd),
        lambda: kernel.mmap_vcpu(fd, 4096),
    ):
        with pytest.raises(OSError, match="not open") as caught:
            call()
        assert caught.value.errno == errno.EBADF


def test_another_file_knows_no_kvm(kernel: DevKernel, pipe: tuple[int, int]) -> None:
    with pytest.raises(OSError, match="ioctl") as caught:
        kernel.ioctl(pipe[0], Ioctl.GET_API_VERSION)
    assert caught.value.errno == errno.ENOTTY
    eventfd = os.eventfd(0)
    with pytest.raises(OSError, match="device") as caught:
        kernel.mmap_vcpu(eventfd, 4096)
    os.close(eventfd)
    assert caught.value.errno == errno.ENODEV


def test_what_the_kernel_writes_comes_back(kernel: DevKernel, pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"seven..")
    buffer = bytearray(8)
    assert kernel.ioctl(pipe[0], termios.FIONREAD, buffer) == 0
    assert struct.unpack_from("<i", buffer) == (7,)


def test_a_number_beyond_a_c_int_is_an_unsigned_long(
    kernel: DevKernel, pipe: tuple[int, int]
) -> None:
    """Such as a machine type with bit 31, or a pointer to user memory."""
    memory = kernel.mmap(4096)
    assert memory.address >= 1 << 31
    os.write(pipe[1], b"four")
    assert kernel.ioctl(pipe[0], termios.FIONREAD, memory.address) == 0
    assert memory.read(0, 4) == struct.pack("<i", 4)
    with pytest.raises(OSError, match="Bad address") as caught:
        kernel.ioctl(pipe[0], termios.FIONREAD, 1 << 63)
    assert caught.value.errno == errno.EFAULT
    memory.close()


@pytest.mark.parametrize(
    ("request_", "buffer"),
    [
        (Ioctl.ARM_VCPU_INIT, bytearray(31)),
        (Ioctl.GET_REG_LIST, bytearray(7)),
        (Ioctl.GET_REG_LIST, bytearray((2).to_bytes(8, "little") + bytes(15))),
    ],
)
def test_a_buffer_that_is_too_short_never_reaches_the_kernel(
    kernel: DevKernel, pipe: tuple[int, int], request_: int, buffer: bytearray
) -> None:
    with pytest.raises(OSError, match="needs a bytearray") as caught:
        kernel.ioctl(pipe[0], request_, buffer)
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(OSError, match="ioctl") as caught:
        kernel.ioctl(pipe[0], request_, buffer + bytearray(1))
    assert caught.value.errno == errno.ENOTTY


def test_errors_that_have_a_remedy_say_it() -> None:
    def error(number: int) -> OSError:
        return OSError(number, os.strerror(number))

    said = explained(Ioctl.CREATE_VM, TYPE_PROTECTED, error(errno.EINVAL))
    assert (said.errno, NOT_PROTECTED in str(said)) == (errno.EINVAL, True)
    assert "kvm-arm.mode=protected" in NOT_PROTECTED
    assert explained(Ioctl.CREATE_VM, 7, error(errno.EINVAL)).strerror == "Invalid argument"
    assert "ulimit -l" in str(explained(Ioctl.RUN, 0, error(errno.ENOMEM)))
    assert isinstance(explained(Ioctl.RUN, 0, error(errno.EINTR)), InterruptedError)


def test_a_run_page_is_shared_and_unmapped(
    kernel: DevKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kicks.INTERRUPTER, "_users", 0)
    fd = os.memfd_create("vcpu")
    os.ftruncate(fd, 8192)
    before = signal.getsignal(kicks.SIGNAL)
    page = kernel.mmap_vcpu(fd, 8192)
    page.view[1] = 7
    assert os.pread(fd, 2, 0) == b"\0\x07"
    os.pwrite(fd, b"exit", 8)
    assert bytes(page.view[8:12]) == b"exit"
    assert handled(kicks.SIGNAL)
    page.close()
    page.close()
    assert not handled(kicks.SIGNAL)
    assert signal.getsignal(kicks.SIGNAL) == before
    with pytest.raises(OSError, match="cannot map") as caught:
        kernel.mmap_vcpu(fd, 0)
    assert caught.value.errno == errno.EINVAL
    os.close(fd)


def test_what_handled_the_signal_before_does_so_again(kernel: DevKernel) -> None:
    heard: list[int] = []
    fd = os.memfd_create("vcpu")
    os.ftruncate(fd, mmap.PAGESIZE)
    before = signal.signal(kicks.SIGNAL, lambda number, frame: heard.append(number))
    try:
        first = kernel.mmap_vcpu(fd, mmap.PAGESIZE)
        second = kernel.mmap_vcpu(fd, mmap.PAGESIZE)
        first.close()
        signal.raise_signal(kicks.SIGNAL)
        assert heard == []  # a kick is not Python's business
        second.close()
        signal.raise_signal(kicks.SIGNAL)
        assert heard == [kicks.SIGNAL]
    finally:
        signal.signal(kicks.SIGNAL, before)
        os.close(fd)


def test_a_kick_of_nobody_does_nothing(kernel: DevKernel) -> None:
    kernel.kick(0)
    kernel.kick(-1)
    thread = threading.Thread(target=lambda: runners.update({5: threading.get_native_id()}))
    runners = kicks.Runners()
    thread.start()
    thread.join()
    runners.kick(5)  # the thread has ended


WAITER = '''
import ctypes, fcntl, os, platform, struct, threading, time
from pkvm.kvm import dev_kernel
from pkvm.kvm.dev_kernel import DevKernel
from pkvm.uapi.kvm import Ioctl

libc = ctypes.CDLL(None, use_errno=True)
PR_SET_NO_NEW_PRIVS, SET_MODE_FILTER, NEW_LISTENER = 38, 1, 8
SECCOMP = {"x86_64": 317, "aarch64": 277}[platform.machine()]
allow = ctypes.create_string_buffer(struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000))
program = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", 1, ctypes.addressof(allow)))
libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
listener = libc.syscall(SECCOMP, SET_MODE_FILTER, NEW_LISTENER, program)
assert listener >= 0, os.strerror(ctypes.get_errno())
RECEIVE = 0xC0502100  # SECCOMP_IOCTL_NOTIF_RECV
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t) + (ctypes.c_int,) * 3 + (ctypes.c_long,)
notification = libc.mmap(0x20000000, 4096, 3, 0x22, -1, 0)  # where an address is a C int
assert notification == 0x20000000
dev_kernel._ioctl = lambda fd, request, arg: fcntl.ioctl(fd, RECEIVE, notification)

kernel = DevKernel()
fd = os.memfd_create("vcpu")
os.ftruncate(fd, 4096)
page = kernel.mmap_vcpu(fd, 4096)
results = []

def run():
    for _ in range(3):
        try:
            results.append(kernel.ioctl(listener, Ioctl.RUN))
        except InterruptedError:
            results.append("EINTR")

def waits(thread):
    """Whether the thread waits in the ioctl."""
    with open(f"/proc/self/task/{thread.native_id}/syscall") as file:
        words = file.read().split()
    return len(words) > 2 and int(words[2], 16) & 0xFFFFFFFF == RECEIVE

thread = threading.Thread(target=run)
thread.start()
for times in (1, 2, 3):
    while not waits(thread):
        time.sleep(0.001)
    assert len(results) == times - 1, results
    kernel.kick(listener)
    while len(results) < times:
        time.sleep(0.001)
thread.join()
kernel.kick(listener)  # the thread is gone
page.close()
print(*results)
'''


def test_a_kick_ends_an_ioctl_that_waits() -> None:
    """And only a kick: other threads run meanwhile, and Python does not try again by itself."""
    done = subprocess.run(
        [sys.executable, "-c", WAITER],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(dev_kernel.__file__).parents[2])},
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["EINTR"] * 3


def handled(number: int) -> bool:
    """Whether this process catches the signal (proc(5), SigCgt)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> number - 1 & 1)
