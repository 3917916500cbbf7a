# SPDX-License-Identifier: GPL-2.0-or-later
"""Is this libunicorn the one that the engine was written for?

The engine works inside libunicorn's structures (see `unicorn_layout`), so a
library with another layout would be corrupted silently. Before anything is
written, three things are asked, each cheap:

1. the library calls itself 2.1.4;
2. the structures point at each other as 2.1.4's do (`find_cpu`; memory is read
   through the kernel, which refuses a bad address instead of ending the process);
3. once per process, a small guest behaves: three instructions and a stage-2
   fault with every syndrome register as the Arm ARM says (`prove`).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

from pkvm.arm64 import stage2
from pkvm.arm64.registers import HCR_EL2, PSTATE_RESET, VTCR_EL2, VTTBR_EL2, hcr
from pkvm.machine.cpu.engine import CpuEngine, StopReason
from pkvm.machine.cpu.errors import EngineError
from pkvm.machine.cpu.library import Library
from pkvm.machine.cpu.unicorn_layout import UnicornLayout
from pkvm.machine.memory import PAGE_SIZE, PhysicalMemory

ADVICE = "install the wheel that pkvm works with: pip install unicorn==2.1.4"
_JUMP_BUFFER_GROWTH = range(-192, 513, 8)
"""By how much a host's sigjmp_buf may differ from 200 bytes (AArch64 Linux: +112)."""


class CpuAddresses(NamedTuple):
    """Where one engine's structures are in this process."""

    uc: int
    cpu: int
    env: int
    exception_index: int


def require_version(library: Library, layout: UnicornLayout) -> None:
    """Raise EngineError unless the library has the version that `layout` belongs to."""
    found = library.version()
    if found != layout.version:
        raise _refusal(library, f"it calls itself version {_dotted(found)}")


def find_cpu(library: Library, layout: UnicornLayout, uc: int) -> CpuAddresses:
    """Find the CPU's structures of the engine at `uc`. Raises EngineError if they are not linked
    as in 2.1.4."""
    (cpu,) = struct.unpack("<Q", _peek(uc + layout.uc_cpu, 8) or bytes(8))
    for growth in _JUMP_BUFFER_GROWTH:
        pointer = _peek(cpu + layout.cpu_env_pointer + growth, 8) if cpu else None
        if pointer is None:
            continue
        (env,) = struct.unpack("<Q", pointer)
        if env != cpu + layout.cpu_env + growth:
            continue
        if _peek(env + layout.env_uc, 8) == struct.pack("<Q", uc):
            return CpuAddresses(uc, cpu, env, cpu + layout.cpu_exception_index + growth)
    raise _refusal(library, "its CPU structures are not laid out as 2.1.4's")


def prove(library: Library, make: Callable[[PhysicalMemory], CpuEngine]) -> None:
    """Run a guest of four instructions on a new engine and compare. Raises EngineError."""
    memory = PhysicalMemory(_RAM, 16 * PAGE_SIZE)
    engine = make(memory)
    seen: list[tuple[int, ...]] = []

    def vector() -> bool:
        state = (engine.x[0], engine.pc, engine.esr_el2, engine.far_el2, engine.hpfar_el2)
        seen.append(state)
        return len(seen) < 2

    try:
        geometry = stage2.Geometry(32)
        memory.write_u64(_RAM, _TABLE | stage2.TABLE_OR_PAGE | stage2.VALID)
        page = stage2.ATTR_NORMAL_RWX | stage2.TABLE_OR_PAGE
        memory.write_u64(_TABLE + 8 * (_CODE_IPA >> stage2.PAGE_SHIFT), _CODE_PA | page)
        memory.write(_CODE_PA, _CODE)
        engine.write_sysreg(VTCR_EL2, geometry.vtcr(parange=2))
        engine.write_sysreg(VTTBR_EL2, stage2.vttbr(_RAM, vmid=1))
        engine.write_sysreg(HCR_EL2, hcr("VM", "RW"))
        engine.pstate = PSTATE_RESET
        engine.pc = _CODE_IPA
        engine.x[1] = _FAULT_IPA
        engine.vector = vector
        reason = engine.run()
    finally:
        engine.close()
    if reason is not StopReason.VECTOR or len(seen) != 2:
        raise _refusal(library, f"its self-test ended by {reason.value}, {len(seen)} exceptions")
    hvc, abort = seen
    if hvc[:3] != _AFTER_HVC or abort != _AFTER_ABORT:
        found = " ".join(f"{word:#x}" for word in (*hvc[:3], *abort))
        raise _refusal(library, f"its self-test gave {found}")


_RAM = 0x8000_0000
_TABLE = _RAM + 4 * PAGE_SIZE
_CODE_PA = _RAM + 5 * PAGE_SIZE
_CODE_IPA = 0x1000
_FAULT_IPA = 0x3008
_CODE = struct.pack(
    "<4I",
    0xD2824680,  # movz x0, #0x1234
    0x91000400,  # add x0, x0, #1
    0xD4000542,  # hvc #0x2a
    0xB9000020,  # str w0, [x1]
)
_AFTER_HVC = (0x1235, _CODE_IPA + 12, 0x5A00_002A)
_AFTER_ABORT = (0x1235, _CODE_IPA + 12, 0x9380_0047, _FAULT_IPA, 0x30)
"""EC 0x24, IL, ISV, SAS word, SRT 0, SF 0, AR 0, WnR, DFSC translation fault at level 3."""


def _peek(address: int, length: int) -> bytes | None:
    """Memory of this process, or None where nothing can be read: `write` checks the address."""
    read_end, write_end = os.pipe()
    try:
        libc = ctypes.CDLL(None)
        libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        libc.write.restype = ctypes.c_ssize_t
        if libc.write(write_end, address, length) != length:
            return None
        return os.read(read_end, length)
    finally:
        os.close(read_end)
        os.close(write_end)


def _refusal(library: Library, what: str) -> EngineError:
    return EngineError(f"this libunicorn ({library.path}) is not the 2.1.4 wheel: {what}; {ADVICE}")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
