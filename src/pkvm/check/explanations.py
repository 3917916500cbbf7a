# SPDX-License-Identifier: GPL-2.0-or-later
"""Why the model and a Linux 7.3 kernel may differ: data for `pkvm.check.comparison`.

An explanation that no longer explains anything is an error, and all of them together may speak for
no more than one observation in twenty.
"""

from __future__ import annotations

from pkvm.check.comparison import Explanation

_NOT_HERE = (
    "COALESCED_MMIO", "COALESCED_PIO", "IRQ_ROUTING", "SIGNAL_MSI", "IOEVENTFD",
    "IOEVENTFD_ANY_LENGTH", "BINARY_STATS_FD",
    "DIRTY_LOG_RING_ACQ_REL", "DIRTY_LOG_RING_WITH_BITMAP", "GUEST_MEMFD", "GUEST_MEMFD_FLAGS",
    "SET_GUEST_DEBUG", "SET_GUEST_DEBUG2", "GUEST_DEBUG_HW_BPS", "GUEST_DEBUG_HW_WPS", "ARM_PMU_V3",
    "ARM_PMU_V3_STRICT", "ARM_EL1_32BIT", "ARM_USER_IRQ", "ARM_NISV_TO_USER", "ARM_SYSTEM_SUSPEND",
    "COUNTER_OFFSET", "ARM_SUPPORTED_REG_MASK_RANGES", "ARM_WRITABLE_IMP_ID_REGS",
    "ARM_SEA_TO_USER",
)  # fmt: skip
"""Capabilities of Linux's that this host has not."""


def _differs(
    topic: str, call: str, arguments: str, reason: str, source: str, *, scenario: str = "*"
) -> Explanation:
    """An explanation that is about every outcome of what it names."""
    return Explanation(topic, scenario, call, arguments, "*", "*", reason, source)


