# SPDX-License-Identifier: GPL-2.0-or-later
"""A small guest for tests of the CPU engine: RAM, stage-2 tables, code as instruction words.

IPA space: 32 bits, one level-3 table: pages 0-63 (IPA 0-0x3ffff) are mapped to
`BACKING` + IPA, the rest of the first 2 MiB is not. EL1's vectors at `VECTORS`
report with HVC #0x99: X20 = vector offset, X21 = ESR_EL1, X22 = FAR_EL1,
X23 = ELR_EL1, X24 = SPSR_EL1.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from pkvm.arm64 import gic, stage2
from pkvm.arm64 import registers as reg
from pkvm.arm64.registers import SysReg
from pkvm.machine.cpu.engine import StopReason
from pkvm.machine.cpu.unicorn_engine import UnicornEngine
from pkvm.machine.memory import PAGE_SIZE, DeviceWindow, PhysicalMemory

RAM_BASE = 0x8000_0000
RAM_BYTES = 4 << 20
ROOT = RAM_BASE
TABLE = RAM_BASE + 0x4000
BACKING = RAM_BASE + 0x10_0000
MAPPED_PAGES = 64
CODE = 0x1000
VECTORS = 0x8000
DATA = 0x1_0000
UNMAPPED = 0x4_0000
EL1_REPORT = 0x99
PAGE_RWX = stage2.ATTR_NORMAL_RWX | stage2.TABLE_OR_PAGE
HCR = reg.hcr("VM", "RW", "IMO", "FMO", "AMO", "TSC", "TWI")

# Instructions without operands
NOP = 0xD503201F
WFI = 0xD503207F
WFE = 0xD503205F
ERET = 0xD69F03E0
ISB = 0xD5033FDF
DSB = 0xD5033F9F
TLBI_VMALLE1 = 0xD508871F
UDF = 0x00000000


def movz(rd: int, value: int, shift: int = 0) -> int:
    """MOVZ Xd, #value, LSL #shift."""
    return 0xD2800000 | shift // 16 << 21 | value << 5 | rd


def movk(rd: int, value: int, shift: int) -> int:
    """MOVK Xd, #value, LSL #shift."""
    return 0xF2800000 | shift // 16 << 21 | value << 5 | rd


def mov(rd: int, value: int) -> list[int]:
    """Any 64-bit value to Xd, four words."""
    return [movz(rd, value & 0xFFFF)] + [
        movk(rd, value >> shift & 0xFFFF, shift) for shift in (16, 32, 48)
    ]


def add(rd: int, rn: int, value: int) -> int:
    """ADD Xd, Xn, #value."""
    return 0x91000000 | value << 10 | rn << 5 | rd


def sub(rd: int, rn: int, value: int) -> int:
    """SUB Xd, Xn, #value."""
    return 0xD1000000 | value << 10 | rn << 5 | rd


def hvc(number: int) -> int:
    """HVC #number."""
    return 0xD4000002 | number << 5


def svc(number: int) -> int:
    """SVC #number."""
    return 0xD4000001 | number << 5


def smc(number: int) -> int:
    """SMC #number."""
    return 0xD4000003 | number << 5


def brk(number: int) -> int:
    """BRK #number."""
    return 0xD4200000 | number << 5


def mrs(rt: int, register: SysReg) -> int:
    """MRS Xt, register."""
    return msr(register, rt) | 1 << 21


def msr(register: SysReg, rt: int) -> int:
    """MSR register, Xt."""
    op0, op1, crn, crm, op2 = register
    return 0xD5000000 | op0 << 19 | op1 << 16 | crn << 12 | crm << 8 | op2 << 5 | rt


def daifclr(bits: int) -> int:
    """MSR DAIFClr, #bits."""
    return 0xD50340FF | bits << 8


def b(words: int) -> int:
    """B to so many words from here."""
    return 0x14000000 | words & 0x3FF_FFFF


def cbnz(rt: int, words: int) -> int:
    """CBNZ Xt to so many words from here."""
    return 0xB5000000 | (words & 0x7FFFF) << 5 | rt


def br(rn: int) -> int:
    """BR Xn."""
    return 0xD61F0000 | rn << 5


def ldr(rt: int, rn: int, offset: int = 0) -> int:
    """LDR Xt, [Xn, #offset]."""
    return 0xF9400000 | offset // 8 << 10 | rn << 5 | rt


def str_(rt: int, rn: int, offset: int = 0) -> int:
    """STR Xt, [Xn, #offset]."""
    return 0xF9000000 | offset // 8 << 10 | rn << 5 | rt


def strh(rt: int, rn: int, offset: int = 0) -> int:
    """STRH Wt, [Xn, #offset]."""
    return 0x79000000 | offset // 2 << 10 | rn << 5 | rt


def ldrsb_w(rt: int, rn: int, offset: int = 0) -> int:
    """LDRSB Wt, [Xn, #offset]."""
    return 0x39C00000 | offset << 10 | rn << 5 | rt


def ldp(rt: int, rt2: int, rn: int) -> int:
    """LDP Xt, Xt2, [Xn]."""
    return 0xA9400000 | rt2 << 10 | rn << 5 | rt


def fmov_to_d(rd: int, rn: int) -> int:
    """FMOV Dd, Xn."""
    return 0x9E670000 | rn << 5 | rd


def fmov_to_high(rd: int, rn: int) -> int:
    """FMOV Vd.D[1], Xn."""
    return 0x9EAF0000 | rn << 5 | rd


REPORT = [
    mrs(21, reg.ESR_EL1),
    mrs(22, reg.FAR_EL1),
    mrs(23, SysReg(3, 0, 4, 0, 1)),  # ELR_EL1
    mrs(24, SysReg(3, 0, 4, 0, 0)),  # SPSR_EL1
    hvc(EL1_REPORT),
]


