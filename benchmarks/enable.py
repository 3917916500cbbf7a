# SPDX-License-Identifier: GPL-2.0-or-later
"""ENABLE on 1 GiB of memory slots against filling the same memory once with numpy.

Pairs in turn, in one run: numpy fills the very pages that the slot of 1 GiB maps, and then
KVM_ENABLE_CAP(ENABLE) takes that slot, and one of 2 MiB for the firmware, from the host for a new
VM. The end of a VM wipes its memory by giving it back to the operating system, so the memory is
touched again before the clock runs: what is compared is a fill of warm memory.

Once where the guest's memory can be mapped with 2 MiB blocks, and once where the host's memory is
off by a page, so that all of it must be mapped as 4 KiB pages. The first ENABLE is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from common import Result, median_ratio
from pkvm.arm64.stage2 import ADDRESS_MASK
from pkvm.events import NullRecorder
from pkvm.system import System

GIB = 1 << 30
RAM_IPA = 0x4000_0000
PAIRS = 7


def _measure(misalign: bool) -> tuple[float, float, float]:
    with (
        System(memory=GIB + (96 << 20), recorder=NullRecorder(), misalign=misalign) as system,
        system.open() as kvm,
    ):
        memory = kvm.mmap(GIB)
        firmware = kvm.mmap(2 << 20)

        def enable() -> float:
            with kvm.create_vm() as vm:
                vm.set_user_memory_region(0, RAM_IPA, memory)
                vm.set_user_memory_region(1, 0, firmware)
                start = time.perf_counter()
                vm.protect(1)
                taken = time.perf_counter() - start
                first_pages.append(system.hyp.vms()[0].stage2.leaf(RAM_IPA)[0] & ADDRESS_MASK)
                return taken

        first_pages: list[int] = []
        enable()
        span = system.machine.memory.span(first_pages[0], GIB)

        def fill() -> float:
            span.fill(1)
            start = time.perf_counter()
            span.fill(0)
            return time.perf_counter() - start

        ratio = median_ratio(enable, fill, PAIRS)
        assert set(first_pages) == {first_pages[0]}, "the host's memory moved"
        return ratio


def measure() -> Iterator[Result]:
    """With blocks, and with memory of which every page must be mapped as 4 KiB."""
    for name, misalign, bound in (("enable-1gib-blocks", False, 0.1), ("enable-1gib-4k", True, 1)):
        ratio, ours, unit = _measure(misalign)
        yield Result(name, ratio, bound, f"{ours * 1e3:.1f} ms, fill {unit * 1e3:.0f} ms")
