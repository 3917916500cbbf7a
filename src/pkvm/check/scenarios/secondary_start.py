# SPDX-License-Identifier: GPL-2.0-or-later
"""How a secondary vCPU starts, by the guest's CPU_ON or the VMM's MP state, and in what state."""

from __future__ import annotations

from functools import partial

from pkvm.arm64.psci import Function
from pkvm.check.scenarios.bench import CODE, RAM, Bench, BenchVm, Guest
from pkvm.check.scenarios.observation import Outcome
from pkvm.guests.protocol import Boot, Info, Op
from pkvm.kvm import Vcpu
from pkvm.uapi.kvm import MpState

TITLE = "start of secondary vCPUs"
_WAIT_S = 0.1
_SHOWN = (
    Boot.CURRENT_EL, Boot.DAIF, Boot.SPSEL, Boot.NZCV, Boot.SCTLR_EL1, Boot.CPACR_EL1,
    Boot.VBAR_EL1, Boot.TCR_EL1, Boot.TTBR0_EL1, Boot.TTBR1_EL1, Boot.SP, Boot.SP_EL0,
    Boot.ELR_EL1, Boot.SPSR_EL1, Boot.ESR_EL1, Boot.TPIDR_EL0, Boot.TPIDR_EL1, Boot.TPIDRRO_EL0,
    Boot.CONTEXTIDR_EL1, Boot.CNTKCTL_EL1, Boot.CNTV_CTL_EL0, Boot.PAR_EL1, Boot.MPIDR_EL1,
)  # fmt: skip


def _entry_state(bench: Bench, guest: Guest, says: str) -> None:
    """The registers with which the guest was entered: recorded, one by one."""
    words = guest.agent.boot_state()
    pc = words[Boot.PC] - guest.agent.info()[Info.BASE]
    rest = "all 0" if words[1:31] == (0,) * 30 else "not all 0"
    _entered(bench, f"{says}, X0", hex(words[Boot.X0]))
    _entered(bench, f"{says}, X1-X30", rest)
    _entered(bench, f"{says}, PC", f"agent+{pc:#x}")
    for word in _SHOWN:
        _entered(bench, f"{says}, {word.name}", hex(words[word]))


def _entered(bench: Bench, what: str, value: str) -> None:
    bench.record("guest entered", what, Outcome(guest=value))


def good_primary_state_protected(bench: Bench) -> None:
    """What a protected vCPU holds when the VMM alone has started it."""
    _entry_state(bench, bench.vm().agent(), "primary")


def good_primary_state(bench: Bench) -> None:
    """Likewise a non-protected one."""
    _entry_state(bench, bench.vm(protected=False).agent(), "primary")


def good_cpu_on_protected(bench: Bench) -> None:
    """CPU_ON from the guest, in all its stages."""
    _cpu_on(bench, bench.vm())


def good_cpu_on(bench: Bench) -> None:
    """Likewise in a non-protected VM."""
    _cpu_on(bench, bench.vm(protected=False))


def _cpu_on(bench: Bench, vm: BenchVm) -> None:
    vcpu = vm.vcpu(1, power_off=True)
    primary = vm.agent()
    secondary = vm.guest(vcpu)
    entry = primary.agent.info()[Info.SECONDARY]
    _mp_state(bench, vcpu, "before CPU_ON")
    primary.hvc(Function.AFFINITY_INFO_64, 1, says="AFFINITY_INFO", show=1)
    _cpu_on_call(primary, 1, entry, 0x51)
    _mp_state(bench, vcpu, "after CPU_ON")
    primary.hvc(Function.AFFINITY_INFO_64, 1, says="AFFINITY_INFO", show=1)
    _cpu_on_call(primary, 1, entry, 0x52)
    secondary.start("after CPU_ON")
    _entry_state(bench, secondary, "secondary")
    _cpu_on_call(secondary, 0, entry, 0)
    _cpu_on_call(primary, 1, entry, 0x52)
    secondary.store(RAM, 0x77)
    primary.load(RAM)


def _cpu_on_call(guest: Guest, target: int, entry: int, context: int) -> None:
    agent = guest.agent
    guest.bench.call(
        "guest HVC",
        f"CPU_ON of {target:#x} with {context:#x}",
        lambda: agent.hvc(Function.CPU_ON_64, target, entry, context)[0],
    )


