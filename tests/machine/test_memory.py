# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import ctypes

import pytest

from pkvm.machine.memory import BusError, DeviceWindow, PhysicalMemory

RAM = 0x8000_0000
SIZE = 0x10_0000


@pytest.fixture
def memory() -> PhysicalMemory:
    return PhysicalMemory(RAM, SIZE)


class Device:
    """Records accesses, and when it was let to work."""

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []

    def window(self, base: int = 0x1000_0000, size: int = 0x1000) -> DeviceWindow:
        return DeviceWindow("device", base, size, self.read, self.write, self.work)

    def read(self, offset: int, size: int) -> int:
        self.log.append(("read", offset, size))
        return 0x1122_3344_5566_7788 & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("write", offset, size, value))

    def work(self) -> None:
        self.log.append(("work",))


@pytest.mark.parametrize(
    ("base", "size"), [(RAM, 0), (RAM, -4096), (RAM, 4095), (RAM + 1, 4096), (RAM, 4097)]
)
def test_ram_is_page_aligned_and_not_empty(base: int, size: int) -> None:
    with pytest.raises(ValueError, match="not page-aligned"):
        PhysicalMemory(base, size)


def test_ram_that_the_process_cannot_have_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="MiB of RAM"):
        PhysicalMemory(0, 1 << 60)


def test_ram_starts_zeroed(memory: PhysicalMemory) -> None:
    assert not memory.u64.any()
    assert memory.u64.nbytes == SIZE


def test_bytes_words_and_arrays_are_views_of_the_same_ram(memory: PhysicalMemory) -> None:
    memory.write(RAM + 8, bytes(range(1, 9)))
    assert memory.read_u64(RAM + 8) == 0x0807_0605_0403_0201
    assert memory.words[1] == memory.u64[1] == 0x0807_0605_0403_0201
    memory.write_u64(RAM + 16, 0xFFFF_FFFF_FFFF_FFFF)
    assert memory.read(RAM + 16, 9) == b"\xff" * 8 + b"\0"
    assert ctypes.string_at(memory.host_address + 8, 8) == bytes(range(1, 9))


def test_the_edges_of_ram(memory: PhysicalMemory) -> None:
    assert memory.is_ram(RAM)
    assert memory.is_ram(RAM, SIZE)
    assert memory.is_ram(RAM + SIZE, 0)
    assert not memory.is_ram(RAM, SIZE + 1)
    assert not memory.is_ram(RAM - 1)
    assert not memory.is_ram(RAM + SIZE)
    assert not memory.is_ram(RAM + 8, -8)


@pytest.mark.parametrize(
    ("pa", "length"), [(RAM - 1, 2), (RAM + SIZE - 1, 2), (0, 1), (1 << 64, 1), (-1, 1)]
)
def test_nothing_answers_outside_ram(memory: PhysicalMemory, pa: int, length: int) -> None:
    with pytest.raises(BusError) as read:
        memory.read(pa, length)
    assert read.value.pa == pa
    with pytest.raises(BusError):
        memory.write(pa, bytes(length))


@pytest.mark.parametrize("pa", [RAM + 4, RAM - 8, RAM + SIZE])
def test_words_are_aligned_and_in_ram(memory: PhysicalMemory, pa: int) -> None:
    with pytest.raises(BusError):
        memory.read_u64(pa)
    with pytest.raises(BusError):
        memory.write_u64(pa, 1)


def test_table_span_and_zero(memory: PhysicalMemory) -> None:
    table = memory.table(RAM + 0x2000)
    assert table.shape == (512,)
    table[511] = 7
    assert memory.read_u64(RAM + 0x2FF8) == 7
    memory.write_u64(RAM + 0x3000, 9)
    memory.zero(RAM + 0x2000, 0x1000)
    assert memory.read_u64(RAM + 0x2FF8) == 0
    assert memory.read_u64(RAM + 0x3000) == 9
    for pa, length in ((RAM + 4, 8), (RAM, 4), (RAM, SIZE + 8), (0, 8)):
        with pytest.raises(BusError):
            memory.span(pa, length)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_device_gets_its_accesses_and_then_works(memory: PhysicalMemory, size: int) -> None:
    device = Device()
    memory.add_window(device.window())
    assert memory.read(0x1000_0010, size) == bytes.fromhex("8877665544332211")[:size]
    memory.write(0x1000_0018, b"\x81" + bytes(size - 1))
    assert device.log == [("read", 0x10, size), ("work",), ("write", 0x18, size, 0x81), ("work",)]


@pytest.mark.parametrize(
    ("pa", "length"), [(0x1000_0000, 3), (0x1000_0000, 16), (0x1000_0FFC, 8), (0x0FFF_FFFC, 8)]
)
def test_a_device_refuses_other_sizes_and_edges(
    memory: PhysicalMemory, pa: int, length: int
) -> None:
    device = Device()
    memory.add_window(device.window())
    with pytest.raises(BusError):
        memory.read(pa, length)
    with pytest.raises(BusError):
        memory.write(pa, bytes(length))
    assert device.log == []


def test_windows_do_not_overlap(memory: PhysicalMemory) -> None:
    memory.add_window(Device().window(0x1000_0000))
    memory.add_window(Device().window(0x1000_1000))
    with pytest.raises(ValueError, match="overlaps device"):
        memory.add_window(Device().window(0x1000_0800))
    with pytest.raises(ValueError, match="overlaps RAM"):
        memory.add_window(Device().window(RAM - 0x800))
    assert [window.base for window in memory.windows] == [0x1000_0000, 0x1000_1000]


@pytest.mark.parametrize("length", [4096, 1 << 20, 2 << 20, 4 << 20])
def test_zeroed_memory_reads_as_zeroes_and_its_neighbours_stay(length: int) -> None:
    memory = PhysicalMemory(0x8000_0000, 8 << 20)
    memory.span(memory.ram_base, memory.ram_bytes).fill(0x5A5A)
    memory.zero(0x8010_0000, length)
    assert not memory.span(0x8010_0000, length).any()
    assert memory.read_u64(0x8010_0000 - 8) == 0x5A5A
    assert memory.read_u64(0x8010_0000 + length) == 0x5A5A
    memory.write_u64(0x8010_0000, 7)
    assert memory.words[0x10_0000 >> 3] == 7
