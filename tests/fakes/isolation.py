# SPDX-License-Identifier: GPL-2.0-or-later
"""A spy and a liar for a host: two machines in step, whose guests differ in their secrets alone.

Both machines execute the same steps. In each the guest's CPU is filled with
secrets of the machine's own, in all registers that the CPU has; what facts §5.4
lets the host see of a class of exits is the same in both. So whatever differs
between what the two hosts see is a secret that got out.

Then the host lies: it fills every page of the vCPU that it can write, and all
arguments of VCPU_LOAD and VCPU_RUN, with noise, and enters. What the guest has
then must be what it had, but for what the class lets in; that is computed here
by `accepted`, which knows nothing of EL2's tables.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, cast

import numpy as np

from fakes import a64
from fakes.el2_rig import BLOCK, MIB, RAM_IPA, El2, Guest
from pkvm.arm64 import gic, psci, smccc
from pkvm.arm64 import registers as r
from pkvm.arm64.bits import MASK64
from pkvm.arm64.psci import Affinity
from pkvm.arm64.psci import Function as Psci
from pkvm.arm64.smccc import Function
from pkvm.hyp.abi import ExitCode, HostCall, HostVcpu
from pkvm.hyp.policy import ANDROID, RFC, Policy
from pkvm.machine.cpu.errors import EngineError
from pkvm.machine.cpu.unicorn_engine import UnicornEngine
from pkvm.machine.stage2 import Stage2Fault

PAGE = 4096
DEVICE = 0x900_0000
"""An IPA where the guest expects a device."""
NOTHING = 0xA00_0000
"""One where it expects none: only the MMIO guard knows the difference."""
TRAP_WAITS = 3 << 13
INCREMENT_PC, PENDING_EXCEPTION = 1, 2
W_MASK = 0xFFFF_FFFF
_SLICE = 1000
"""Blocks of guest code in which an exit must come."""
_EL0, _EL1T, _EL1H = r.PSTATE_EL0T, r.PSTATE_EL1T, r.PSTATE_EL1H
_REGISTERS = range(3, 30)
"""Of which an instruction of a trigger may use any."""
_HOST_REGISTERS = (r.CNTP_CTL_EL0, r.CNTP_CVAL_EL0, r.CNTP_TVAL_EL0, r.ICC_SGI1R_EL1)
_VGIC = slice(HostVcpu.VGIC_HCR, HostVcpu.VGIC_LR + 8 * 16)
_FIXED = {r.SCTLR_EL1, r.TCR_EL1, r.TTBR0_EL1, r.CPACR_EL1, r.MDSCR_EL1, r.PAR_EL1}
_SCTLR_SECRETS = 1 << 2 | 1 << 12 | 1 << 14 | 1 << 15 | 1 << 26
"""Bits that change nothing here: C, I, DZE, UCT, UCI."""
_ENTRY_GIB = 1 << 30
_TABLE = RAM_IPA + 0x10_0000
_DEVICE_GIBS, _FETCH_GIBS, _RAM_GIBS = range(192), range(192, 256), range(256, 512)
"""What the guest's stage 1 leads to devices for data, to the same for instructions, and to RAM: EL1
does not execute what EL0 may write."""
_BLOCK = 1 | 1 << 10
_USER, _READ_ONLY = 1 << 6, 1 << 7
_SHOWN = ("x0", "code", "esr", "X0", "far", "hpfar", "pstate", "sctlr")


class Leak(AssertionError):
    """The host has learnt, or has changed, what it must not."""


class Kind(Enum):
    """The rows of facts §5.4."""

    IRQ = "irq"
    HYP_REQ = "hyp_req"
    WFX = "wfx"
    SYSREG_READ = "sysreg_read"
    SYSREG_WRITE = "sysreg_write"
    CPU_ON = "cpu_on"
    CPU_OFF = "cpu_off"
    SERVED = "served"
    """A call of which the guest gets X0: CPU_SUSPEND, SYSTEM_RESET2."""
    ENDED = "ended"
    TRNG = "trng"
    IABT = "iabt"
    MMIO_READ = "mmio_read"
    MMIO_WRITE = "mmio_write"
    DABT = "dabt"


_VISIBLE: dict[Kind, str] = {
    Kind.IRQ: "",
    Kind.HYP_REQ: "esr X0 far",  # request type, pages, IPA
    Kind.WFX: "esr pstate",
    Kind.SYSREG_READ: "esr pstate",
    Kind.SYSREG_WRITE: "esr pstate X0",
    Kind.CPU_ON: "esr X0 far",  # function, MPIDR
    Kind.CPU_OFF: "esr X0",
    Kind.SERVED: "esr X0 far hpfar",  # function, two arguments of SYSTEM_RESET2
    Kind.ENDED: "esr X0",
    Kind.TRNG: "esr X0 far",
    Kind.IABT: "esr hpfar",
    Kind.MMIO_READ: "esr far hpfar pstate sctlr",
    Kind.MMIO_WRITE: "esr far hpfar pstate sctlr X0",
    Kind.DABT: "esr far hpfar pstate sctlr",
}
"""What an exit of each kind may show, of `RunResult`."""


@dataclass(frozen=True)
class Step:
    """One exit and one entry. Everything here is public: the host may know it, or chooses it."""

    trigger: str
    mode: int = _EL1H
    endian: int = 0
    """SCTLR_EL1.EE and E0E."""
    value: int = 0
    """What the guest says to the host on purpose: data of a store, an argument."""
    offset: int = 0
    flags: int = 0
    x0: int = 0
    hcr: int = 0
    nr_lrs: int = 0
    noise: int = 0
    """Seed of the lies."""
    visit: bool = False
    """Let another vCPU run between exit and entry."""


class Scene(NamedTuple):
    """A trigger as a machine performs it."""

    kind: Kind
    code: tuple[int, ...]
    """Instructions; the last one exits."""
    registers: dict[int, int]
    rt: int = 31
    """The register that the instruction names."""
    size: int = 3
    signed: bool = False
    address: int = 0
    """Virtual address of a data abort."""
    bits: int = 0
    """Of a TRNG call."""


Make = Callable[["Machine", Step], Scene]


def _wfi(machine: Machine, step: Step) -> Scene:
    return Scene(Kind.WFX, (a64.WFI,), {})


def _interrupt(machine: Machine, step: Step) -> Scene:
    return Scene(Kind.IRQ, (a64.LOOP,), {})


def _acknowledge(machine: Machine, step: Step) -> Scene:
    """The guest takes a virtual interrupt, changes its priority mask, and waits."""
    rt = machine.register()
    mask = {rt: step.value & 0xF8}
    return Scene(Kind.WFX, (a64.msr(r.ICC_PMR_EL1, rt), a64.mrs(rt, r.ICC_IAR1_EL1), a64.WFI), mask)


def _read_register(machine: Machine, step: Step) -> Scene:
    rt = machine.register(zero=True)
    register = _HOST_REGISTERS[step.offset % 3]
    return Scene(Kind.SYSREG_READ, (a64.mrs(rt, register),), {}, rt)


def _write_register(machine: Machine, step: Step) -> Scene:
    rt = machine.register()
    register = _HOST_REGISTERS[step.offset % len(_HOST_REGISTERS)]
    return Scene(Kind.SYSREG_WRITE, (a64.msr(register, rt),), {rt: step.value}, rt)


def _call(kind: Kind, function: int, public: int, *, wide: bool = True) -> Make:
    """A call with `public` public arguments; the rest of X1-X3, and X0's upper half, are secret."""

    def make(machine: Machine, step: Step) -> Scene:
        words = {0: function | machine.secret() << 32 & MASK64}
        for number in range(public):
            words[1 + number] = step.value >> 8 * number
            if not wide:
                words[1 + number] = words[1 + number] & W_MASK | machine.secret() << 32 & MASK64
        return Scene(kind, (a64.HVC,), words)

    return make


