# SPDX-License-Identifier: GPL-2.0-or-later
"""Events that the VMM injects: external aborts, SErrors, interrupts, single steps."""

from __future__ import annotations

from functools import partial

from pkvm.check.scenarios.bench import DEVICE, Bench, BenchVm
from pkvm.check.scenarios.observation import Outcome
from pkvm.guests.protocol import Op
from pkvm.kvm import Vcpu
from pkvm.uapi.kvm import GUEST_DEBUG, VCPU_EVENTS, Ioctl, IrqType, irq_number

TITLE = "injected events"


def _set(
    bench: Bench, vcpu: Vcpu, says: str, serror: int = 0, has_esr: int = 0, abort: int = 0,
    esr: int = 0,
) -> None:  # fmt: skip
    argument = bytearray(VCPU_EVENTS.pack(serror, has_esr, abort, esr, *[0] * 12))
    bench.ioctl("KVM_SET_VCPU_EVENTS", says, vcpu.fd, Ioctl.SET_VCPU_EVENTS, argument)


def _get(bench: Bench, vcpu: Vcpu, says: str) -> None:
    argument = bytearray(VCPU_EVENTS.size)

    def show(_: int) -> Outcome:
        serror, has_esr, abort, esr = VCPU_EVENTS.unpack(argument)[:4]
        return Outcome(f"serror {serror} esr {has_esr} {esr:#x} abort {abort}")

    bench.ioctl("KVM_GET_VCPU_EVENTS", says, vcpu.fd, Ioctl.GET_VCPU_EVENTS, argument, show)


def good_abort_protected(bench: Bench) -> None:
    """An external abort while the guest waits for a device."""
    _abort(bench, bench.vm())


def good_abort(bench: Bench) -> None:
    """Likewise in a non-protected VM."""
    _abort(bench, bench.vm(protected=False))


def _abort(bench: Bench, vm: BenchVm) -> None:
    guest = vm.agent()
    vcpu = guest.vcpu
    _get(bench, vcpu, "at rest")
    guest.load(DEVICE + 8, 4)
    _set(bench, vcpu, "external abort", abort=1)
    _get(bench, vcpu, "after it")
    guest.resume("after the abort", show=2)
    guest.store(DEVICE + 16, 1, 4)
    _set(bench, vcpu, "external abort", abort=1)
    guest.resume("after the abort", show=2)
    guest.execute(0xD503_201F, says="NOP", show=0)


def bad_events(bench: Bench) -> None:
    """What KVM_SET_VCPU_EVENTS refuses, and calls at the wrong time."""
    for protected in (True, False):
        vm = bench.vm(protected=protected)
        kind = "protected" if protected else "non-protected"
        raw = vm.vm.create_vcpu(1)
        bench.adopt(raw)
        _get(bench, raw, f"{kind}, not initialised")
        _set(bench, raw, f"{kind}, not initialised", abort=1)
        vcpu = vm.vcpu()
        _get(bench, vcpu, f"{kind}, before the run")
        for says, serror, has_esr, abort, esr in (
            ("nothing", 0, 0, 0, 0), ("SError with a syndrome", 1, 1, 0, 0x1234),
            ("syndrome alone", 0, 1, 0, 0x1234), ("serror_pending 2", 2, 0, 0, 0),
            ("abort 2", 0, 0, 2, 0), ("syndrome too long", 1, 1, 0, 1 << 30),
            ("both", 1, 0, 1, 0),
        ):  # fmt: skip
            _set(bench, vcpu, f"{kind}, {says}", serror, has_esr, abort, esr)
            _get(bench, vcpu, f"{kind}, after it")


def good_serror_protected(bench: Bench) -> None:
    """An SError waits until the guest unmasks it."""
    _serror(bench, bench.vm())


def good_serror(bench: Bench) -> None:
    """Likewise in a non-protected VM."""
    _serror(bench, bench.vm(protected=False))


def _serror(bench: Bench, vm: BenchVm) -> None:
    guest = vm.agent()
    vcpu = guest.vcpu
    _set(bench, vcpu, "SError", serror=1)
    _get(bench, vcpu, "after it")
    guest.execute(0xD503_201F, says="NOP", show=0)
    _get(bench, vcpu, "after a run")
    guest.mrs("ISR_EL1", (3, 0, 12, 1, 0))
    guest.execute(0xD503_44FF, 0xD503_3FDF, says="MSR DAIFClr, #4; ISB", show=0)
    _get(bench, vcpu, "after it was taken")
    _set(bench, vcpu, "SError", serror=1)
    _set(bench, vcpu, "none", serror=0)
    _get(bench, vcpu, "withdrawn")
    guest.execute(0xD503_44FF, 0xD503_3FDF, says="MSR DAIFClr, #4; ISB", show=0)


def good_irq_line(bench: Bench) -> None:
    """KVM_IRQ_LINE without an interrupt controller in the kernel: the vCPU's own inputs."""
    for protected in (True, False):
        vm = bench.vm(protected=protected)
        kind = "protected" if protected else "non-protected"
        guest = vm.agent()
        for says, kind_, intid, level in (
            ("IRQ up", IrqType.CPU, 0, True), ("IRQ down", IrqType.CPU, 0, False),
            ("FIQ up", IrqType.CPU, 1, True), ("FIQ down", IrqType.CPU, 1, False),
            ("input 2", IrqType.CPU, 2, True), ("SPI 32", IrqType.SPI, 32, True),
            ("PPI 16", IrqType.PPI, 16, True),
        ):  # fmt: skip
            number = irq_number(kind_, intid)
            bench.call("KVM_IRQ_LINE", f"{kind}, {says}", partial(vm.vm.irq_line, number, level))
            if says.endswith("up"):
                guest.mrs("ISR_EL1", (3, 0, 12, 1, 0))
        number = irq_number(IrqType.CPU, 0, 5)
        bench.call("KVM_IRQ_LINE", f"{kind}, no such vCPU", partial(vm.vm.irq_line, number, True))


def good_immediate_exit(bench: Bench) -> None:
    """`immediate_exit`, before the guest and in the middle of an MMIO exit."""
    for protected in (True, False):
        vm = bench.vm(protected=protected)
        guest = vm.agent()
        guest.load(DEVICE, 4)
        guest.answer(0x1234)
        guest.vcpu.kick()
        guest.resume("kicked", show=2)
        guest.resume("goes on", show=2)
        bench.kick_after(0.1, guest.vcpu)
        guest.op(Op.SPIN)


def bad_debug(bench: Bench) -> None:
    """KVMIoctl.SET_GUEST_DEBUG: a single step, and controls that there are not."""
    for protected in (True, False):
        vm = bench.vm(protected=protected)
        kind = "protected" if protected else "non-protected"
        guest = vm.agent()
        for says, control in (("off", 0), ("single step", 3), ("unknown control", 1 << 30)):
            argument = bytearray(GUEST_DEBUG.pack(control, 0, *[0] * 64))
            bench.ioctl(
                "KVM_SET_GUEST_DEBUG",
                f"{kind}, {says}",
                guest.vcpu.fd,
                Ioctl.SET_GUEST_DEBUG,
                argument,
            )
