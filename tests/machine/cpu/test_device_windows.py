# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices' registers that a guest's stage-2 maps: each access whole, its consequences after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fakes.cpu_guest import CODE, Guest, b, hvc, ldr, ldrsb_w, mov, str_, strh
from pkvm.arm64 import stage2
from pkvm.arm64.esr import EC
from pkvm.machine.memory import DeviceWindow

BASE = 0x1000_0000
IPA = 0x5_0000
DEVICE = stage2.ATTR_DEVICE_RW | stage2.TABLE_OR_PAGE


class Device:
    """Notes what reaches it."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []
        self.value = 0
        self.error: Exception | None = None
        self.guest: Guest | None = None

    def read(self, offset: int, size: int) -> int:
        self.seen.append(("read", offset, size))
        if self.error is not None:
            raise self.error
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(("write", offset, size, value))
        if self.error is not None:
            raise self.error

    def work(self) -> None:
        """Writes memory, as a device does."""
        assert self.guest is not None
        self.seen.append(("work",))
        self.guest.engine.invalidate_code(0x8010_0000 + CODE, 4096)


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture(params=[False, True], ids=["", "counting"])
def guest(request: pytest.FixtureRequest, hooks: str, device: Device) -> Iterator[Guest]:
    """A guest that has the device at IPA, and another that has no work behind it."""
    windows = [
        DeviceWindow("device", BASE, 4096, device.read, device.write, device.work),
        DeviceWindow("quiet", BASE + 0x2000, 4096, device.read, device.write),
    ]
    guest = device.guest = Guest(count_blocks=request.param, windows=windows)
    guest.map(IPA, DEVICE, pa=BASE)
    guest.map(IPA + 0x1000, DEVICE, pa=BASE + 0x1000)
    guest.map(IPA + 0x2000, DEVICE, pa=BASE + 0x2000)
    yield guest
    guest.engine.close()


def run(guest: Guest, *words: int) -> None:
    assert guest.run(*mov(1, IPA), *words, hvc(1), b(0)).ec == EC.HVC64


def test_accesses_are_whole(guest: Guest, device: Device) -> None:
    device.value = 0x8877_6655_4433_2211
    run(guest, ldr(2, 1, 8), ldrsb_w(3, 1, 3), *mov(4, 0x1234_5678_9ABC_DEF0), strh(4, 1, 2))
    assert guest.engine.x[2] == 0x8877_6655_4433_2211
    assert guest.engine.x[3] == 0x11
    assert device.seen[:3] == [("read", 8, 8), ("read", 3, 1), ("write", 2, 2, 0xDEF0)]
    run(guest, str_(4, 1, 0xFF8))
    assert device.seen[-2:] == [("write", 0xFF8, 8, 0x1234_5678_9ABC_DEF0), ("work",)]


def test_what_a_write_sets_going_is_done_once_and_soon(guest: Guest, device: Device) -> None:
    """Between two blocks of guest code, or at the latest when the guest leaves the CPU."""
    run(guest, str_(0, 1), b(1), ldr(2, 1), b(1), ldr(2, 1))
    assert [what[0] for what in device.seen] == ["write", "work", "read", "read"]
    device.seen.clear()
    run(guest, str_(0, 1))
    assert [what[0] for what in device.seen] == ["write", "work"]
    device.seen.clear()
    run(guest, *mov(1, IPA + 0x2000), str_(0, 1), ldr(2, 1))
    assert [what[0] for what in device.seen] == ["write", "read"]


def test_where_nothing_answers_is_an_external_abort_still(guest: Guest, device: Device) -> None:
    run(guest, *mov(1, IPA + 0x1000), ldr(2, 1))
    assert guest.engine.x[21] & 0x3F == 0x10
    assert not device.seen


def test_what_a_device_raises_belongs_to_who_runs_the_guest(guest: Guest, device: Device) -> None:
    device.error = LookupError("broken")
    for word in (ldr(2, 1), str_(2, 1)):
        guest.write(CODE, *mov(1, IPA), word, b(0))
        guest.engine.pc = CODE
        with pytest.raises(LookupError, match="broken"):
            guest.engine.run()
    device.error = None
    run(guest, ldr(2, 1))
