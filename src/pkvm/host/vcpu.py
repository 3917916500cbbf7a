# SPDX-License-Identifier: GPL-2.0-or-later
"""A vCPU of the host: the page it shares with EL2, its kvm_run, KVM_ARM_VCPU_INIT, MP states.

What the host knows of registers stands in one page (`hyp.abi.HostVcpu`). For a
protected vCPU that has run it is not the guest's state: EL2 keeps that.
"""

from __future__ import annotations

import errno
import struct
import threading
from typing import TYPE_CHECKING

from pkvm.arm64 import registers as r
from pkvm.arm64.registers import PSTATE_RESET, SCTLR_EL1, SCTLR_EL1_RESET
from pkvm.host import shown_cpu
from pkvm.host.ports import PAGE_SIZE
from pkvm.host.scheduler import Runner
from pkvm.hyp.abi import CONTEXT_SYSREGS, HostCall, HostVcpu, VcpuFlag
from pkvm.uapi.kvm import TARGET_GENERIC_V8, VCPU_INIT, VCPU_MMAP_SIZE, MpState, Run, VcpuFeature

if TYPE_CHECKING:
    from pkvm.host.timer import PhysicalTimer
    from pkvm.host.vgic.cpu import GicCpu
    from pkvm.host.vgic.irq import Irq
    from pkvm.host.vm import Vm

_WORD = struct.Struct("<Q")
_EXIT_REASON = Run.EXIT_REASON >> 2
SCTLR_OFFSET = HostVcpu.SYSREGS + 8 * CONTEXT_SYSREGS.index(SCTLR_EL1)
_UNKNOWN = tuple(
    HostVcpu.SYSREGS + 8 * CONTEXT_SYSREGS.index(register)
    for register in (
        r.TTBR0_EL1, r.TTBR1_EL1, r.ESR_EL1, r.AFSR0_EL1, r.AFSR1_EL1, r.FAR_EL1, r.PAR_EL1,
        r.MAIR_EL1, r.TPIDR_EL1, r.TPIDR_EL0, r.TPIDRRO_EL0,
    )
)  # fmt: skip
"""Registers without an architected reset value."""
_KEPT = (HostVcpu.SP_EL1, HostVcpu.ELR_EL1, HostVcpu.SPSR_EL1)
_PSTATE_AARCH32 = 0x1D3
"""Supervisor mode, A, I and F masked."""
_DIRTY = int(VcpuFlag.DIRTY)
_DIRTY_X = int(VcpuFlag.DIRTY_X)
_POWER_OFF = 1 << VcpuFeature.POWER_OFF
_AARCH32 = 1 << VcpuFeature.EL1_32BIT
_KNOWN = (1 << len(VcpuFeature)) - 1
NO_IPA = (1 << 64) - 1
"""No address (Linux's INVALID_GPA)."""

PendingMmio = tuple[int, bool, bool, int]
"""An MMIO exit that the VMM has not answered yet: bytes, whether a store, whether the guest is
big-endian, ESR_EL2 (which does not say the register of a protected vCPU)."""


