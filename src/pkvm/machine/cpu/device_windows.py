# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices' registers on the CPU's own bus: what a guest reaches whose stage-2 maps them.

libunicorn calls a function for each access to a window. Its regions split what
is wider than four bytes; here an access is whole, as on the other buses. What an
access sets going beyond it (`DeviceWindow.work`: DMA) is not for the middle of a
guest's instruction: it is due, and the engine does it before the next block of
guest code or when the guest leaves the CPU. Meanwhile the device is busy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

from pkvm.machine.cpu.errors import EngineError
from pkvm.machine.cpu.exclusion import INSIDE, WAITING, CpuOwnership
from pkvm.machine.cpu.library import MMIO_READ, MMIO_WRITE, Library
from pkvm.machine.cpu.unicorn_layout import LAYOUT
from pkvm.machine.memory import DeviceWindow, PhysicalMemory

_WIDEST = 8
"""Bytes of an access."""


class DeviceWindows:
    """The windows that `memory` has now, on the bus of the engine whose uc_struct is at `uc`.

    `fail` is told of what a device raises. Raises EngineError if the engine does not take a window.
    """

    def __init__(
        self,
        library: Library,
        uc: int,
        memory: PhysicalMemory,
        ownership: CpuOwnership,
        fail: Callable[[BaseException], None],
    ) -> None:
        self.due: list[Callable[[], None]] = []
        """Work that was set going and is not done."""
        self._ownership = ownership
        self._flags = ownership.flags
        self._fail = fail
        self._callbacks: list[Any] = []
        """Kept as long as libunicorn may call them."""
        for window in memory.windows:
            read = MMIO_READ(partial(self._read, window))
            write = MMIO_WRITE(partial(self._write, window, partial(library.uc_emu_stop, uc)))
            status = library.uc_mmio_map(uc, window.base, window.size, read, None, write, None)
            library.check(status, f"put {window.name} on the bus")
            self._callbacks += [read, write]
            _widen(uc, window.base)

    def work(self) -> None:
        """Do what is due. Called when no guest code runs."""
        due, self.due[:] = self.due[:], []
        for work in due:
            work()

    def _read(self, window: DeviceWindow, _uc: int, offset: int, size: int, _data: int) -> int:
        self._flags[INSIDE] = False
        try:
            return window.read(offset, size)
        except BaseException as error:  # belongs to who called run
            self._fail(error)
            return 0
        finally:
            self._go_on()

    def _write(
        self, window: DeviceWindow, stop: Callable[[], object], _uc: int, offset: int, size: int,
        value: int, _data: int,
    ) -> None:  # fmt: skip
        self._flags[INSIDE] = False
        try:
            window.write(offset, size, value)
            if window.work is not None:
                self.due.append(window.work)
                stop()
        except BaseException as error:  # belongs to who called run
            self._fail(error)
        finally:
            self._go_on()

    def _go_on(self) -> None:
        """Back into the guest's instruction. Whoever waited for the CPU had it meanwhile."""
        self._flags[INSIDE] = True
        if self._flags[WAITING]:
            self._ownership.give_way()


def _widen(uc: int, base: int) -> None:
    """Have the region at PA `base` take accesses of `_WIDEST` bytes. Raises EngineError if it is
    not where it should be."""
    regions, number = (_word(uc + LAYOUT.uc_mapped_blocks + at) for at in (0, 8))
    for at in range(number & 0xFFFF_FFFF):
        region = _word(regions + 8 * at)
        if _word(region + LAYOUT.region_addr) != base:
            continue
        ops = _word(region + LAYOUT.region_ops)
        for offset in (LAYOUT.ops_valid_max, LAYOUT.ops_impl_max):
            widest = ctypes.c_uint32.from_address(ops + offset)
            if widest.value:
                break
            widest.value = _WIDEST
        else:
            return
    raise EngineError(f"libunicorn does not keep the region at {base:#x} where 2.1.4 does")


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value