def _cpu_on(function: int) -> Make:
    def make(machine: Machine, step: Step) -> Scene:
        upper = machine.secret() << 32 & MASK64
        words = {0: function | upper, 1: 2 | (0 if function & 1 << 30 else upper)}
        return Scene(Kind.CPU_ON, (a64.HVC,), words)

    return make


def _trng(function: int, most: int) -> Make:
    def make(machine: Machine, step: Step) -> Scene:
        bits = 1 + step.value % most
        words = {0: function | machine.secret() << 32 & MASK64, 1: bits}
        return Scene(Kind.TRNG, (a64.HVC,), words, size=3 if function & 1 << 30 else 2, bits=bits)

    return make


def _share(machine: Machine, step: Step) -> Scene:
    """MEM_SHARE of a page in a block, for which EL2 needs a table page."""
    words = {0: Function.MEM_SHARE, 1: RAM_IPA + 0x18_0000, 2: 1, 3: 0}
    return Scene(Kind.HYP_REQ, (a64.HVC,), words)


def _fetch(machine: Machine, step: Step) -> Scene:
    """A jump to where nothing is; where in the page is nobody's business."""
    rn = machine.register()
    target = machine.random.choice(_FETCH_GIBS) * _ENTRY_GIB + NOTHING
    target += 4 * (machine.secret() % 1024)
    return Scene(Kind.IABT, (a64.br(rn),), {rn: target})


