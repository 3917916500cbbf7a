# SPDX-License-Identifier: GPL-2.0-or-later
"""What it costs that devices are kept in check, and what DMA costs.

The units: the same transitions on a machine without an SMMU, and a numpy copy of
the same bytes, a page at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

import exits
from common import Result, median_ratio
from pkvm.arm64.smccc import Function
from pkvm.events import NullRecorder
from pkvm.hyp.hypervisor import Hypervisor
from pkvm.hyp.mem_protect import carveout_bytes
from pkvm.machine import dma
from pkvm.machine.machine import DMA_BASE, Machine
from pkvm.system import System
from pkvm.vmm import board
from pkvm.vmm.loader import load_image
from pkvm.vmm.vmm import Vmm

PAIRS = 9
PAGES = 4_000
PAGE = 4096
COPY_BYTES = 64 << 20
RAM = 256 << 20

_HVC = 0xD400_0002
_SUBS_X9 = 0xF100_0529  # subs x9, x9, #1
_STR_X9_X10 = 0xF900_0149  # str x9, [x10]
_MOV_X1_X10 = 0xAA0A_03E1  # mov x1, x10
_ADD_PAGE_X10 = 0x9140_054A  # add x10, x10, #1, lsl #12


def _touch_and_share(count: int) -> bytes:
    """A guest that writes to so many pages that it has not touched yet, shares each, and powers
    off."""
    base = board.RAM_BASE + (4 << 20)
    body = [_STR_X9_X10, *exits.mov(0, int(Function.MEM_SHARE)), _MOV_X1_X10]
    body += [*exits.mov(2, 0), *exits.mov(3, 0), _HVC, _ADD_PAGE_X10, _SUBS_X9]
    off = [*exits.mov(0, 0x8400_0008), _HVC]
    start = [*exits.mov(10, base), *exits.mov(9, count)]
    return exits.program(*start, *body, exits.b_ne(len(body)), *off)


def _donate_and_share(*, smmu: bool) -> float:
    """Seconds of a page's donation to a guest that touches it, and of its sharing by the guest."""

    def run(count: int) -> float:
        recorder = NullRecorder()
        with System(128 << 20, dialect="upstream", recorder=recorder, smmu=smmu) as system:
            words = system.machine.memory.u64
            words[:: PAGE // 8] |= np.uint64(0)  # no page of this process is new to it
            small = board.Board(ram_bytes=32 << 20)
            image = load_image(_touch_and_share(count), small)
            vmm = Vmm(system.open(), small, image, console=lambda data: None)
            start = time.perf_counter()
            outcome = vmm.run()
            seconds = time.perf_counter() - start
            shared = len(system.shared_by_guests())
            vmm.close()
            if outcome.kind != "powered-off" or shared < count:
                raise RuntimeError(f"the guest shared {shared} pages: {outcome}")
            return seconds

    return (run(PAGES) - run(1)) / (PAGES - 1)


class _Copy:
    """64 MiB from one half of a range to the other, by the device or by numpy."""

    def __init__(self) -> None:
        recorder = NullRecorder()
        self.machine = Machine(RAM, recorder=recorder)
        size = carveout_bytes(RAM)
        carveout = (self.machine.memory.ram_end - size, size)
        Hypervisor(self.machine, recorder, carveout=carveout).initialise()
        self.source = self.machine.memory.ram_base + (16 << 20)
        self.target = self.source + COPY_BYTES
        words = self.machine.memory.span(self.source, 2 * COPY_BYTES)
        words[:] = np.arange(words.size, dtype=np.uint64)
        pages = words.reshape(2, -1, PAGE // 8)
        self._from, self._to = pages[0], pages[1]

    def by_device(self) -> float:
        """Seconds; as a driver does it, by the device's registers."""
        bus = self.machine.host_bus
        self._to[:] = 0
        start = time.perf_counter()
        for register, value in (
            (dma.SRC, self.source), (dma.DST, self.target), (dma.LEN, COPY_BYTES), (dma.CTRL, 1),
        ):  # fmt: skip
            bus.write_u64(DMA_BASE + register, value)
        seconds = time.perf_counter() - start
        if bus.read_u64(DMA_BASE + dma.STATUS) or (self._from != self._to).any():
            raise RuntimeError("the device did not copy")
        return seconds

    def by_numpy(self) -> float:
        """Seconds."""
        self._to[:] = 0
        source, target = self._from, self._to
        start = time.perf_counter()
        for page in range(len(source)):
            target[page] = source[page]
        return time.perf_counter() - start


def measure() -> Iterator[Result]:
    """All figures of this file."""
    ratio, ours, unit = median_ratio(
        lambda: _donate_and_share(smmu=True), lambda: _donate_and_share(smmu=False), PAIRS
    )
    yield Result(
        "smmu-donate-share", ratio, 1.5,
        f"{ours * 1e6:.2f} us a page, without an SMMU {unit * 1e6:.2f} us",
    )  # fmt: skip
    copy = _Copy()
    ratio, ours, unit = median_ratio(copy.by_device, copy.by_numpy, PAIRS)
    copy.machine.close()
    yield Result(
        "dma-copy-64-mib", ratio, 3, f"{ours * 1e3:.1f} ms, numpy page by page {unit * 1e3:.1f} ms"
    )
