# SPDX-License-Identifier: GPL-2.0-or-later
"""Trapped system registers that the host emulates: SGI generation and the physical timer.

Of a VM without an interrupt controller it emulates none. A protected vCPU's
exit has the value but not the register that it goes to or comes from; EL2 puts a
read's value there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pkvm.arm64 import registers as r
from pkvm.arm64.esr import SYS64_ISS, SYS64_READ, SYS64_RT_MASK, SYS64_RT_SHIFT
from pkvm.host.timer import PhysicalTimer
from pkvm.host.vcpu import Vcpu
from pkvm.host.vgic.cpu import GicCpu
from pkvm.hyp.abi import HostVcpu, RunResult, VcpuFlag

_KEY_MASK = sum(
    field.mask for name, field in SYS64_ISS.fields.items() if name not in ("Rt", "read")
)
_XZR = 31


class Emulated(NamedTuple):
    """A register; None: that direction is UNDEFINED."""

    read: Callable[[GicCpu], int] | None
    write: Callable[[GicCpu, int], None]


def access(vcpu: Vcpu, results: tuple[int, ...]) -> bool:
    """Emulate the access that VCPU_RUN returned with (EC 0x18); False if it is UNDEFINED."""
    cpu = vcpu.gic
    esr = results[RunResult.ESR]
    emulated = _REGISTERS.get(esr & _KEY_MASK)
    if cpu is None or emulated is None:
        return False
    isolated = vcpu.vm.isolated
    register = (esr & SYS64_RT_MASK) >> SYS64_RT_SHIFT
    if not esr & SYS64_READ:
        value = results[RunResult.X0]
        if not isolated:
            value = 0 if register == _XZR else vcpu.word(HostVcpu.X + 8 * register)
        emulated.write(cpu, value)
    elif emulated.read is None:
        return False
    else:
        value = emulated.read(cpu)
        if isolated:
            vcpu.x0 = value
        elif register != _XZR:
            vcpu.set_word(HostVcpu.X + 8 * register, value)
            vcpu.mark_x_dirty()
    vcpu.tell(VcpuFlag.INCREMENT_PC)
    return True


def _timer(cpu: GicCpu) -> PhysicalTimer:
    return cpu.vcpu.vm.host.timers.physical(cpu)


def _set_control(cpu: GicCpu, value: int) -> None:
    _timer(cpu).control = value


def _set_compare(cpu: GicCpu, value: int) -> None:
    _timer(cpu).compare = value


def _set_value(cpu: GicCpu, value: int) -> None:
    _timer(cpu).value = value


_REGISTERS: dict[int, Emulated] = {
    r.ICC_SGI1R_EL1.iss: Emulated(None, lambda cpu, value: cpu.gic.send_sgi(cpu, value, True)),
    # With one security state these two are the same.
    r.ICC_SGI0R_EL1.iss: Emulated(None, lambda cpu, value: cpu.gic.send_sgi(cpu, value, False)),
    r.ICC_ASGI1R_EL1.iss: Emulated(None, lambda cpu, value: cpu.gic.send_sgi(cpu, value, False)),
    r.CNTP_CTL_EL0.iss: Emulated(lambda cpu: _timer(cpu).control, _set_control),
    r.CNTP_CVAL_EL0.iss: Emulated(lambda cpu: _timer(cpu).compare, _set_compare),
    r.CNTP_TVAL_EL0.iss: Emulated(lambda cpu: _timer(cpu).value, _set_value),
}
"""By encoding within the ISS."""
