# SPDX-License-Identifier: GPL-2.0-or-later
"""The board with the smallest possible EL2, for one guest program on one CPU.

Guest programs are tested here apart from the hypervisor and the host: what they
do when everything is as promised, and, which no real EL2 would ever let them
see, when it is not. Memory is mapped by 2 MiB blocks before the guest starts.
`BareBoard` has the `run` and `complete` of a vCPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from pkvm import fdt, guests
from pkvm.arm64 import esr as syndrome
from pkvm.arm64 import psci, smccc
from pkvm.arm64 import registers as r
from pkvm.arm64 import stage2 as s2
from pkvm.arm64.bits import MASK64
from pkvm.arm64.esr import EC
from pkvm.guests.agent import MmioExit
from pkvm.kvm.exits import Intr, Mmio, SystemEvent
from pkvm.machine.cpu.engine import CpuEngine, StopReason
from pkvm.machine.cpu.unicorn_engine import UnicornEngine
from pkvm.machine.memory import PhysicalMemory

SLOT_BYTES = s2.BLOCK_2M
RAM_BASE = 0x4000_0000
RAM_BYTES = 4 * s2.BLOCK_2M
PAYLOAD = RAM_BASE + s2.BLOCK_2M
UART = 0x0900_0000

_PA = 0x8000_0000
_SLOT_PA = _PA + s2.BLOCK_2M
_RAM_PA = _SLOT_PA + SLOT_BYTES
_GEOMETRY = s2.Geometry(40)
_UART_FR = 0x18
_FR_TRANSMIT_EMPTY = 1 << 7

Calls = dict[int, tuple[int, int, int, int]]
Exit = Mmio | SystemEvent | Intr


def calls(*, protected: bool = True) -> Calls:
    """Function id -> X0-X3 of the calls that a well-behaved hypervisor answers."""
    table: Calls = {
        smccc.Function.SMCCC_VERSION: (smccc.VERSION_1_2, 0, 0, 0),
        smccc.Function.VENDOR_UID: smccc.VENDOR_HYP_UID,
        smccc.Function.KVM_FEATURES: (1, 0, 0, 0),
        psci.Function.PSCI_VERSION: (psci.VERSION_1_1, 0, 0, 0),
    }
    if protected:
        table[smccc.Function.KVM_FEATURES] = (0x1D, 0, 0, 0)
        table[smccc.Function.HYP_MEMINFO] = (s2.PAGE_SIZE, 1, 0, 0)
        table[smccc.Function.MEM_SHARE] = (smccc.SUCCESS, 1, 0, 0)
        table[smccc.Function.MEM_UNSHARE] = (smccc.SUCCESS, 1, 0, 0)
    return table


def device_tree(
    *,
    kernel: tuple[int, int, int] = (PAYLOAD, s2.PAGE_SIZE, PAYLOAD),
    memory: tuple[int, int] = (RAM_BASE, RAM_BYTES),
    bootargs: str = "",
    cpus: int = 1,
) -> fdt.Tree:
    """The board's tree; `kernel` is address, bytes and entry of the payload."""
    tree = fdt.Tree()
    tree.root.set_u32("#address-cells", 2)
    tree.root.set_u32("#size-cells", 2)
    tree.root.add("chosen").set_strings("bootargs", bootargs)
    tree.root.add(f"memory@{RAM_BASE:x}").set_u64("reg", *memory)
    group = tree.root.add("cpus")
    group.set_u32("#address-cells", 1)
    group.set_u32("#size-cells", 0)
    for number in range(cpus):
        group.add(f"cpu@{number:x}").set_u32("reg", number)
    config = tree.root.add("config")
    for name, value in zip(("address", "size", "entry"), kernel, strict=True):
        config.set_u64(f"kernel-{name}", value)
    return tree