def set_virtual_irq(engine: UnicornEngine, *, level: bool) -> None:
    """Make interrupt 40 pending, or none, at an interface that lets it through."""
    pending = gic.LR_PENDING | gic.LR_GROUP1 | 40
    engine.gic.load_context(gic.VMCR.encode(VENG1=1, VPMR=0xF8), 0, 0)
    engine.gic.load([pending] if level else [], 0)


class Exit:
    """What EL2 saw at one exception."""

    def __init__(self, engine: UnicornEngine) -> None:
        self.esr = engine.esr_el2
        self.far = engine.far_el2
        self.hpfar = engine.hpfar_el2
        self.pc = engine.pc
        self.pstate = engine.pstate

    @property
    def ec(self) -> int:
        """Exception class."""
        return self.esr >> 26

    @property
    def iss(self) -> int:
        """Syndrome bits below EC and IL."""
        return self.esr & 0x1FF_FFFF


class Guest:
    """An engine with a guest's memory behind it; `exits` collects what reached the vector."""

    def __init__(
        self,
        *,
        cpu_model: str = "cortex-a72",
        count_blocks: bool = False,
        counter: Callable[[], int] | None = None,
        windows: Sequence[DeviceWindow] = (),
    ) -> None:
        self.memory = PhysicalMemory(RAM_BASE, RAM_BYTES)
        for window in windows:
            self.memory.add_window(window)
        self.engine = UnicornEngine(
            self.memory, cpu_model=cpu_model, count_blocks=count_blocks, counter=counter
        )
        self.exits: list[Exit] = []
        self.memory.write_u64(ROOT, TABLE | stage2.TABLE_OR_PAGE | stage2.VALID)
        for page in range(MAPPED_PAGES):
            self.map(page * PAGE_SIZE)
        for offset in range(0, 0x800, 0x80):
            self.write(VECTORS + offset, movz(20, offset), *REPORT)
        self.program_el2()
        self.engine.pstate = reg.PSTATE_RESET

    def program_el2(self) -> None:
        """EL2's registers for this guest, and EL1's vector base."""
        engine = self.engine
        engine.write_sysreg(reg.VTCR_EL2, stage2.Geometry(32).vtcr(parange=2))
        engine.write_sysreg(reg.VTTBR_EL2, stage2.vttbr(ROOT, vmid=1))
        engine.write_sysreg(reg.HCR_EL2, HCR)
        engine.write_sysreg(reg.VBAR_EL1, VECTORS)

    def map(self, ipa: int, attributes: int = PAGE_RWX, *, pa: int | None = None) -> None:
        """Write the leaf of a page; no TLB is flushed."""
        target = BACKING + ipa if pa is None else pa
        self.memory.write_u64(TABLE + (ipa >> 12) * 8, target | attributes)

    def unmap(self, ipa: int) -> None:
        """Clear the leaf of a page; no TLB is flushed."""
        self.memory.write_u64(TABLE + (ipa >> 12) * 8, 0)

    def write(self, ipa: int, *words: int) -> None:
        """Put instructions at an IPA, and tell the engine."""
        self.write_bytes(ipa, struct.pack(f"<{len(words)}I", *words))

    def write_bytes(self, ipa: int, data: bytes) -> None:
        """Put bytes at an IPA, and tell the engine."""
        self.memory.write(BACKING + ipa, data)
        self.engine.invalidate_code(BACKING + ipa, len(data))

    def read(self, ipa: int) -> int:
        """The 64-bit word at an IPA."""
        return self.memory.read_u64(BACKING + ipa)

    def run(self, *words: int, pstate: int = reg.PSTATE_RESET, exits: int = 1) -> Exit:
        """Run `words` at CODE until so many exceptions reached EL2; the last of them."""
        self.write(CODE, *words)
        self.engine.pstate = pstate
        self.engine.pc = CODE
        self.exits.clear()
        self.engine.vector = lambda: self.note() < exits
        assert self.engine.run() is StopReason.VECTOR
        return self.exits[-1]

    def note(self) -> int:
        """Remember what the engine shows of an exception; how many there were."""
        self.exits.append(Exit(self.engine))
        return len(self.exits)

    def run_known_program(self) -> None:
        """Reset the CPU and check that a program of known result still has it."""
        set_virtual_irq(self.engine, level=False)
        self.engine.reset_context()
        self.program_el2()
        found = self.run(movz(0, 0x55), add(0, 0, 1), hvc(0x77))
        assert (self.engine.x[0], found.esr, found.pc) == (0x56, 0x5A00_0077, CODE + 12)

    def enable_stage1(self) -> None:
        """Identity stage 1 for the mapped pages at EL1, tables in DATA.. (three pages)."""
        self.write_bytes(DATA, struct.pack("<Q", DATA + 0x1000 | 3))
        self.write_bytes(DATA + 0x1000, struct.pack("<Q", DATA + 0x2000 | 3))
        leaves = [page << 12 | 0x703 for page in range(MAPPED_PAGES)]
        self.write_bytes(DATA + 0x2000, struct.pack(f"<{MAPPED_PAGES}Q", *leaves))
        self.engine.write_sysreg(reg.MAIR_EL1, 0xFF)
        self.engine.write_sysreg(reg.TCR_EL1, 2 << 32 | 1 << 23 | 32)
        self.engine.write_sysreg(reg.TTBR0_EL1, DATA)
        self.engine.write_sysreg(reg.SCTLR_EL1, reg.SCTLR_EL1_RESET | 1)
