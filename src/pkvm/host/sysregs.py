# SPDX-License-Identifier: GPL-2.0-or-later
"""Trapped system registers that the host emulates: SGI generation, the physical timer, and for a
guest that is not protected the rest of the CPU that it is shown.

SGIs need an interrupt controller; a timer of a VM without one only counts. A
protected vCPU's exit may have the value but not the register that it goes to or
comes from; EL2 puts a read's value there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pkvm.arm64 import registers as r
from pkvm.arm64.esr import SYS64_ISS, SYS64_READ, SYS64_RT_MASK, SYS64_RT_SHIFT
from pkvm.arm64.registers import SysReg
from pkvm.host import shown_cpu
from pkvm.host.timer import PhysicalTimer
from pkvm.host.vcpu import Vcpu
from pkvm.hyp.abi import HostVcpu, RunResult, VcpuFlag

_KEY_MASK = sum(
    field.mask for name, field in SYS64_ISS.fields.items() if name not in ("Rt", "read")
)
_XZR = 31


class Emulated(NamedTuple):
    """A register's two directions."""

    read: Callable[[Vcpu], int | None]
    """None: UNDEFINED."""
    write: Callable[[Vcpu, int], bool]
    """False: UNDEFINED."""


def access(vcpu: Vcpu, results: tuple[int, ...]) -> bool:
    """Emulate the access that VCPU_RUN returned with (EC 0x18); False if it is UNDEFINED."""
    esr = results[RunResult.ESR]
    key = esr & _KEY_MASK
    emulated = _REGISTERS.get(key) or _shown(vcpu, key)
    isolated = vcpu.vm.isolated
    register = (esr & SYS64_RT_MASK) >> SYS64_RT_SHIFT
    if not esr & SYS64_READ:
        value = results[RunResult.X0]
        if not isolated:
            value = 0 if register == _XZR else vcpu.word(HostVcpu.X + 8 * register)
        if not emulated.write(vcpu, value):
            return False
    else:
        answer = emulated.read(vcpu)
        if answer is None:
            return False
        if isolated:
            vcpu.x0 = answer
        elif register != _XZR:
            vcpu.set_word(HostVcpu.X + 8 * register, answer)
            vcpu.mark_x_dirty()
    vcpu.tell(VcpuFlag.INCREMENT_PC)
    return True


def _shown(vcpu: Vcpu, key: int) -> Emulated:
    """A register of the CPU that the guest is shown, if the host decides that."""
    if vcpu.vm.protected or not vcpu.vm.host.policy.shows_cpu:
        return _UNDEFINED
    register = SysReg.from_iss(key)
    return Emulated(
        lambda vcpu: shown_cpu.guest_reads(vcpu, register),
        lambda vcpu, value: shown_cpu.guest_writes(vcpu, register, value),
    )


def _never(_: Vcpu) -> int | None:
    return None


_UNDEFINED = Emulated(_never, lambda vcpu, value: False)


def _sgi(*, group1: bool) -> Emulated:
    def write(vcpu: Vcpu, value: int) -> bool:
        if vcpu.gic is None:
            return False
        vcpu.gic.gic.send_sgi(vcpu.gic, value, group1)
        return True

    return Emulated(_never, write)


def _timer(name: str) -> Emulated:
    """A register of the physical timer, by the name of its attribute."""

    def timer(vcpu: Vcpu) -> PhysicalTimer:
        return vcpu.vm.host.timers.physical(vcpu)

    def read(vcpu: Vcpu) -> int:
        value: int = getattr(timer(vcpu), name)
        return value

    def write(vcpu: Vcpu, value: int) -> bool:
        setattr(timer(vcpu), name, value)
        return True

    return Emulated(read, write)


_REGISTERS: dict[int, Emulated] = {
    r.ICC_SGI1R_EL1.iss: _sgi(group1=True),
    # With one security state these two are the same.
    r.ICC_SGI0R_EL1.iss: _sgi(group1=False),
    r.ICC_ASGI1R_EL1.iss: _sgi(group1=False),
    r.CNTP_CTL_EL0.iss: _timer("control"),
    r.CNTP_CVAL_EL0.iss: _timer("compare"),
    r.CNTP_TVAL_EL0.iss: _timer("value"),
}
"""By encoding within the ISS."""
