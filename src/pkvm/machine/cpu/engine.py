# SPDX-License-Identifier: GPL-2.0-or-later
"""`CpuEngine`: one physical CPU below EL2, as EL2 sees it.

Python is EL2; the engine executes what is below it, EL1 and EL0 of guests,
with HCR_EL2.VM set, and walks the real stage-2 descriptors in physical memory.
The protocol is architectural so that a second engine may stand behind it:

* EL2 programs the CPU through `write_sysreg`, general registers and PSTATE,
  then calls `run`.
* An exception that targets EL1 never leaves the engine: it is delivered as the
  architecture says (ESR_EL1, FAR_EL1, ELR_EL1, SPSR_EL1, vector).
* An exception that targets EL2 calls the `vector` *from inside* `run`, with
  `esr_el2`, `far_el2`, `hpfar_el2` and the preferred return address in `pc`
  (for HVC the instruction after it; for a trapped instruction or an abort the
  instruction itself). If the vector returns True the guest is re-entered at
  `pc`; if False, `run` returns `StopReason.VECTOR`. This is one call instead of
  a stop and a start, and pays for most of what a hypercall costs.
* `interrupt`, from any thread, is a physical interrupt to EL2: `run` returns
  `StopReason.INTERRUPT` at once, or at its next call if none is under way.

General registers and special registers are only meaningful while no guest runs,
that is inside the vector or between runs. The engine holds one context; EL2
moves contexts to and from physical memory (`save_context`, `load_context`).
The TLB has no VMID tags: `load_context` flushes it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol

from pkvm.arm64.registers import SysReg
from pkvm.machine.gic import VirtualCpuInterface


class StopReason(Enum):
    """Why `CpuEngine.run` returned."""

    VECTOR = "vector"
    """EL2's vector returned False."""
    INTERRUPT = "interrupt"
    """`interrupt` was called."""
    SLICE = "slice"
    """The slice of translated blocks was used up."""