def _load(machine: Machine, step: Step) -> Scene:
    size, signed, to_w = step.value % 4, bool(step.value & 8), bool(step.value & 16)
    signed = signed and size < 3
    to_w = to_w and signed and size < 2
    rt, rn = machine.register(zero=True), machine.register()
    address = machine.device_va(DEVICE + step.offset % (PAGE - 8))
    word = a64.load(rt, rn, size=size, signed=signed, to_w=to_w)
    shape = size | (4 if to_w or (not signed and size < 3) else 0)
    return Scene(Kind.MMIO_READ, (word,), {rn: address}, rt, shape, signed, address)


def _store(machine: Machine, step: Step) -> Scene:
    size = step.offset % 4
    rt, rn = machine.register(), machine.register()
    while rn == rt:
        rn = machine.register()
    address = machine.device_va(DEVICE + step.offset % (PAGE - 8))
    width = (1 << (8 << size)) - 1
    words = {rn: address, rt: step.value & width | machine.secret() & ~width}
    return Scene(Kind.MMIO_WRITE, (a64.store(rt, rn, size=size),), words, rt, size, address=address)


def _pair(store: bool) -> Make:
    """An access that has no syndrome."""

    def make(machine: Machine, step: Step) -> Scene:
        address = machine.device_va(DEVICE + step.offset % (PAGE - 16))
        word = a64.STP_X0_X1_X2 if store else a64.LDP_X0_X1_X2
        return Scene(Kind.DABT, (word,), {2: address}, address=address)

    return make


def _unguarded(store: bool) -> Make:
    """An access where the guest of an enrolled VM expects no device: even its size is secret."""

    def make(machine: Machine, step: Step) -> Scene:
        rt, rn, size = machine.register(), machine.register(), machine.secret() % 4
        while rn == rt:
            rn = machine.register()
        address = machine.device_va(NOTHING + step.offset % (PAGE - 8))
        word = a64.store(rt, rn, size=size) if store else a64.load(rt, rn, size=size)
        return Scene(Kind.DABT, (word,), {rn: address}, address=address)

    return make


