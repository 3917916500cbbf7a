# SPDX-License-Identifier: GPL-2.0-or-later
"""P11: at a protected vCPU's exit the host reads no more than facts §5.4 lets (facts §11.3).

The table is written down here once more, by exception class and not by EL2's own
classes. It says which bits of each result register may be set at all; that those
bits do not carry a secret is for tests that know the secrets. And EL2 writes
nothing of a protected vCPU into the host's page but the interrupt controller's
words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pkvm.arm64 import esr as e
from pkvm.arm64.bits import MASK64
from pkvm.arm64.esr import EC, EC_SHIFT, HPFAR_FIPA_MASK
from pkvm.arm64.psci import Function as Psci
from pkvm.arm64.registers import SCTLR_E0E, SCTLR_EE
from pkvm.arm64.smccc import Function
from pkvm.arm64.stage2 import PAGE_MASK
from pkvm.hyp.abi import ExitCode, HostVcpu, HypRequest, RunResult
from pkvm.hyp.vcpu import Vcpu

Masks = tuple[int, int, int, int, int, int]
"""Of the results from `RunResult.ESR` on: what may be set."""
_NAMES = ("ESR", "X0", "FAR or X1", "HPFAR or X2", "PSTATE", "SCTLR")
_NOTHING: Masks = (0, 0, 0, 0, 0, 0)
_ESR = 0xFFFF_FFFF
_W = 0xFFFF_FFFF
_MODE = 0xF
_SYS64_READ = 1
"""ISS bit 0: MRS."""
_NO_SYNDROME = 0x00FF_C000
"""ISS[23:14], which say something only beside ISV."""
_SMC64 = 1 << 30
_SIZES = (0xFF, 0xFFFF, _W, MASK64)
_ARGUMENTS = {
    int(Psci.CPU_ON_32): 1,
    int(Psci.CPU_ON_64): 1,
    int(Psci.CPU_OFF): 0,
    int(Psci.CPU_SUSPEND_32): 0,
    int(Psci.CPU_SUSPEND_64): 0,
    int(Psci.SYSTEM_OFF): 0,
    int(Psci.SYSTEM_RESET): 0,
    int(Psci.SYSTEM_RESET2_32): 2,
    int(Psci.SYSTEM_RESET2_64): 2,
    int(Function.TRNG_RND32): 1,
    int(Function.TRNG_RND64): 1,
}
"""Calls that come to the host, and how many of their arguments."""
_VGIC = slice(HostVcpu.VGIC_HCR, HostVcpu.VGIC_LR + 8 * 16)


def shown_too_much(results: Sequence[int]) -> Iterator[str]:
    """What VCPU_RUN's registers, from X0 on, show of an isolated vCPU that no exit may."""
    code = results[RunResult.CODE]
    shown = results[RunResult.ESR :]
    for name, value, mask in zip(_NAMES, shown, _may_show(code, shown), strict=False):
        if value & MASK64 & ~mask:
            yield f"P11: an exit of code {code} shows {name} {value:#x}, of which {mask:#x} may be"


class PageWatch:
    """What EL2 writes into the host's page of an isolated vCPU while it runs."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._before = vcpu.page.tobytes()

    def look(self) -> Iterator[str]:
        """What has changed that may not."""
        now = self._vcpu.page.tobytes()
        if now == self._before:
            return
        for offset in range(0, len(now), 8):
            changed = now[offset : offset + 8] != self._before[offset : offset + 8]
            if changed and not _VGIC.start <= offset < _VGIC.stop:
                yield f"P11: EL2 wrote into a protected vCPU's page at {offset:#x}"


def _may_show(code: int, shown: Sequence[int]) -> Masks:
    if code == ExitCode.HYP_REQ:
        pages = 0xFFFF if shown[0] == HypRequest.MEMCACHE else 0
        ipa = MASK64 & ~PAGE_MASK if shown[0] == HypRequest.MAP else 0
        return 3, pages, ipa, 0, 0, 0
    if code != ExitCode.TRAP:
        return _NOTHING
    esr = shown[0]
    match esr >> EC_SHIFT:
        case EC.WFX:
            return _ESR, 0, 0, 0, _MODE, 0
        case EC.SYS64:
            written = 0 if esr & _SYS64_READ else MASK64
            return _ESR & ~e.SYS64_RT_MASK, written, 0, 0, _MODE, 0
        case EC.HVC64 if shown[1] in _ARGUMENTS:
            first, second = (
                (MASK64 if shown[1] & _SMC64 else _W) if _ARGUMENTS[shown[1]] > number else 0
                for number in (0, 1)
            )
            return _ESR, _W, first, second, 0, 0
        case EC.IABT_LOW:
            return _ESR, 0, 0, HPFAR_FIPA_MASK, 0, 0
        case EC.DABT_LOW:
            stored, visible = 0, _ESR & ~(e.ISV | _NO_SYNDROME)
            if esr & e.ISV:
                visible = _ESR & ~e.SRT_MASK
                stored = _SIZES[esr >> e.SAS_SHIFT & 3] if esr & e.WNR else 0
            endian = SCTLR_EE | SCTLR_E0E
            return visible, stored, PAGE_MASK, HPFAR_FIPA_MASK, _MODE, endian
    return _NOTHING