class CpuEngine(Protocol):
    """One physical CPU; see the module's text for the contract."""

    x: memoryview[int]
    """X0-X30 as unsigned 64-bit numbers, 31 entries: XZR is not stored."""

    vector: Callable[[], bool]
    """EL2's exception vector; EL2 sets it while no guest runs. Must not raise: an exception raised
    in it stops the run and is raised again from `run`."""

    gic: VirtualCpuInterface
    """The virtual CPU interface, which drives the virtual interrupt lines. Its state is not part of
    the context that `save_context` writes."""

    on_alarm: Callable[[], None]
    """What `set_alarm` is about; called from inside `run`, by the thread that runs the guest."""

    on_deadline: Callable[[int | None], None]
    """Told at which physical count the running context's virtual timer will be due, or None:
    whenever the timer is programmed, even if that is past, and when another context is loaded,
    then only if it is not. Called from the middle of guest code; must not raise."""

    @property
    def pc(self) -> int:
        """Program counter of the guest, or the preferred return address inside the vector."""
        ...

    @pc.setter
    def pc(self, value: int) -> None: ...

    def skip_instruction(self) -> None:
        """PC + 4, modulo 2^64."""
        ...

    @property
    def pstate(self) -> int:
        """PSTATE in SPSR_ELx form; bit 4 is set in AArch32 state."""
        ...

    @pstate.setter
    def pstate(self, value: int) -> None: ...

    @property
    def esr_el2(self) -> int:
        """Syndrome of the last exception taken to EL2."""
        ...

    @property
    def far_el2(self) -> int:
        """Faulting virtual address of the last abort taken to EL2."""
        ...

    @property
    def hpfar_el2(self) -> int:
        """HPFAR_EL2 of the last stage-2 abort."""
        ...

    def syndrome(self) -> int:
        """`esr_el2`, read in the cheapest way: what a vector starts with."""
        ...

    def exit_state(self) -> tuple[int, int, int, int, int]:
        """What an exit is about, in one read: a word whose low four bits are PSTATE.M[3:0], whether
        in AArch64 state (0 or 1), SCTLR_EL1, FAR_EL2, HPFAR_EL2. In AArch32 state the first says
        nothing."""
        ...

    def trap_state(self) -> tuple[int, int, int, int, int, int]:
        """What a host that sees a vCPU's registers is shown of a trap beside X0-X30, in one read:
        ESR_EL2, PC, PSTATE in SPSR form, SCTLR_EL1, FAR_EL2, HPFAR_EL2."""
        ...

    def args(self) -> tuple[int, int, int, int]:
        """X0-X3 in one read: what a hypercall needs, cheaper than four."""
        ...

    def set_results(self, x0: int, x1: int, x2: int, x3: int) -> None:
        """X0-X3 in one write; values are unsigned 64-bit numbers."""
        ...

    def read_sysreg(self, register: SysReg) -> int:
        """A system register of EL1, EL2 or EL3. Raises KeyError if the CPU has no such register."""
        ...

    def write_sysreg(self, register: SysReg, value: int) -> None:
        """Write a system register. Raises KeyError if the CPU has no such register."""
        ...

    def sp(self, el: int) -> int:
        """SP_EL0 or SP_EL1."""
        ...

    def set_sp(self, el: int, value: int) -> None:
        """Set SP_EL0 or SP_EL1."""
        ...

    def elr_el1(self) -> int:
        """ELR_EL1."""
        ...

    def set_elr_el1(self, value: int) -> None:
        """Set ELR_EL1."""
        ...

    def spsr_el1(self) -> int:
        """SPSR_EL1."""
        ...

    def set_spsr_el1(self, value: int) -> None:
        """Set SPSR_EL1."""
        ...

    def fp_registers(self) -> bytes:
        """V0-V31 as 512 bytes, then FPSR and FPCR as two little-endian u32 (520 bytes)."""
        ...

    def set_fp_registers(self, data: bytes) -> None:
        """Set V0-V31, FPSR, FPCR from 520 bytes laid out as `fp_registers` gives them."""
        ...

    def reset_context(self) -> None:
        """The EL1 reset state of facts §6.1, all of it; EL2 and EL3 registers are untouched."""
        ...

    @property
    def context_bytes(self) -> int:
        """Size of a saved context, bytes."""
        ...

    def save_context(self, pa: int) -> None:
        """Write the CPU's architectural state to RAM at PA `pa`, `context_bytes` long."""
        ...

    def load_context(self, pa: int) -> None:
        """Load a state that `save_context` or `blank_context` wrote, and flush the TLB.
        EL2 and EL3 control registers come with it, so EL2 programs them afterwards."""
        ...

    def take_exception_to_el1(self, esr: int, far: int | None) -> None:
        """Enter the guest's EL1 vector for a synchronous exception, architecturally.

        ESR_EL1 := `esr`, FAR_EL1 := `far` unless None, ELR_EL1 := pc, SPSR_EL1 := pstate, PSTATE
        and the vector offset as the Arm ARM says (D1.3): VBAR_EL1 + 0x200 from EL1 with SP_EL1,
        + 0x000 from EL1 with SP_EL0, + 0x400 from AArch64 EL0.
        """
        ...

    def flush_tlb(self) -> None:
        """TLBI of everything below EL2, complete when it returns."""
        ...

    def invalidate_code(self, pa: int, length: int) -> None:
        """Forget translations of guest code in [pa, pa+length), bytes: needed after any write to
        RAM that the guest did not do itself, where code may live."""
        ...

    def run(self) -> StopReason:
        """Run the guest until EL2 gets the CPU back. See the module's text."""
        ...

    def interrupt(self) -> None:
        """A physical interrupt to EL2, from any thread. Level-triggered: seen once, never lost."""
        ...

    @property
    def blocks(self) -> int:
        """Translated blocks executed so far; 0 for ever if counting is off."""
        ...

    def set_slice(self, blocks: int | None) -> None:
        """End the next run after so many translated blocks, exactly and repeatably; None: never.
        Raises ValueError if the engine was made without block counting."""
        ...

    def set_alarm(self, blocks: int | None) -> None:
        """Call `on_alarm` after so many translated blocks, exactly and repeatably; None: never.
        Raises ValueError if the engine was made without block counting."""
        ...

    def close(self) -> None:
        """Free the engine. Idempotent."""
        ...