TRIGGERS: dict[str, Make] = {
    "wfi": _wfi,
    "interrupt": _interrupt,
    "virtual interrupt": _acknowledge,
    "read of a register": _read_register,
    "write of a register": _write_register,
    "CPU_ON": _cpu_on(Psci.CPU_ON_64),
    "CPU_ON of 32 bits": _cpu_on(Psci.CPU_ON_32),
    "CPU_OFF": _call(Kind.CPU_OFF, Psci.CPU_OFF, 0),
    "CPU_SUSPEND": _call(Kind.SERVED, Psci.CPU_SUSPEND_64, 0),
    "SYSTEM_OFF": _call(Kind.ENDED, Psci.SYSTEM_OFF, 0),
    "SYSTEM_RESET": _call(Kind.ENDED, Psci.SYSTEM_RESET, 0),
    "SYSTEM_RESET2": _call(Kind.SERVED, Psci.SYSTEM_RESET2_64, 2),
    "SYSTEM_RESET2 of 32 bits": _call(Kind.SERVED, Psci.SYSTEM_RESET2_32, 2, wide=False),
    "TRNG_RND64": _trng(Function.TRNG_RND64, 192),
    "TRNG_RND32": _trng(Function.TRNG_RND32, 96),
    "no table page": _share,
    "fetch": _fetch,
    "load": _load,
    "store": _store,
    "pair": _pair(store=False),
    "pair stored": _pair(store=True),
}
GUARDED = {"unguarded load": _unguarded(store=False), "unguarded store": _unguarded(store=True)}
"""Further ones of a VM with the MMIO guard."""
AT_EL0 = {"fetch", "load", "store", "pair", "pair stored", "interrupt", *GUARDED}