class Vcpu:
    """A vCPU; `index` is its place in the VM, `id` what the VMM called it (the guest's MPIDR)."""

    def __init__(self, vm: Vm, vcpu_id: int, index: int) -> None:
        self.vm = vm
        self.id = vcpu_id
        self.index = index
        self.page = vm.host.pages.alloc(1)
        """PA of the page that is shared with EL2 once `at_el2`."""
        self.run = bytearray(VCPU_MMAP_SIZE)
        """struct kvm_run and the page after it: what the VMM maps."""
        self.run_words: memoryview[int] = memoryview(self.run).cast("I")
        """The same as 32-bit words."""
        self.runner = Runner()
        self.mutex = threading.Lock()
        """Linux's vcpu->mutex: every ioctl of the vCPU fd holds it, KVM_RUN all the time. Taken
        before the kernel lock."""
        self.references = 1
        """The descriptor, mappings of kvm_run, and a KVM_RUN under way."""
        self.closed = False
        """No descriptor names it any more."""
        self.initialised = False
        self.power_off = False
        """Whether the last KVM_ARM_VCPU_INIT had POWER_OFF."""
        self.mp_state = MpState.RUNNABLE
        self.at_el2 = False
        self.flags = 0
        """`hyp.abi.VcpuFlag` for the next VCPU_RUN."""
        self.x0 = 0
        """The transfer value for the next VCPU_RUN, if the vCPU is protected."""
        self.irqs: list[Irq] = []
        """Interrupts that the list registers should hold; mostly none."""
        self.gic: GicCpu | None = None
        """The vCPU's share of the VM's interrupt controller, if that has one."""
        self.mmio: PendingMmio | None = None
        self.fault_far = 0
        """FAR_EL2 of the guest's last abort."""
        self.serror_given = False
        """The VMM gave it an SError, some time since KVM_ARM_VCPU_INIT."""
        self.serror_waits = False
        """The guest has not taken it yet."""
        self.lone_timer: PhysicalTimer | None = None
        """The physical timer of a vCPU without an interrupt controller, once it was touched."""
        self.kept: dict[r.SysReg, int] = {}
        """System registers that the host alone has (`shown_cpu`)."""
        self.stolen_ipa = NO_IPA
        """Where the guest is told how long the vCPU waited for the CPU (`stolen_time`)."""
        self.stolen_seen_ns = 0
        """What of `runner.waited_ns` it has been told."""

    @property
    def has_stolen_time(self) -> bool:
        """Whether the VMM named a place for it."""
        return self.stolen_ipa != NO_IPA

    def init(self, argument: bytes) -> None:
        """KVM_ARM_VCPU_INIT (KVM API 4.82) with a struct kvm_vcpu_init.

        Raises EINVAL for another target, a feature that is not offered or not those of the first
        call; ENOENT for an unknown feature.
        """
        target, *words = VCPU_INIT.unpack(argument)
        if target != TARGET_GENERIC_V8:
            raise OSError(errno.EINVAL, f"target {target}: ask KVM_ARM_PREFERRED_TARGET")
        if any(words[1:]) or words[0] & ~_KNOWN:
            raise OSError(errno.ENOENT, f"unknown vCPU feature in {[hex(word) for word in words]}")
        vm = self.vm
        offered = vm.host.policy.vcpu_features
        ptrauth = vm.host.ptrauth if words[0] & ~offered else 0
        offered |= ptrauth
        if vm.protected and not vm.isolated:
            offered |= _AARCH32  # such a vCPU does not run
        refused = [item.name for item in VcpuFeature if words[0] & ~offered & 1 << item]
        if refused:
            raise OSError(errno.EINVAL, f"vCPU feature {', '.join(refused)} is not offered")
        if words[0] & ptrauth not in (0, ptrauth):
            raise OSError(errno.EINVAL, "PTRAUTH_ADDRESS and PTRAUTH_GENERIC go together")
        features = words[0] & ~_POWER_OFF
        if vm.vcpu_features is not None and features != vm.vcpu_features:
            raise OSError(errno.EINVAL, "all vCPUs of a VM have the same features")
        vm.vcpu_features = features
        self.power_off = bool(words[0] & _POWER_OFF)
        self.mp_state = MpState.STOPPED if self.power_off else MpState.RUNNABLE
        self.reset()
        self.initialised = True

    def reset(self, pc: int = 0, x0: int = 0, sctlr_bits: int = 0) -> None:
        """Put the reset state of facts §6.1 into the page, with PC, X0 and further SCTLR_EL1 bits
        as a PSCI CPU_ON asks. As in Linux SP_EL1, ELR_EL1 and SPSR_EL1 stay as they were."""
        self.sync()
        page = bytearray(PAGE_SIZE)
        for offset in _KEPT:
            _WORD.pack_into(page, offset, self.word(offset))
        unknown = self.vm.host.policy.unknown_register
        for offset in _UNKNOWN:
            _WORD.pack_into(page, offset, unknown)
        features = (self.vm.vcpu_features or 0) | (_POWER_OFF if self.power_off else 0)
        pstate = _PSTATE_AARCH32 if features & _AARCH32 else PSTATE_RESET
        for offset, value in (
            (HostVcpu.X, x0),
            (HostVcpu.PC, pc),
            (HostVcpu.PSTATE, pstate),
            (HostVcpu.VCPU_ID, self.id),
            (HostVcpu.VCPU_IDX, self.index),
            (HostVcpu.FEATURES, features),
            (HostVcpu.MP_STATE, self.mp_state),
            (SCTLR_OFFSET, SCTLR_EL1_RESET | sctlr_bits),
        ):
            _WORD.pack_into(page, offset, value)
        self.vm.host.bus.write(self.page, page)
        shown_cpu.reset(self)
        self.serror_given = self.serror_waits = False
        self.mmio = None
        self.flags = 0
        self.mark_dirty()
        if self.gic is not None:
            self.gic.forget()
        self.vm.host.timers.stop(self)

    def tell(self, flag: int) -> None:
        """Set a bit of `hyp.abi.VcpuFlag` for EL2's next entry."""
        self.flags |= flag

    def mark_dirty(self) -> None:
        """The page holds registers of a non-protected vCPU that EL2 does not have."""
        if not self.vm.isolated:
            self.flags |= _DIRTY

    def mark_x_dirty(self) -> None:
        """As `mark_dirty`, if X0-X30 alone were changed since an exit for the host."""
        if not self.flags & _DIRTY:
            self.flags |= _DIRTY_X

    def forget_dirty(self) -> None:
        """The VM became protected: EL2 takes from the page what the RFC lets it, nothing else."""
        self.flags = 0

    def sync(self) -> None:
        """Bring the page up to date with EL2, for a vCPU that is loaded and whose registers the
        host sees. While the page is dirty it is EL2 that lags behind."""
        clean = not self.vm.isolated and not self.flags & _DIRTY
        if clean and self.vm.host.loaded is self:
            self.vm.host.el2.call(HostCall.VCPU_SYNC_STATE)

    def exit_with(self, reason: int) -> None:
        """Set kvm_run.exit_reason."""
        self.run_words[_EXIT_REASON] = reason

    def word(self, offset: int) -> int:
        """A 64-bit word of the page."""
        return self.vm.host.bus.read_u64(self.page + offset)

    def set_word(self, offset: int, value: int) -> None:
        """Write a 64-bit word of the page."""
        self.vm.host.bus.write_u64(self.page + offset, value)

    def get(self) -> None:
        """One more reference."""
        self.references += 1

    def put(self) -> None:
        """One reference less; the last one drops the VM's."""
        self.references -= 1
        if not self.references:
            self.vm.put()
