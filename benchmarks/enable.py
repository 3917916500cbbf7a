# SPDX-License-Identifier: GPL-2.0-or-later
"""ENABLE on 1 GiB of memory slots against filling the same memory once with numpy."""

from __future__ import annotations

import time
from collections.abc import Iterator

from common import Result, median_ratio
from pkvm.events import NullRecorder
from pkvm.system import System

GIB = 1 << 30
PAIRS = 5


def _measure(misalign: bool) -> tuple[float, float, float]:
    with (
        System(memory=GIB + (96 << 20), recorder=NullRecorder(), misalign=misalign) as system,
        system.open() as kvm,
    ):
        memory = kvm.mmap(GIB)
        firmware = kvm.mmap(2 << 20)
        ram = system.machine.memory
        # The pages that the mapping got, as one span where it is one; numpy fills all of RAM's
        # first GiB, which is the same memory but for the few pages that the host had taken before.
        span = ram.span(ram.ram_base, GIB)
        span.fill(1)

        def fill() -> float:
            start = time.perf_counter()
            span[:] = 0
            return time.perf_counter() - start

        def enable() -> float:
            with kvm.create_vm() as vm:
                vm.set_user_memory_region(0, 0x4000_0000, memory)
                vm.set_user_memory_region(1, 0, firmware)
                start = time.perf_counter()
                vm.protect(1)
                return time.perf_counter() - start

        return median_ratio(enable, fill, PAIRS)


def measure() -> Iterator[Result]:
    """With blocks, and with memory of which every page must be mapped as 4 KiB."""
    for name, misalign, bound in (("enable-1gib-blocks", False, 0.1), ("enable-1gib-4k", True, 1)):
        ratio, ours, unit = _measure(misalign)
        yield Result(name, ratio, bound, f"{ours * 1e3:.1f} ms, fill {unit * 1e3:.0f} ms")
