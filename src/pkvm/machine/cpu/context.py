# SPDX-License-Identifier: GPL-2.0-or-later
"""The state of one vCPU in the engine: registers, and moving it to and from memory.

Registers are views of libunicorn's memory. QEMU keeps some of them apart, and
this module puts them together again: the stack pointer in use is not in its
bank, PSTATE is in pieces, and AArch32 state has its own copy of X0-X14 and PC.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import partial

from unicorn import arm64_const

from pkvm.arm64 import registers as reg
from pkvm.arm64.bits import MASK64
from pkvm.arm64.registers import SysReg
from pkvm.machine.cpu.errors import EngineError
from pkvm.machine.cpu.library import Library
from pkvm.machine.cpu.selfcheck import CpuAddresses
from pkvm.machine.cpu.sysregs import SystemRegisters
from pkvm.machine.cpu.unicorn_layout import EL2_EL3_STATE, UnicornLayout
from pkvm.machine.memory import BusError, PhysicalMemory

OSLSR_EL1_RESET = 8
"""OS lock implemented and unlocked (facts §6.1)."""
FP_BYTES = 520
_FLAG_BYTES = 16
_EXCP_UDEF = 1
_EXCP_DATA_ABORT = 4
_CPSR_WRITE_RAW = 2
_AARCH64_MODES = (reg.PSTATE_EL0T, reg.PSTATE_EL1T, reg.PSTATE_EL1H)
_AARCH32_USER = reg.PSTATE_NRW
_FOUR = struct.Struct("<4Q")
_BIT_31 = 1 << 31
_TRAP = "<Q2I184x4I16xI4xQ"
"""From PC on: itself, PSTATE's rest, nRW inverted, C, V and N (bit 31), not Z, BTYPE, DAIF."""


def _exit_struct(layout: UnicornLayout) -> struct.Struct:
    """PSTATE's first piece, whether in AArch64 state, SCTLR_EL1, FAR_EL2, HPFAR_EL2, counted from
    PSTATE on."""
    sctlr, far = layout.sctlr_el + 8, layout.far_el + 16
    gaps = (sctlr - layout.pstate - 8, far - sctlr - 8, layout.hpfar_el2 - far - 8)
    return struct.Struct("<II{}xQ{}xQ{}xQ".format(*gaps))


def _trap_struct(layout: UnicornLayout) -> struct.Struct:
    """What `_TRAP` says, SCTLR_EL1, ESR_EL2, FAR_EL2, HPFAR_EL2, counted from PC on."""
    sctlr, esr, far = layout.sctlr_el + 8, layout.esr_el + 16, layout.far_el + 16
    end = layout.pc + struct.calcsize(_TRAP)
    gaps = (sctlr - end, esr - sctlr - 8, far - esr - 8, layout.hpfar_el2 - far - 8)
    return struct.Struct(_TRAP + "{}xQ{}xQ{}xQ{}xQ".format(*gaps))