class Machine:
    """One of the two. `number` seeds its secrets."""

    def __init__(self, number: int, policy: Policy, cpu_model: str) -> None:
        self.el2 = El2(ram_bytes=10 * MIB, policy=policy, cpu_model=cpu_model, virtual_clock=True)
        features = 0b110_0000 if cpu_model == "max" else 0
        code = [a64.WFI, 0x17FF_FFFF]
        guarded = policy == ANDROID
        self.guest = Guest(
            self.el2, code, vcpus=3, block=True, tables=3 + guarded, features=features
        )
        self.engine = cast(UnicornEngine, self.el2.engine)
        self.random = random.Random(number)
        self.memory = self.el2.machine.memory
        assert self.guest.run() == ExitCode.TRAP
        self._build_tables()
        if guarded:
            self._call(Function.MMIO_GUARD_MAP, DEVICE)
        self._call(Psci.CPU_ON_64, 1, RAM_IPA)
        assert self.guest.run(1) == ExitCode.TRAP
        self.engine.interrupt()
        assert self.guest.run(0) == ExitCode.IRQ
        self.secret_registers = self._find_registers()
        self.readable = self._find_readable()
        self.page_pa = self.guest.vcpus[0]
        self.hcr = self.engine.read_sysreg(r.HCR_EL2) & ~TRAP_WAITS

    def secret(self) -> int:
        """64 bits that the other machine has not."""
        return self.random.getrandbits(64)

    def register(self, *, zero: bool = False) -> int:
        """The number of a register that an instruction may name; which one is a secret."""
        return 31 if zero and self.random.random() < 0.1 else self.random.choice(_REGISTERS)

    def device_va(self, ipa: int) -> int:
        """A virtual address of a device; but for the page offset it is a secret."""
        return self.random.choice(_DEVICE_GIBS) * _ENTRY_GIB + ipa

    # Setting up

    def _call(self, *args: int) -> None:
        """Have the guest make a call, at its WFI."""
        for number, value in enumerate((*args, 0, 0, 0)[:4]):
            self.engine.x[number] = value
        self._put_code((a64.HVC, a64.WFI))
        self.engine.pc = RAM_IPA
        code = self.guest.run()
        while code == ExitCode.HYP_REQ:
            self.guest.feed()
            code = self.guest.run()
        assert code == ExitCode.TRAP
        self._put_code((a64.WFI, 0x17FF_FFFF))
        self.engine.pc = RAM_IPA

    def _build_tables(self) -> None:
        """A stage 1 of 1 GiB blocks: half of all virtual addresses are devices, half are RAM. A
        big-endian EL1 has big-endian tables."""
        entries = [_BLOCK | _USER for _ in _DEVICE_GIBS]
        entries += [_BLOCK | _USER | _READ_ONLY for _ in _FETCH_GIBS]
        entries += [RAM_IPA | _BLOCK | _USER | _READ_ONLY for _ in _RAM_GIBS]
        table = self.guest.ram + _TABLE - RAM_IPA
        self.memory.write(table, struct.pack("<512Q", *entries))
        self.memory.write(table + PAGE, struct.pack(">512Q", *entries))

    def _find_registers(self) -> list[r.SysReg]:
        """Every register of EL1 and EL0 that keeps what is written and has no other effect."""
        found = []
        places = [(3, op1, crn) for op1 in (0, 3) for crn in (1, 2, 5, 6, 7, 10, 12, 13)]
        for op0, op1, crn in [*places, (2, 0, 0)]:
            for crm in range(16):
                for op2 in range(8):
                    register = r.SysReg(op0, op1, crn, crm, op2)
                    if register not in _FIXED and not (crn == 12 and crm) and self._keeps(register):
                        found.append(register)
        return found

    def _keeps(self, register: r.SysReg) -> bool:
        engine = self.engine
        try:
            before = engine.read_sysreg(register)
            engine.write_sysreg(register, 0x5555_5555_5555_5800)
            kept = engine.read_sysreg(register)
            engine.write_sysreg(register, before)
        except (KeyError, EngineError):
            return False
        return kept & 0xFFFF_F800 == 0x5555_5800

    def _find_readable(self) -> list[tuple[int, int]]:
        """Runs of pages that the host can read, as its own bus says."""
        runs: list[tuple[int, int]] = []
        for pa in range(self.memory.ram_base, self.memory.ram_end, PAGE):
            try:
                self.el2.bus.read(pa, 8)
            except Stage2Fault:
                continue
            if runs and sum(runs[-1]) == pa:
                runs[-1] = (runs[-1][0], runs[-1][1] + PAGE)
            else:
                runs.append((pa, PAGE))
        return runs

    def _put_code(self, code: tuple[int, ...]) -> None:
        self.memory.write(self.guest.ram, a64.code(code))
        self.engine.invalidate_code(self.guest.ram, 64)

    # A step

    def prepare(self, step: Step) -> Scene:
        """Fill the CPU with secrets, and put it before the trigger."""
        engine, secret = self.engine, self.secret
        vcpu = self.guest.vcpu()
        if vcpu.power != Affinity.ON:
            vcpu.power = Affinity.ON
            engine.interrupt()
            self.guest.run()
        self.guest.vcpu(2).power = Affinity.OFF
        scene = {**TRIGGERS, **GUARDED}[step.trigger](self, step)
        for number in range(31):
            engine.x[number] = secret()
        for register in self.secret_registers:
            engine.write_sysreg(register, secret() & ~0x7FF)
        engine.write_sysreg(r.MAIR_EL1, secret() & ~0xFF | 0xFF)
        engine.write_sysreg(r.CNTV_CVAL_EL0, 1 << 62 | secret() >> 2)
        engine.write_sysreg(r.CNTV_CTL_EL0, secret() & 3)
        engine.write_sysreg(r.CPACR_EL1, 3 << 20)
        engine.write_sysreg(r.TTBR0_EL1, _TABLE + (PAGE if step.endian & r.SCTLR_EE else 0))
        engine.write_sysreg(r.TCR_EL1, 25 | 1 << 23 | 2 << 32)
        sctlr = r.SCTLR_EL1_RESET | 1 | r.SCTLR_SPAN | step.endian | secret() & _SCTLR_SECRETS
        engine.write_sysreg(r.SCTLR_EL1, sctlr)
        for el in (0, 1):
            engine.set_sp(el, secret())
        engine.set_elr_el1(secret())
        engine.set_spsr_el1(secret() & 0xF000_03C5)
        engine.set_fp_registers(self.random.randbytes(512) + struct.pack("<II", 0, 0))
        engine.pstate = secret() & 0xF000_0300 | 0xC0 | step.mode
        engine.set_slice(_SLICE)
        self._put_code((*scene.code, a64.LOOP))
        gib = self.random.choice(_RAM_GIBS)
        engine.pc = gib * _ENTRY_GIB
        for number, value in scene.registers.items():
            engine.x[number] = value
        return scene

    def leave(self, scene: Scene, step: Step) -> tuple[int, ...]:
        """Run into the exit. Nothing is accepted before it: the last exit was an interrupt."""
        if scene.kind is Kind.IRQ:
            self.engine.interrupt()
        self.guest.load(hcr=TRAP_WAITS)
        self.el2.x1(HostCall.VCPU_RUN, step.flags | ~3 & MASK64, step.x0, step.nr_lrs)
        self.el2.call(HostCall.VCPU_PUT)
        return self.el2.shown

    def lie(self, step: Step) -> list[int]:
        """Fill the host's pages with noise; the words that are entropy now."""
        noise = random.Random(step.noise)
        self.el2.bus.write(self.page_pa, noise.randbytes(PAGE))
        self.el2.bus.write(self.guest.page, noise.randbytes(PAGE))
        return [self.el2.bus.read_u64(self.page_pa + HostVcpu.ENTROPY + 8 * n) for n in range(3)]

    def enter(self, step: Step) -> tuple[int, State]:
        """Enter with lies; VCPU_RUN's code and the guest's state at its first instruction."""
        seen: list[State] = []
        engine = self.engine
        run, entered = engine.run, HostCall.VCPU_RUN

        def look() -> object:
            seen.append(self.state())
            engine.interrupt()
            return run()

        if step.visit:
            self.guest.run(1)
        engine.run = look  # type: ignore[method-assign, assignment]
        try:
            self.guest.load(hcr=step.hcr)
            code = self.el2.x1(entered, step.flags | ~3 & MASK64, step.x0, step.nr_lrs)
            self.el2.call(HostCall.VCPU_PUT)
        finally:
            engine.run = run  # type: ignore[method-assign]
        self.el2.recorder.events.clear()
        return code, seen[0] if seen else {}

    def state(self) -> State:
        """Everything that the guest could notice, and the traps that it is under."""
        engine = self.engine
        found: State = {f"X{number}": engine.x[number] for number in range(31)}
        found |= {"PC": engine.pc, "PSTATE": engine.pstate}
        found |= {"SP0": engine.sp(0), "SP1": engine.sp(1)}
        found |= {"ELR": engine.elr_el1(), "SPSR": engine.spsr_el1()}
        for register in (*self.secret_registers, *_FIXED, r.CNTV_CTL_EL0, r.CNTV_CVAL_EL0):
            found[register.name] = engine.read_sysreg(register)
        found["FP"] = int.from_bytes(engine.fp_registers(), "little")
        found["HCR"] = engine.read_sysreg(r.HCR_EL2)
        for register in (r.MDCR_EL2, r.CPTR_EL2, r.VTTBR_EL2, r.VTCR_EL2, r.MPIDR_EL1):
            found[register.name] = engine.read_sysreg(register)
        interface = engine.gic
        found |= {"VMCR": interface.vmcr, "AP0R": interface.ap0r, "AP1R": interface.ap1r}
        found["ICH_HCR"] = interface.hcr
        return found


