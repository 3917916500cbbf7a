# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio-rng fills what it is given, up to its limit."""

from __future__ import annotations

from fakes.virtio_driver import Driver, Rig
from pkvm.vmm.virtio.rng import MAX_BYTES, Entropy


def count(length: int) -> bytes:
    return bytes(n & 0xFF for n in range(length))


def test_buffers_are_filled_from_the_source() -> None:
    driver = Driver(Rig(Entropy(count)))
    assert driver.request(writable=[10, 6]) == (16, count(16))
    assert driver.request([b"ignored"], [1]) == (1, b"\0")


def test_two_buffers_differ() -> None:
    driver = Driver(Rig(Entropy()))
    first, second = (driver.request(writable=[64]).data for _ in range(2))
    assert first != second


def test_a_large_buffer_is_filled_in_part() -> None:
    driver = Driver(Rig(Entropy(count)))
    used = driver.request(writable=[MAX_BYTES, 100])
    assert used == (MAX_BYTES, count(MAX_BYTES) + bytes(100))


def test_bad_no_room() -> None:
    rig = Rig(Entropy())
    driver = Driver(rig)
    driver.add([b"only to read"])
    driver.notify()
    assert rig.needs_reset
    assert "without room" in rig.report()
