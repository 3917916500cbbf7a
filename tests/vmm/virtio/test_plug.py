# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio devices on a VM's board: a guest that shares its queues is served, one that does not is
told of in the report, and one that never stops asking does not keep the VMM from ending."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable

from fakes.fake_kernel import PAGE, FakeKernel, Guest, Load, Store, power_off
from fakes.virtio_driver import WRITE, Descriptor
from pkvm.kvm import Kvm
from pkvm.vmm.board import RAM_BASE, Board, virtio_base
from pkvm.vmm.faults import Faults
from pkvm.vmm.loader import load_image
from pkvm.vmm.virtio import mmio
from pkvm.vmm.virtio.bus import plug
from pkvm.vmm.virtio.device import VirtioDevice
from pkvm.vmm.virtio.rng import Entropy
from pkvm.vmm.vmm import Vmm

BOARD = Board(ram_bytes=8 << 20)
IMAGE = load_image(b"\x1f\x20\x03\xd5" * 4, BOARD)
SLOT = 9
RINGS, BUFFER = 0x40_0000, 0x40_1000
SIZE = 4


class RngGuest:
    """Sets the device in slot 9 up by its registers, asks once for 8 bytes, and powers off."""

    def __init__(self, *, shares: bool) -> None:
        self.kernel = FakeKernel(self.program)
        self.shares = shares
        self.magic = self.status = 0

    @property
    def memory(self) -> bytearray:
        return self.kernel.memories[0].bytes

    def program(self, _: int) -> Guest:
        window = virtio_base(SLOT)
        if self.shares:
            self.kernel.memories[0].shared.update((RINGS, BUFFER))
        self.magic = yield Load(window)
        for offset, value in (
            (mmio.STATUS, 3),
            (mmio.DRIVER_FEATURES_SEL, 1),
            (mmio.DRIVER_FEATURES, 3),
            (mmio.STATUS, 11),
            (mmio.QUEUE_NUM, SIZE),
            (mmio.QUEUE_DESC_LOW, RAM_BASE + RINGS),
            (mmio.QUEUE_DRIVER_LOW, RAM_BASE + RINGS + 0x400),
            (mmio.QUEUE_DEVICE_LOW, RAM_BASE + RINGS + 0x800),
            (mmio.QUEUE_READY, 1),
            (mmio.STATUS, 15),
        ):
            yield Store(window + offset, value)
        self.memory[RINGS : RINGS + 16] = Descriptor(RAM_BASE + BUFFER, 8, WRITE).pack()
        self.memory[RINGS + 0x400 : RINGS + 0x406] = struct.pack("<HHH", 0, 1, 0)
        yield Store(window + mmio.QUEUE_NOTIFY, 0)
        self.status = yield Load(window + mmio.STATUS)
        yield power_off()


def run(guest: RngGuest, backend: VirtioDevice, faults: Faults) -> str:
    with Vmm(
        Kvm(guest.kernel),
        BOARD,
        IMAGE,
        console=lambda _: None,
        plug=plug({SLOT: backend}, faults),
    ) as vmm:
        return vmm.run(20).kind


def test_a_guest_that_shares_is_served() -> None:
    guest, faults = RngGuest(shares=True), Faults()
    assert run(guest, Entropy(lambda length: b"entropy!"[:length]), faults) == "powered-off"
    assert guest.magic == mmio.MAGIC
    assert guest.status == 15
    assert guest.memory[BUFFER : BUFFER + 9] == b"entropy!\0"
    assert guest.memory[RINGS + 0x802 : RINGS + 0x80C] == struct.pack("<HII", 1, 0, 8)
    assert faults.lines() == []


def test_a_guest_that_does_not_share_is_told_of() -> None:
    guest, faults = RngGuest(shares=False), Faults()
    assert run(guest, Entropy(), faults) == "powered-off"
    assert guest.status & mmio.NEEDS_RESET
    assert not any(guest.memory[BUFFER : BUFFER + PAGE])
    (line,) = faults.lines()
    assert line.startswith("virtio-rng (slot 9), queue requests at 0x40400000: the page is private")


def test_a_backend_lives_on_in_the_vms_next_life() -> None:
    backend = Entropy(lambda length: b"entropy!"[:length])
    for _ in range(2):
        guest = RngGuest(shares=True)
        assert run(guest, backend, Faults()) == "powered-off"
        assert guest.memory[BUFFER : BUFFER + 8] == b"entropy!"


def test_a_queue_that_never_empties_holds_nobody() -> None:
    """Another CPU of the guest's may add buffers as fast as they are used."""
    guest, faults = RngGuest(shares=True), Faults()
    asked = threading.Event()

    def refill(length: int) -> bytes:
        index = int.from_bytes(guest.memory[RINGS + 0x402 : RINGS + 0x404], "little")
        guest.memory[RINGS + 0x402 : RINGS + 0x404] = (index + 1 & 0xFFFF).to_bytes(2, "little")
        asked.set()
        return bytes(length)

    with Vmm(
        Kvm(guest.kernel),
        BOARD,
        IMAGE,
        console=lambda _: None,
        plug=plug({SLOT: Entropy(refill)}, faults),
    ) as vmm:
        stopper = threading.Thread(target=stop_when(asked, vmm.stop))
        stopper.start()
        assert vmm.run(60).kind == "stopped"
        stopper.join()


def stop_when(event: threading.Event, stop: Callable[[], None]) -> Callable[[], None]:
    def wait() -> None:
        assert event.wait(30)
        stop()

    return wait