State = dict[str, int]


class Twins:
    """The two machines, in step."""

    def __init__(self, policy: Policy = RFC, cpu_model: str = "cortex-a72") -> None:
        self.machines = (Machine(1, policy, cpu_model), Machine(2, policy, cpu_model))
        self.triggers = TRIGGERS if policy == RFC else TRIGGERS | GUARDED
        self.exits = 0

    def take(self, step: Step) -> None:
        """One exit and one entry. Raises Leak."""
        scenes = [machine.prepare(step) for machine in self.machines]
        pages = []
        views = []
        for machine, scene in zip(self.machines, scenes, strict=True):
            machine.lie(step)
            _offer_interrupts(machine, step)
            pages.append(machine.el2.bus.read(machine.page_pa, PAGE))
            views.append(machine.leave(scene, step))
        self._spy(step, scenes[0], views, pages)
        for machine, scene in zip(self.machines, scenes, strict=True):
            before = machine.state()
            entropy = machine.lie(step)
            code, after = machine.enter(step)
            if scene.kind is Kind.CPU_OFF:
                _require(code == ExitCode.ILLEGAL and not after, step, "a vCPU that is off runs")
                continue
            _require(code == ExitCode.IRQ, step, f"code {code}")
            _compare(step, machine, before, after, accepted(machine, scene, step, before, entropy))
        self.exits += 1

    def _spy(
        self, step: Step, scene: Scene, views: list[tuple[int, ...]], pages: list[bytes]
    ) -> None:
        first, second = self.machines
        _require(views[0] == views[1], step, f"the hosts see {_hex(views[0])}, {_hex(views[1])}")
        expected = {Kind.IRQ: ExitCode.IRQ, Kind.HYP_REQ: ExitCode.HYP_REQ}
        _require(
            views[0][1] == expected.get(scene.kind, ExitCode.TRAP),
            step,
            f"another exit: {_hex(views[0])}",
        )
        visible = _VISIBLE[scene.kind].split()
        for name, word in zip(_SHOWN[2:], views[0][2:], strict=True):
            _require(not word or name in visible, step, f"{name} shows {word:#x}")
        for machine, before in zip(self.machines, pages, strict=True):
            after = machine.el2.bus.read(machine.page_pa, PAGE)
            changed = [at for at in range(0, PAGE, 8) if before[at : at + 8] != after[at : at + 8]]
            wrong = [at for at in changed if not _VGIC.start <= at < _VGIC.stop]
            _require(not wrong, step, f"words of the host's page changed: {wrong}")
        _require(first.readable == second.readable, step, "the hosts reach different pages")
        for pa, nbytes in first.readable:
            same = np.array_equal(first.memory.span(pa, nbytes), second.memory.span(pa, nbytes))
            _require(same, step, f"the memory of the hosts differs from PA {pa:#x} on")
        timers = [
            machine.el2.call(HostCall.VCPU_TIMER, machine.guest.handle, 0)
            for machine in self.machines
        ]
        _require(timers == [0, 0], step, "a timer that is not due asserts its output")


