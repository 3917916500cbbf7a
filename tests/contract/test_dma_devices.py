# SPDX-License-Identifier: GPL-2.0-or-later
"""A VMM's device whose data moves by DMA: it reaches what the guest shares; the SMMU sees to it."""

from __future__ import annotations

import errno
import os

import pytest

from fakes.contract_rig import FIRMWARE_SLOT, PAGE, RAM_IPA, Rig, rig
from pkvm.events import DmaFault, Event, SmmuEvent, Transition
from pkvm.machine.machine import SG_STREAM
from pkvm.system import System
from pkvm.uapi.errors import ProtectedPageError
from pkvm.uapi.kvm import DmaMove
from pkvm.vmm.dma_memory import BUFFER_BYTES, DmaMemory
from pkvm.vmm.errors import LoadError

MEM_SHARE = 0xC600_0003


class Log:
    """Keeps what the SMMU and the devices announce."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def record(self, event: Event, /) -> None:
        if isinstance(event, (SmmuEvent, DmaFault)):
            self.events.append(event)
        assert not isinstance(event, Transition) or event.npages > 0


def move(made: Rig, fd: int, *parts: tuple[int, int, int], count: int | None = None) -> int:
    """MOVE; the bytes that were moved."""
    head = DmaMove.HEADER.pack(len(parts) if count is None else count, 99)
    buffer = bytearray(head + b"".join(DmaMove.PART.pack(*part) for part in parts))
    try:
        made.kvm.kernel.ioctl(fd, DmaMove.MOVE, buffer)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
    moved: int = DmaMove.HEADER.unpack_from(buffer)[1]
    return moved


def test_it_moves_whatever_the_host_owns() -> None:
    with rig() as made:
        memory = DmaMemory(made.kvm.kernel, made.ram)
        data = os.urandom(BUFFER_BYTES + 3 * PAGE + 5)
        data = data[: made.ram.length - 7]
        memory.write(7, data)
        assert made.ram.read(7, len(data)) == data
        assert memory.read(7, len(data)) == data
        assert memory.read(0, 0) == b""
        memory.close()


def test_it_stops_at_the_first_byte_that_the_guest_keeps() -> None:
    log = Log()
    with rig(recorder=log) as made:
        vcpu = made.vm.create_vcpu(0)
        vcpu.init()
        memory = DmaMemory(made.kvm.kernel, made.ram)
        made.ram.write(PAGE, b"shared before")
        made.vm.protect(FIRMWARE_SLOT)
        for attempt in (lambda: memory.read(PAGE + 3, 8), lambda: memory.write(PAGE + 3, b"x")):
            with pytest.raises(ProtectedPageError) as refused:
                attempt()
            assert refused.value.address == made.ram.address + PAGE + 3
        kinds = [(event.stream, event.event) for event in log.events if type(event) is SmmuEvent]
        assert kinds == [(SG_STREAM, "F_TRANSLATION")] * 2
        agent = made.agent(vcpu)
        assert agent.hvc(MEM_SHARE, RAM_IPA + PAGE, 1, 0)[:2] == (0, 1)
        assert memory.read(PAGE, 13) == b"shared before"
        memory.write(2 * PAGE - 4, b"wxyz")
        assert agent.load(RAM_IPA + 2 * PAGE - 8) >> 32 == int.from_bytes(b"wxyz", "little")
        with pytest.raises(ProtectedPageError) as refused:
            memory.read(2 * PAGE - 4, 8)
        assert refused.value.address == made.ram.address + 2 * PAGE
        with pytest.raises(ProtectedPageError) as refused:
            memory.write(2 * PAGE - 4, b"12345678")
        assert refused.value.address == made.ram.address + 2 * PAGE
        assert made.ram.read(2 * PAGE - 4, 4) == b"1234", "what came before has been written"


def test_many_parts_and_where_they_end() -> None:
    with rig() as made:
        fd = made.kvm.kernel.open("/dev/dma-sg")
        base = made.ram.address
        made.ram.write(0, bytes(range(64)))
        parts = [(base + n, base + PAGE + 2 * n, 1) for n in range(DmaMove.MAX_PARTS)]
        for _ in range(20):  # around the ring
            assert move(made, fd, *parts) == DmaMove.MAX_PARTS
        assert made.ram.read(PAGE, 32)[::2] == bytes(range(16))
        made.vm.create_vcpu(0)
        free = made.kvm.mmap(2 * PAGE)
        made.vm.protect(FIRMWARE_SLOT)
        good, bad = (free.address, free.address + PAGE, 100), (free.address, base, 100)
        assert move(made, fd, good, bad, good) == 100
        assert move(made, fd, bad) == 0
        assert move(made, fd, good, good) == 200


@pytest.mark.parametrize(
    ("count", "parts", "number"),
    [
        (0, 1, errno.EINVAL),
        (17, 1, errno.EINVAL),
        (1 << 63, 1, errno.EINVAL),
        (2, 1, errno.EFAULT),
    ],
)
def test_numbers_that_cannot_be(count: int, parts: int, number: int) -> None:
    with rig() as made:
        fd = made.kvm.kernel.open("/dev/dma-sg")
        part = (made.ram.address, made.ram.address, 1)
        with pytest.raises(OSError) as refused:  # noqa: PT011 - its number differs by row
            move(made, fd, *[part] * parts, count=count)
        assert refused.value.errno == number
        with pytest.raises(OSError, match="no ioctl"):
            made.kvm.kernel.ioctl(fd, DmaMove.MOVE + 1, bytearray(400))
        for wild in (0, 1 << 63, made.ram.address + made.ram.length - 1):
            for one in ((wild, part[0], 8), (part[0], wild, 8), (part[0], part[1], 1 << 63)):
                with pytest.raises(OSError, match=r"mapping|0x") as refused:
                    move(made, fd, one)
                assert refused.value.errno == errno.EFAULT


def test_a_machine_without_an_smmu_has_no_such_device() -> None:
    with System(memory=64 << 20, smmu=False) as system:
        kvm = system.open()
        with pytest.raises(LoadError, match="by DMA"):
            DmaMemory(kvm.kernel, kvm.mmap(PAGE))
        with pytest.raises(OSError, match="no '/dev/dma-copy'"):
            kvm.kernel.open("/dev/dma-copy")
        assert "dma" not in system.tables()