EXPLANATIONS: tuple[Explanation, ...] = (
    *(
        Explanation(
            topic="vm_types",
            scenario="good_capabilities",
            call="KVM_CHECK_EXTENSION",
            arguments=name,
            model="system 0, VM 0, protected VM 0",
            kernel="system *",
            reason="this host has not that capability, and says so",
            source="KVM API 4.4",
        )
        for name in _NOT_HERE
    ),
    _differs(
        "vm_types",
        "KVM_CHECK_EXTENSION",
        "NR_VCPUS",
        "it is the number of physical CPUs that run guests: one here",
        "KVM API 4.4, KVM_CAP_NR_VCPUS",
    ),
    _differs(
        "vm_types",
        "KVM_CHECK_EXTENSION",
        "ARM_VM_IPA_SIZE",
        "an IPA space has 40 bits here, and as many as a Cortex-A72 has there",
        "KVM API 4.2, the IPA size in protected mode",
    ),
    _differs(
        "memory_slots",
        "KVM_SET_USER_MEMORY_REGION",
        "* at 0xffffffff000 *",
        "the last page of a 44-bit IPA space, which has 40 bits here",
        "KVM API 4.2, the IPA size in protected mode",
    ),
    _differs(
        "vcpus",
        "KVM_ARM_VCPU_INIT",
        "PSCI and EL1_32BIT",
        "the CPU engine runs no AArch32 code at EL1; a protected vCPU with it runs nowhere",
        "Linux, arch/arm64/kvm/arm.c, vcpu_mode_is_bad_32bit()",
        scenario="good_features",
    ),
    Explanation(
        topic="one_reg",
        scenario="bad_ids",
        call="KVM_SET_ONE_REG",
        arguments="non-protected, PSTATE mode 0x10",
        model="EINVAL",
        kernel="ok",
        reason="a vCPU cannot be put into AArch32 state from outside here",
        source="Linux, arch/arm64/kvm/guest.c, set_core_reg()",
    ),
    _differs(
        "one_reg",
        "KVM_?ET_ONE_REG",
        "*MPIDR_EL1*",
        "a vCPU's MPIDR follows from its id here, whatever the VMM says",
        "Linux, arch/arm64/kvm/sys_regs.c, reset_mpidr()",
    ),
    _differs(
        "one_reg",
        "KVM_GET_REG_LIST",
        "*",
        "the six registers of the timers and counters are not in the list here",
        "Linux, arch/arm64/kvm/guest.c, copy_timer_indices()",
        scenario="good_list",
    ),
    *(
        _differs(
            topic,
            call,
            f"*{name}",
            "what a guest learns of the caches is the engine's, whose lines are longer so that a "
            "guest need not clean so many; Linux makes up a hierarchy of one level",
            "Arm ARM, CTR_EL0; Linux, arch/arm64/kvm/sys_regs.c, reset_clidr() and get_ccsidr()",
        )
        for topic, call, names in (
            ("one_reg", "KVM_GET_ONE_REG", ("CTR_EL0", "CLIDR_EL1")),
            ("sysregs", "guest MRS", ("CTR_EL0", "CLIDR_EL1", "CCSIDR_EL1", "CSSELR_EL1")),
        )
        for name in names
    ),
    Explanation(
        topic="sysregs",
        scenario="good_id_registers_protected",
        call="guest MRS",
        arguments="ID_AA64PFR0_EL1",
        model="read, 0x1001111",
        kernel="read, 0x1000000001000111",
        reason="this machine has an EL3, QEMU's has none; and EL2 here vouches for no CSV3",
        source="Arm ARM, ID_AA64PFR0_EL1; Linux, arch/arm64/kvm/hyp/nvhe/sys_regs.c",
    ),
    *(
        Explanation(
            topic="sysregs",
            scenario="*",
            call="guest M*",
            arguments=f"ICC_{name}_EL1*",
            model="*",
            kernel="guest exception, ESR=0x2000000 *",
            reason="the CPU's interrupt interface answers here also where the VM has no interrupt "
            "controller; nothing is ever pending in it then",
            source="Linux, arch/arm64/kvm/hyp/vgic-v3-sr.c, __vgic_v3_activate_traps()",
        )
        for name in (
            "CTLR",
            "PMR",
            "IAR1",
            "HPPIR1",
            "RPR",
            "IGRPEN1",
            "BPR1",
            "AP1R0",
            "EOIR1",
        )
    ),
    *(
        Explanation(
            topic="sysregs",
            scenario="good_registers*",
            call="guest MRS",
            arguments=name,
            model="guest exception, ESR=0x2000000 *",
            kernel="read, *",
            reason="QEMU 7.2 does not trap the CPU's implementation-defined registers for "
            "HCR_EL2.TIDCP; QEMU 11 does, and the guest's access is undefined",
            source="Arm ARM, HCR_EL2.TIDCP",
        )
        for name in ("S3_1_C15_C2_0", "S3_1_C11_C0_2")
    ),
    Explanation(
        topic="sysregs",
        scenario="good_registers",
        call="guest MRS",
        arguments="MDCCSR_EL0",
        model="guest exception, ESR=0x2000000 *",
        kernel="read, 0x0",
        reason="libunicorn's CPU has no debug communication channel",
        source="Arm ARM, MDCCSR_EL0",
    ),
    *(
        Explanation(
            topic="events",
            scenario="good_serror*",
            call=call,
            arguments=arguments,
            model=model,
            kernel=kernel,
            reason="libunicorn's CPU has no virtual SError: the guest takes it at the next entry "
            "with SErrors unmasked, not when it unmasks them",
            source="Arm ARM, HCR_EL2.VSE",
        )
        for call, arguments, model, kernel in (
            ("guest MRS", "ISR_EL1", "read, 0x0", "read, 0x100"),
            ("guest executes", "MSR DAIFClr*", "nothing", "guest exception, ESR=0xbe000000 *"),
        )
    ),
    *(
        Explanation(
            topic="events",
            scenario="good_irq_line",
            call=call,
            arguments=arguments,
            model=model,
            kernel=kernel,
            reason="a vCPU's IRQ and FIQ inputs are not the VMM's to drive: with KVM_IRQ_LINE it "
            "takes an interrupt controller in the kernel here",
            source="KVM API 4.25",
        )
        for call, arguments, model, kernel in (
            ("KVM_IRQ_LINE", "non-protected, ?[RI]Q *", "EINVAL", "ok"),
            ("guest MRS", "ISR_EL1", "read, 0x0", "read, *"),
        )
    ),
    Explanation(
        topic="events",
        scenario="bad_debug",
        call="KVM_SET_GUEST_DEBUG",
        arguments="*, single step",
        model="EINVAL",
        kernel="0",
        reason="the host single-steps no guest here, and has no capability that says so",
        source="KVM API 4.87",
    ),
    Explanation(
        topic="sharing",
        scenario="bad_arguments",
        call="guest HVC",
        arguments="0xc6000003, 0x10000000000",
        model="x0=0xfffffffffffffffd *",
        kernel="guest exception, ESR=0x96000010 *",
        reason="the guest's address space ends at 2^40 here and at 2^44 on a Cortex-A72: there the "
        "address is one without memory",
        source="Arm ARM, ID_AA64MMFR0_EL1.PARange; KVM API 4.2, the IPA size in protected mode",
    ),
    Explanation(
        topic="host_access",
        scenario="bad_device",
        call="*",
        arguments="ram*",
        model="*",
        kernel="*",
        reason="devices reach every page there, and the host reads a guest's memory by way of a "
        "disk; here EL2 keeps devices out",
        source="Linux 7.3, Documentation/virt/kvm/arm/pkvm.rst, DMA isolation using an IOMMU",
    ),
    Explanation(
        topic="fetch",
        scenario="bad_unaligned",
        call="guest branch",
        arguments="ram+*",
        model="guest exception, ESR=0x2000000 *",
        kernel="guest exception, ESR=0x8a000000 *",
        reason="libunicorn does not check the PC's alignment; it executes what it finds there",
        source="Arm ARM D1.3.6, PC alignment checking",
    ),
)
"""What is known. The first one that fits counts."""