def accepted(
    machine: Machine, scene: Scene, step: Step, before: State, entropy: list[int]
) -> State:
    """What the guest may find changed: facts §5.4, right-hand column."""
    pending, advance = step.flags & PENDING_EXCEPTION, step.flags & INCREMENT_PC
    next_pc = {"PC": before["PC"] + 4 & MASK64}
    kind = scene.kind
    if kind is Kind.SERVED:
        return {"X0": step.x0, "X1": 0, "X2": 0, "X3": 0}
    if kind is Kind.ENDED:
        return {"X0": psci.INTERNAL_FAILURE, "X1": 0, "X2": 0, "X3": 0}
    if kind is Kind.CPU_ON:
        x0 = psci.INTERNAL_FAILURE if step.x0 else psci.SUCCESS
        return {"X0": x0, "X1": 0, "X2": 0, "X3": 0}
    if kind is Kind.TRNG:
        return _random_numbers(scene, step, entropy)
    if kind in (Kind.SYSREG_READ, Kind.SYSREG_WRITE) and pending:
        return _exception(before, 1 << 25, None)
    if kind is Kind.IABT and pending:
        return _exception(before, _abort_esr(before, 0x20), machine.engine.far_el2)
    if kind in (Kind.MMIO_READ, Kind.MMIO_WRITE, Kind.DABT) and pending:
        return _exception(before, _abort_esr(before, 0x24), scene.address)
    if kind is Kind.SYSREG_READ and advance:
        return next_pc | ({} if scene.rt == 31 else {f"X{scene.rt}": step.x0})
    if kind is Kind.MMIO_READ and advance:
        return next_pc | ({} if scene.rt == 31 else {f"X{scene.rt}": _loaded(scene, step.x0)})
    if kind in (Kind.WFX, Kind.SYSREG_WRITE, Kind.MMIO_WRITE) and advance:
        return next_pc
    return {}