class BareBoard:
    """One CPU, a firmware slot at IPA 0, RAM at 0x4000_0000, a UART whose text is `console`."""

    def __init__(self) -> None:
        self.memory = PhysicalMemory(_PA, 8 * s2.BLOCK_2M)
        self.engine: CpuEngine = UnicornEngine(
            self.memory, cpu_model="cortex-a72", count_blocks=False, counter=None
        )
        self.engine.vector = self._vector
        self.calls = calls()
        self.ends: dict[int, str] = {
            psci.Function.SYSTEM_OFF: "shutdown",
            psci.Function.SYSTEM_RESET: "reset",
        }
        """Function id -> the end that it asks for."""
        self.hypercalls: list[tuple[int, ...]] = []
        """X0-X3 of every HVC."""
        self.console = ""
        self._exit: Exit | None = None
        self._pending = 0
        """Syndrome of the load that `_exit` is about."""
        self._answer = 0
        self._map()

    def close(self) -> None:
        self.engine.close()

    def enter(
        self,
        program: str | bytes,
        *,
        payload: str | bytes = b"",
        tree: bytes | None = None,
        x: Mapping[int, int] | None = None,
        sysregs: Mapping[r.SysReg, int] | None = None,
        sp: int = SLOT_BYTES,
        pc: int = 0,
        pstate: int = r.PSTATE_RESET,
    ) -> None:
        """Put `program` at `pc` of the firmware slot, `payload` and `tree` into RAM, and reset the
        CPU as the RFC promises, except for what is given here. All memory is zero elsewhere."""
        self.memory.zero(_SLOT_PA, SLOT_BYTES + RAM_BYTES)
        self.write(pc, _image(program))
        self.write(PAYLOAD, _image(payload))
        self.write(RAM_BASE, tree if tree is not None else b"")
        engine = self.engine
        engine.invalidate_code(_SLOT_PA, SLOT_BYTES + RAM_BYTES)
        engine.reset_context()
        engine.write_sysreg(r.VMPIDR_EL2, r.mpidr_of_vcpu_id(0))
        engine.write_sysreg(r.VTTBR_EL2, s2.vttbr(_PA, 1))
        engine.write_sysreg(r.VTCR_EL2, _GEOMETRY.vtcr(2))
        engine.write_sysreg(r.HCR_EL2, r.hcr("VM", "RW", "TSC", "TWI"))
        engine.write_sysreg(r.CPTR_EL2, r.CPTR_RES1)
        engine.flush_tlb()
        for register, value in (sysregs or {}).items():
            engine.write_sysreg(register, value)
        for number in range(31):
            engine.x[number] = 0
        engine.x[0] = RAM_BASE
        for number, value in (x or {}).items():
            engine.x[number] = value
        engine.pstate = pstate
        engine.set_sp(1, sp)
        engine.pc = pc
        self.console = ""
        self.hypercalls.clear()
        self._exit = None
        self._answer = 0

    def read(self, ipa: int, length: int) -> bytes:
        """Guest memory, as the guest itself sees it."""
        return self.memory.read(self._pa(ipa), length)

    def write(self, ipa: int, data: bytes) -> None:
        """Store into guest memory."""
        self.memory.write(self._pa(ipa), data)

    def run(self) -> Exit:
        """Run until the guest leaves for the VMM."""
        if isinstance(self._exit, Mmio) and not self._exit.is_write:
            self._finish_read(self._exit)
        self._exit = None
        if self.engine.run() is StopReason.INTERRUPT:
            return Intr()
        return self._left_with()

    def _left_with(self) -> Exit:
        assert self._exit is not None
        return self._exit

    def complete(self, mmio: Mmio, value: int) -> None:
        """Answer an MMIO read."""
        self._answer = value

    def serve(self, mmio: MmioExit) -> int:
        """The UART; anything else reads as zero."""
        if mmio.is_write and mmio.address == UART:
            self.console += chr(mmio.data & 0xFF)
        return _FR_TRANSMIT_EMPTY if mmio.address == UART + _UART_FR else 0

    def run_to_end(
        self, device: Callable[[Mmio], int | None] | None = None, seconds: float = 20.0
    ) -> str:
        """Run until the guest asks for its end: "shutdown" or "reset"; "timeout" if it does not.
        `device` gets every MMIO access that is not the UART's."""
        guard = threading.Timer(seconds, self.engine.interrupt)
        guard.start()
        try:
            while True:
                match self.run():
                    case Mmio() as mmio if device is not None and mmio.address >> 12 != UART >> 12:
                        self.complete(mmio, device(mmio) or 0)
                    case Mmio() as mmio:
                        self.complete(mmio, self.serve(mmio))
                    case SystemEvent(kind=kind):
                        return kind
                    case Intr():
                        return "timeout"
        finally:
            guard.cancel()
            guard.join()

    def _map(self) -> None:
        level2 = _PA + _GEOMETRY.root_bytes
        for index, (ipa, pa, length) in enumerate(
            ((0, _SLOT_PA, SLOT_BYTES), (RAM_BASE, _RAM_PA, RAM_BYTES))
        ):
            table = level2 + index * s2.PAGE_SIZE
            self.memory.write_u64(_PA + 8 * (ipa >> 30), table | 3)
            for offset in range(0, length, s2.BLOCK_2M):
                entry = table + 8 * (offset >> 21)
                self.memory.write_u64(entry, pa + offset | s2.ATTR_NORMAL_RWX)

    def _pa(self, ipa: int) -> int:
        if ipa < SLOT_BYTES:
            return _SLOT_PA + ipa
        assert RAM_BASE <= ipa < RAM_BASE + RAM_BYTES, hex(ipa)
        return _RAM_PA + ipa - RAM_BASE

    def _vector(self) -> bool:
        """EL2's vector: True to go on in the guest."""
        engine = self.engine
        code = engine.esr_el2
        match code >> syndrome.EC_SHIFT:
            case EC.HVC64:
                return self._hypercall()
            case EC.DABT_LOW if code & syndrome.ISV:
                return self._mmio(code)
            case EC.SMC64:
                engine.x[0] = smccc.NOT_SUPPORTED
                engine.pc += 4
            case EC.WFX:
                engine.pc += 4
            case EC.DABT_LOW | EC.IABT_LOW as kind:
                current = EC.DABT_CUR if kind == EC.DABT_LOW else EC.IABT_CUR
                external = current << syndrome.EC_SHIFT | syndrome.IL | syndrome.FSC_EXTERNAL
                engine.take_exception_to_el1(external, engine.far_el2)
            case _:
                engine.take_exception_to_el1(syndrome.IL, None)
        return True

    def _hypercall(self) -> bool:
        args = self.engine.args()
        self.hypercalls.append(args)
        function = args[0] & 0xFFFF_FFFF
        if function in self.ends:
            self._exit = SystemEvent(self.ends[function])
            return False
        self.engine.set_results(*self.calls.get(function, (smccc.NOT_SUPPORTED, 0, 0, 0)))
        return True

    def _mmio(self, code: int) -> bool:
        engine = self.engine
        ipa = syndrome.hpfar_to_ipa(engine.hpfar_el2) | engine.far_el2 & s2.PAGE_MASK
        size = 1 << (code >> syndrome.SAS_SHIFT & 3)
        register = (code & syndrome.SRT_MASK) >> syndrome.SRT_SHIFT
        if code & syndrome.WNR:
            value = engine.x[register] if register < 31 else 0
            engine.pc += 4
            self._exit = Mmio(ipa, size, value & (1 << 8 * size) - 1, True)
        else:
            self._pending = code
            self._exit = Mmio(ipa, size, 0, False)
        return False

    def _finish_read(self, mmio: Mmio) -> None:
        code = self._pending
        value = self._answer & (1 << 8 * mmio.size) - 1
        if code & syndrome.SSE and value >> (8 * mmio.size - 1):
            value -= 1 << 8 * mmio.size
        register = (code & syndrome.SRT_MASK) >> syndrome.SRT_SHIFT
        if register < 31:
            self.engine.x[register] = value & (MASK64 if code & syndrome.SF else 0xFFFF_FFFF)
        self.engine.pc += 4
        self._answer = 0


def _image(program: str | bytes) -> bytes:
    return guests.image(program) if isinstance(program, str) else program