class CpuContext:
    """The registers of the engine's CPU and the context they make up.

    After `detach` the registers are a private copy: reading and writing them is harmless.
    """

    x: memoryview[int]
    syndrome: Callable[[], int]
    exit_state: Callable[[], tuple[int, int, int, int, int]]
    """`CpuEngine.syndrome` and `CpuEngine.exit_state`: one call of C code each."""

    def __init__(
        self,
        library: Library,
        layout: UnicornLayout,
        addresses: CpuAddresses,
        memory: PhysicalMemory,
    ) -> None:
        self._library = library
        self._layout = layout
        self._addresses = addresses
        self._memory = memory
        self._ram_shift = memory.host_address - memory.ram_base
        self._sysregs = SystemRegisters(library, layout, addresses.env)
        self._attach((ctypes.c_uint8 * layout.context_bytes).from_address(addresses.env))
        self._pristine = b""

    def _attach(self, state: ctypes.Array[ctypes.c_uint8]) -> None:
        layout = self._layout
        self._state = memoryview(state).cast("B")
        self._words: memoryview[int] = self._state.cast("Q")
        self._halves: memoryview[int] = self._state.cast("I")
        first = layout.xregs
        self._x: memoryview[int] = self._state[first : first + 31 * 8].cast("Q")
        self.x = self._x
        self._xregs = layout.xregs
        self._pc_word = layout.pc >> 3
        self._sp_word = (layout.xregs >> 3) + 31
        self.syndrome = partial(self._words.__getitem__, (layout.esr_el >> 3) + 2)
        self.exit_state = partial(_exit_struct(layout).unpack_from, self._state, layout.pstate)
        self._trap_pieces = partial(_trap_struct(layout).unpack_from, self._state, layout.pc)
        self._esr_el2_word = (layout.esr_el >> 3) + 2
        self._far_el2_word = (layout.far_el >> 3) + 2
        self._hpfar_word = layout.hpfar_el2 >> 3
        self._pstate_half = layout.pstate >> 2
        self._aarch64_half = layout.aarch64 >> 2

    def _detach(self) -> None:
        """Go on with a copy of the registers; views that somebody kept raise ValueError now."""
        copy = (ctypes.c_uint8 * self._layout.context_bytes).from_buffer_copy(self._state)
        views = (self._x, self._words, self._halves, self._state)
        self._attach(copy)
        for view in views:
            view.release()

    # Registers

    @property
    def pc(self) -> int:
        """Program counter of the guest, or the preferred return address inside the vector."""
        return self._words[self._pc_word]

    @pc.setter
    def pc(self, value: int) -> None:
        self._words[self._pc_word] = value

    def skip_instruction(self) -> None:
        """PC + 4."""
        words = self._words
        pc = words[self._pc_word] + 4
        words[self._pc_word] = pc if pc <= MASK64 else pc & MASK64

    @property
    def esr_el2(self) -> int:
        """Syndrome of the last exception taken to EL2."""
        return self._words[self._esr_el2_word]

    @property
    def far_el2(self) -> int:
        """Faulting virtual address of the last abort taken to EL2."""
        return self._words[self._far_el2_word]

    @property
    def hpfar_el2(self) -> int:
        """HPFAR_EL2 of the last stage-2 abort."""
        return self._words[self._hpfar_word]

    def args(self) -> tuple[int, int, int, int]:
        """X0-X3 in one read."""
        return _FOUR.unpack_from(self._state, self._xregs)

    def set_results(self, x0: int, x1: int, x2: int, x3: int) -> None:
        """X0-X3 in one write; values are unsigned 64-bit numbers, else struct.error."""
        _FOUR.pack_into(self._state, self._xregs, x0, x1, x2, x3)

    @property
    def pstate(self) -> int:
        """PSTATE in SPSR_ELx form; bit 4 is set in AArch32 state."""
        return self.trap_state()[2]

    @pstate.setter
    def pstate(self, value: int) -> None:
        """Raises ValueError for a mode that is not EL0t, EL1t, EL1h or AArch32 User."""
        mode = value & reg.PSTATE_MODE_MASK
        env = self._addresses.env
        if mode not in (*_AARCH64_MODES, _AARCH32_USER):
            raise ValueError(f"PSTATE {value:#x}: a guest has no mode {mode:#x}")
        self._bank_stack_pointer()
        if mode == _AARCH32_USER:
            self._library.cpsr_write(env, value, 0xFFFF_FFFF, _CPSR_WRITE_RAW)
            self._halves[self._aarch64_half] = 0
        else:
            self._halves[self._aarch64_half] = 1
            self._write_register(arm64_const.UC_ARM64_REG_PSTATE, value)
            self._words[self._sp_word] = self._words[self._current_bank()]
        self._library.arm_rebuild_hflags(env)

    def trap_state(self) -> tuple[int, int, int, int, int, int]:
        """`CpuEngine.trap_state`."""
        (pc, pstate, aarch64, carry, overflow, negative, zero, btype, daif,
         sctlr, esr, far, hpfar) = self._trap_pieces()  # fmt: skip
        if not aarch64:
            pstate = int(self._library.cpsr_read(self._addresses.env))
            return esr, pc, pstate, sctlr, far, hpfar
        pstate |= daif
        if negative >= _BIT_31:
            pstate |= _BIT_31
        if not zero:
            pstate |= 1 << 30
        if carry:
            pstate |= 1 << 29
        if overflow >= _BIT_31:
            pstate |= 1 << 28
        if btype:
            pstate |= btype << 10
        return esr, pc, pstate, sctlr, far, hpfar

    def sp(self, el: int) -> int:
        """SP_EL0 or SP_EL1."""
        return self._words[self._stack_pointer_word(el)]

    def set_sp(self, el: int, value: int) -> None:
        """Set SP_EL0 or SP_EL1."""
        self._words[self._stack_pointer_word(el)] = value

    def elr_el1(self) -> int:
        """ELR_EL1."""
        return self._words[(self._layout.elr_el >> 3) + 1]

    def set_elr_el1(self, value: int) -> None:
        """Set ELR_EL1."""
        self._words[(self._layout.elr_el >> 3) + 1] = value

    def spsr_el1(self) -> int:
        """SPSR_EL1."""
        return self._words[(self._layout.banked_spsr >> 3) + self._layout.spsr_el1]

    def set_spsr_el1(self, value: int) -> None:
        """Set SPSR_EL1."""
        self._words[(self._layout.banked_spsr >> 3) + self._layout.spsr_el1] = value

    def fp_registers(self) -> bytes:
        """V0-V31 as 512 bytes, then FPSR and FPCR as two little-endian u32 (520 bytes)."""
        vectors = b"".join(bytes(self._state[at : at + 16]) for at in self._vector_offsets())
        status = self._read_register(arm64_const.UC_ARM64_REG_FPSR)
        control = self._read_register(arm64_const.UC_ARM64_REG_FPCR)
        return vectors + struct.pack("<II", status, control)

    def set_fp_registers(self, data: bytes) -> None:
        """Set V0-V31, FPSR, FPCR from 520 bytes laid out as `fp_registers` gives them; the rest of
        an SVE register becomes zero. Raises ValueError for another length."""
        if len(data) != FP_BYTES:
            raise ValueError(f"the FP registers are {FP_BYTES} bytes, not {len(data)}")
        rest = bytes(self._layout.zreg_bytes - 16)
        for index, at in enumerate(self._vector_offsets()):
            value = data[16 * index : 16 * index + 16] + rest
            self._state[at : at + self._layout.zreg_bytes] = value
        status, control = struct.unpack_from("<II", data, 512)
        self._write_register(arm64_const.UC_ARM64_REG_FPSR, status)
        self._write_register(arm64_const.UC_ARM64_REG_FPCR, control)

    def read_sysreg(self, register: SysReg) -> int:
        """A system register of EL1, EL2 or EL3. MIDR_EL1 and MPIDR_EL1 read as at EL1, that is
        VPIDR_EL2 and VMPIDR_EL2. Raises KeyError if the CPU has no such register."""
        return self._sysregs.read(register)

    def write_sysreg(self, register: SysReg, value: int) -> None:
        """Write a system register, with its side effects. Raises KeyError if the CPU has no such
        register, EngineError if it is read-only."""
        self._sysregs.write(register, value)

    def take_exception_to_el1(self, esr: int, far: int | None) -> None:
        """Enter the guest's EL1 vector for a synchronous exception (Arm ARM D1.3): ESR_EL1, FAR_EL1
        unless None, ELR_EL1, SPSR_EL1, PSTATE with PAN by SCTLR_EL1.SPAN, and PC."""
        layout, env = self._layout, self._addresses.env
        if not self._halves[self._aarch64_half]:
            self._library.aarch64_sync_64_to_32(env)
        flags = bytes(self._state[layout.flags : layout.flags + _FLAG_BYTES])
        self._halves[layout.syndrome >> 2] = esr & 0xFFFF_FFFF
        self._halves[layout.target_el >> 2] = 1
        if far is not None:
            self._words[layout.vaddress >> 3] = far
        number = _EXCP_UDEF if far is None else _EXCP_DATA_ABORT
        ctypes.c_int32.from_address(self._addresses.exception_index).value = number
        self._library.arm_cpu_do_interrupt(self._addresses.cpu)
        # QEMU clears NZCV on entry; the architecture keeps it.
        self._state[layout.flags : layout.flags + _FLAG_BYTES] = flags

    # The whole context

    @property
    def context_bytes(self) -> int:
        """Size of a saved context, bytes."""
        return self._layout.context_bytes

    def save_context(self, pa: int) -> None:
        """Write the CPU's architectural state to RAM at PA `pa`. Raises BusError outside RAM."""
        ctypes.memmove(self._context_at(pa), self._addresses.env, self._layout.context_bytes)

    def blank_context(self, pa: int) -> None:
        """Write the state of a CPU just reset to RAM at PA `pa`; the running context stays as it
        is. Raises BusError outside RAM."""
        ctypes.memmove(self._context_at(pa), self._pristine, self._layout.context_bytes)

    def load_context(self, pa: int) -> None:
        """Load a state that `save_context` or `blank_context` wrote, and flush the TLB. The
        exclusive monitor is cleared, as by any exception return; the interrupt lines are pins and
        stay. Raises BusError outside RAM."""
        lines = self._halves[self._layout.irq_line_state >> 2]
        ctypes.memmove(self._addresses.env, self._context_at(pa), self._layout.context_bytes)
        self._halves[self._layout.irq_line_state >> 2] = lines
        self._words[self._layout.exclusive_address >> 3] = (1 << 64) - 1
        self._library.tlb_flush(self._addresses.cpu)
        self._update_lines()

    def reset_context(self) -> None:
        """The EL1 reset state of facts §6.1; EL2 and EL3 registers and the interrupt lines are
        untouched. The TLB is flushed."""
        kept = [(at, bytes(self._state[at : at + size])) for at, size in EL2_EL3_STATE]
        self._state[:] = self._pristine
        for at, value in kept:
            self._state[at : at + len(value)] = value
        self._library.arm_rebuild_hflags(self._addresses.env)
        self._library.tlb_flush(self._addresses.cpu)

    def _make_pristine(self) -> None:
        """Bring a CPU fresh from QEMU's reset to the EL1 reset state and remember it."""
        self.pstate = reg.PSTATE_RESET
        self.write_sysreg(reg.SCTLR_EL1, reg.SCTLR_EL1_RESET)
        self._words[self._layout.oslsr_el1 >> 3] = OSLSR_EL1_RESET
        self._library.arm_rebuild_hflags(self._addresses.env)
        self._pristine = bytes(self._state)

    # QEMU's ways of keeping registers

    def _enter_aarch32(self) -> None:
        """X registers to AArch32's copy, before AArch32 code runs."""
        self._library.aarch64_sync_64_to_32(self._addresses.env)

    def _leave_aarch32(self) -> None:
        """AArch32's registers to X0-X14 and PC, after AArch32 code ran."""
        self._library.aarch64_sync_32_to_64(self._addresses.env)

    def _update_lines(self) -> None:
        """Virtual interrupts pending at the CPU, from HCR_EL2 and the context's lines."""
        self._library.arm_cpu_update_virq(self._addresses.cpu)
        self._library.arm_cpu_update_vfiq(self._addresses.cpu)

    def _current_bank(self) -> int:
        """Word of the bank that the stack pointer in use belongs to."""
        pstate = self._halves[self._pstate_half]
        el = pstate >> 2 & 3 if pstate & 1 else 0
        return (self._layout.sp_el >> 3) + el

    def _bank_stack_pointer(self) -> None:
        if self._halves[self._aarch64_half]:
            self._words[self._current_bank()] = self._words[self._sp_word]

    def _stack_pointer_word(self, el: int) -> int:
        bank = (self._layout.sp_el >> 3) + el
        if self._halves[self._aarch64_half] and bank == self._current_bank():
            return self._sp_word
        return bank

    def _vector_offsets(self) -> range:
        first, size = self._layout.zregs, self._layout.zreg_bytes
        return range(first, first + 32 * size, size)

    def _context_at(self, pa: int) -> int:
        if not self._memory.is_ram(pa, self._layout.context_bytes):
            raise BusError(pa, self._layout.context_bytes)
        return self._ram_shift + pa

    def _read_register(self, number: int) -> int:
        value = ctypes.c_uint64()
        status = self._library.uc_reg_read(self._addresses.uc, number, ctypes.byref(value))
        if status:
            raise EngineError(f"unicorn cannot read its register {number}: error {status}")
        return value.value

    def _write_register(self, number: int, value: int) -> None:
        word = ctypes.c_uint64(value)
        status = self._library.uc_reg_write(self._addresses.uc, number, ctypes.byref(word))
        if status:
            raise EngineError(f"unicorn cannot write its register {number}: error {status}")