def _random_numbers(scene: Scene, step: Step, entropy: list[int]) -> State:
    if step.x0:
        return {"X0": smccc.TRNG_NO_ENTROPY, "X1": 0, "X2": 0, "X3": 0}
    width = 64 if scene.size == 3 else 32
    words = [word & (1 << width) - 1 for word in entropy]
    number = words[0] << 2 * width | words[1] << width | words[2]
    number &= (1 << scene.bits) - 1
    parts = [number >> width * n & (1 << width) - 1 for n in (2, 1, 0)]
    return {"X0": 0, "X1": parts[0], "X2": parts[1], "X3": parts[2]}


def _loaded(scene: Scene, data: int) -> int:
    bits = 8 << (scene.size & 3)
    data &= (1 << bits) - 1
    if scene.signed and data >> bits - 1:
        data |= MASK64 ^ (1 << bits) - 1
    return data & W_MASK if scene.size & 4 else data


def _abort_esr(before: State, ec: int) -> int:
    if before["PSTATE"] & 0xF != _EL0:
        ec += 1
    return ec << 26 | 1 << 25 | 0x10


def _exception(before: State, esr: int, far: int | None) -> State:
    mode = before["PSTATE"] & 0xF
    offset = {_EL0: 0x400, _EL1T: 0, _EL1H: 0x200}[mode]
    changes = {
        "ESR_EL1": esr,
        "ELR": before["PC"],
        "SPSR": before["PSTATE"],
        "PC": before["VBAR_EL1"] + offset & MASK64,
        "PSTATE": before["PSTATE"] & 0xF000_0000 | 0x3C5,
    }
    if far is not None:
        changes["FAR_EL1"] = far
    return changes


def _compare(step: Step, machine: Machine, before: State, after: State, changes: State) -> None:
    expected = before | changes
    expected["HCR"] = machine.hcr | step.hcr & TRAP_WAITS
    # The virtual interrupts are the host's to make; EL2 lets nothing else of theirs in.
    expected["ICH_HCR"] = after["ICH_HCR"] & (gic.HCR_MAINTENANCE | gic.HCR_EOICOUNT | gic.HCR_EN)
    wrong = {name: (value, after[name]) for name, value in expected.items() if after[name] != value}
    _require(not wrong, step, f"the guest notices {wrong}")
    for lr in machine.engine.gic.lr:
        _require(not lr & ~_LR_BITS, step, f"a list register is {lr:#x}")


_LR_BITS = (
    gic.LR_STATE | gic.LR_HW | gic.LR_GROUP1 | gic.PRIORITY_MASK << gic.LR_PRIORITY_SHIFT
    | gic.LR_PINTID | gic.LR_EOI | gic.INTID_MASK
)  # fmt: skip


def _offer_interrupts(machine: Machine, step: Step) -> None:
    """Four pending interrupts, some of them for group 1."""
    for number in range(4):
        lr = 1 << 62 | (number & 1) << 60 | (0x40 + 8 * number) << 48 | 32 + number
        machine.el2.bus.write_u64(machine.page_pa + HostVcpu.VGIC_LR + 8 * number, lr)
    machine.el2.bus.write_u64(machine.page_pa + HostVcpu.VGIC_HCR, 0)


def _require(holds: bool, step: Step, why: str) -> None:
    if not holds:
        raise Leak(f"{why}\nat {step}")


def _hex(words: tuple[int, ...]) -> str:
    return " ".join(f"{name}={word:#x}" for name, word in zip(_SHOWN, words, strict=True))


assert BLOCK == 512 * PAGE
