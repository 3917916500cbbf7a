# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest memory for devices: only what is in a slot, only what the VMM may touch."""

from __future__ import annotations

import pytest

from fakes.virtio_driver import Ram
from pkvm.vmm.guest_memory import GuestMemory, GuestMemoryError, PrivatePageError

LOW, HIGH = 0x1000, 0x4000_0000


@pytest.fixture
def slots() -> dict[int, Ram]:
    return {LOW: Ram(0x2000), HIGH: Ram(0x4000)}


@pytest.fixture
def memory(slots: dict[int, Ram]) -> GuestMemory:
    return GuestMemory(slots.items())


def test_addresses_are_the_guests(memory: GuestMemory, slots: dict[int, Ram]) -> None:
    memory.write(HIGH + 0xFFE, b"abcd")
    memory.write(LOW, b"low")
    assert slots[HIGH].bytes[0xFFE:0x1002] == b"abcd"
    assert memory.read(HIGH + 0xFFF, 2) == b"bc"
    assert memory.read(LOW, 3) == b"low"
    assert memory.read(HIGH + 0x3FFF, 1) == b"\0"


@pytest.mark.parametrize(
    ("ipa", "length"),
    [
        (0, 1),
        (LOW - 1, 2),
        (LOW + 0x1FFF, 2),
        (HIGH + 0x4000, 1),
        ((1 << 64) - 1, 2),
        (HIGH, 0x4001),
    ],
)
def test_bad_outside(memory: GuestMemory, slots: dict[int, Ram], ipa: int, length: int) -> None:
    with pytest.raises(GuestMemoryError, match="not memory of the guest's") as caught:
        memory.read(ipa, length)
    assert (caught.value.ipa, caught.value.length) == (ipa, length)
    with pytest.raises(GuestMemoryError):
        memory.write(ipa, bytes(length))
    assert not any(slot.written for slot in slots.values())


def test_bad_private(memory: GuestMemory, slots: dict[int, Ram]) -> None:
    slots[HIGH].private.add(2)
    for access in (
        lambda: memory.read(HIGH + 0x1FF0, 32),
        lambda: memory.write(HIGH, bytes(0x3000)),
    ):
        with pytest.raises(PrivatePageError, match="must share it") as caught:
            access()
        assert caught.value.ipa == HIGH + 0x2000