def _mp_state(bench: Bench, vcpu: Vcpu, says: str) -> None:
    bench.call("KVM_GET_MP_STATE", says, lambda: vcpu.mp_state)


def bad_cpu_on(bench: Bench) -> None:
    """CPU_ON of what is not there, or is on."""
    for protected in (True, False):
        vm = bench.vm(protected=protected)
        vm.vcpu(1, power_off=True)
        guest = vm.agent()
        for target in (7, 0, 0x100, 1 << 24, 1 << 31 | 1, 1 << 32, 1 << 40 | 1, (1 << 64) - 1):
            guest.hvc(Function.CPU_ON_64, target, CODE, 0, says="CPU_ON", show=1)
        guest.hvc(Function.CPU_ON_32, 7, CODE, 0, says="CPU_ON, 32 bits", show=1)
        guest.hvc(Function.CPU_ON_32, 1 << 32 | 7, CODE, 0, says="CPU_ON, 32 bits", show=1)


def good_runs_before_cpu_on(bench: Bench) -> None:
    """A secondary's thread waits in KVM_RUN until it is turned on, or kicked."""
    for protected in (True, False):
        vm = bench.vm(protected=protected)
        vcpu = vm.vcpu(1, power_off=True)
        primary = vm.agent()
        bench.kick_after(_WAIT_S, vcpu)
        bench.call("KVM_RUN", "vCPU 1, powered off", vcpu.run)
        _cpu_on_call(primary, 1, primary.agent.info()[Info.SECONDARY], 0x51)
        vm.guest(vcpu).start("after CPU_ON")


def good_cpu_off(bench: Bench) -> None:
    """CPU_OFF, and CPU_ON again."""
    for protected in (True, False):
        vm = bench.vm(protected=protected)
        vcpu = vm.vcpu(1, power_off=True)
        primary = vm.agent()
        entry = primary.agent.info()[Info.SECONDARY]
        _cpu_on_call(primary, 1, entry, 0x51)
        secondary = vm.guest(vcpu)
        secondary.start("after CPU_ON")
        bench.kick_after(_WAIT_S, vcpu)
        secondary.hvc(Function.CPU_OFF, says="CPU_OFF", show=1)
        _mp_state(bench, vcpu, "after CPU_OFF")
        primary.hvc(Function.AFFINITY_INFO_64, 1, says="AFFINITY_INFO", show=1)
        _cpu_on_call(primary, 1, entry, 0x53)
        again = vm.guest(vcpu)
        again.start("after CPU_OFF and CPU_ON")
        _entered(bench, "again, X0", hex(again.agent.boot_state()[Boot.X0]))


def good_mp_state(bench: Bench) -> None:
    """The VMM stops and starts vCPUs itself."""
    for protected in (True, False):
        vm = bench.vm(protected=protected)
        vcpu = vm.vcpu(1, power_off=True)
        primary = vm.agent()
        primary.store(RAM, 1)
        _set_mp_state(bench, vcpu, MpState.RUNNABLE)
        primary.hvc(Function.AFFINITY_INFO_64, 1, says="AFFINITY_INFO", show=1)
        vcpu.set_reg("pc", primary.agent.info()[Info.SECONDARY])
        vm.guest(vcpu).start("made RUNNABLE by the VMM")
        _set_mp_state(bench, primary.vcpu, MpState.STOPPED)
        bench.kick_after(_WAIT_S, primary.vcpu)
        primary.op(Op.LDR_X, RAM)
        _set_mp_state(bench, primary.vcpu, MpState.RUNNABLE)
        primary.resume(show=2)
        for state in (1, 2, 3, 4, 8, 9, 99):
            _set_mp_state(bench, vcpu, state)


def _set_mp_state(bench: Bench, vcpu: Vcpu, state: int) -> None:
    set_state = partial(setattr, vcpu, "mp_state", state)
    bench.call("KVM_SET_MP_STATE", f"vCPU {vcpu.id}, {int(state)}", set_state)
    _mp_state(bench, vcpu, f"vCPU {vcpu.id}")
