# SPDX-License-Identifier: GPL-2.0-or-later
"""EL2's part of the dialects: who starts where, whose the registers are, who answers."""

from __future__ import annotations

import errno

import pytest

from fakes import a64
from fakes.el2_rig import (
    DIRTY,
    FIRMWARE_IPA,
    INCREMENT_PC,
    NOWHERE,
    RAM_IPA,
    SLOT_BYTES,
    El2,
    Guest,
)
from pkvm.arm64 import registers as r
from pkvm.arm64.psci import Affinity
from pkvm.arm64.psci import Function as Psci
from pkvm.arm64.smccc import NOT_SUPPORTED, Function
from pkvm.hyp.abi import VCPU_AREA_BYTES, ExitCode, HostCall, HostVcpu, RunResult
from pkvm.hyp.policy import ANDROID, POLICIES, RFC, UPSTREAM, Policy

SECRET = 0x5EC2_E7C0_FFEE
PMCR_EL0 = r.PMCR_EL0


def test_every_call_that_a_dialect_names_there_is() -> None:
    for policy in POLICIES.values():
        El2(policy=policy, firmware=False)


# Who starts, and where


def started(policy: Policy, *, firmware: bool) -> Guest:
    """A guest whose VMM set X0-X30 and PC, stopped at its first instruction."""
    el2 = El2(policy=policy)
    guest = Guest(el2, [a64.WFI], firmware=firmware)
    for number in range(31):
        guest.set(HostVcpu.X + 8 * number, 0x100 + number)
    guest.set(HostVcpu.PC, RAM_IPA)
    guest.set(HostVcpu.SP_EL1, 0x666)
    el2.engine.interrupt()
    assert guest.run() == ExitCode.IRQ
    return guest


@pytest.mark.parametrize(("policy", "stack"), [(RFC, FIRMWARE_IPA + SLOT_BYTES), (ANDROID, 0)])
def test_start_in_the_firmware(policy: Policy, stack: int) -> None:
    engine = started(policy, firmware=True).el2.engine
    assert engine.x[:31].tolist() == [0x100 + n for n in range(15)] + [0] * 16
    assert (engine.pc, engine.sp(1), engine.pstate) == (FIRMWARE_IPA, stack, r.PSTATE_RESET)


def test_android_starts_without_firmware_where_the_host_says() -> None:
    engine = started(ANDROID, firmware=False).el2.engine
    assert engine.x[:31].tolist() == [0x100] + [0] * 30
    assert (engine.pc, engine.sp(1), engine.pstate) == (RAM_IPA, 0, r.PSTATE_RESET)


def test_upstream_starts_with_all_that_the_host_has() -> None:
    engine = started(UPSTREAM, firmware=False).el2.engine
    assert engine.x[:31].tolist() == [0x100 + n for n in range(31)]
    assert (engine.pc, engine.sp(1)) == (RAM_IPA, 0x666)


def test_rfc_does_not_start_without_firmware() -> None:
    el2 = El2()
    guest = Guest(el2, [a64.WFI], firmware=False)
    assert guest.run() == ExitCode.ILLEGAL
    assert el2.refusals()[-1].check == "firmware"


def test_android_chooses_when_the_vcpu_is_made() -> None:
    el2 = El2(policy=ANDROID)
    guest = Guest(el2, [a64.WFI], vcpus=1, created_vcpus=4)
    assert guest.vcpu(0).power == Affinity.ON_PENDING
    guest.add_vcpu(1)
    assert guest.vcpu(1).power == Affinity.OFF
    page = el2.shared_page({HostVcpu.VCPU_ID: 2, HostVcpu.VCPU_IDX: 2, HostVcpu.MP_STATE: 0})
    args = (guest.handle, page, el2.pages(VCPU_AREA_BYTES // 4096))
    el2.assert_refused(errno.EINVAL, HostCall.INIT_VCPU, *args, check_name="primary", tables=False)
    assert guest.run(1) == ExitCode.ILLEGAL
    assert guest.run(0) == ExitCode.TRAP
    assert guest.vcpu(0).power == Affinity.ON


def test_android_stays_a_vm_with_firmware_when_the_guest_has_done_with_it() -> None:
    """Giving up the firmware lets the host start no vCPU where it likes."""
    el2 = El2(policy=ANDROID)
    call = [
        word
        for number, value in enumerate((Function.MEM_RELINQUISH, FIRMWARE_IPA, 0, 0))
        for word in a64.mov(number, value)
    ]
    guest = Guest(el2, [*call, a64.HVC, a64.WFI], vcpus=1, created_vcpus=2)
    assert guest.run() == ExitCode.TRAP
    assert (guest.ec(), guest.vm.firmware_loaded) == (0x16, 1)
    page = el2.shared_page({HostVcpu.VCPU_ID: 1, HostVcpu.VCPU_IDX: 1, HostVcpu.PC: RAM_IPA})
    args = (guest.handle, page, el2.pages(VCPU_AREA_BYTES // 4096))
    el2.assert_refused(errno.EINVAL, HostCall.INIT_VCPU, *args, check_name="primary", tables=False)
    el2.call(HostCall.VCPU_LOAD, guest.handle, 0, 0)
    el2.call(HostCall.HOST_DONATE_GUEST, el2.pages() >> 12, FIRMWARE_IPA >> 12, 1)
    el2.call(HostCall.VCPU_PUT)
    assert guest.run() == ExitCode.TRAP
    assert el2.engine.args() == (0, 0, 0, 0)
    el2.sound()


def test_android_without_firmware_starts_every_vcpu_that_is_runnable() -> None:
    el2 = El2(policy=ANDROID)
    guest = Guest(el2, [a64.WFI], firmware=False, created_vcpus=3)
    guest.add_vcpu(1, stopped=False)
    guest.add_vcpu(2)
    assert guest.run(1) == ExitCode.TRAP
    assert guest.run(0) == ExitCode.TRAP
    assert guest.run(2) == ExitCode.ILLEGAL


# Whose the registers are


def test_only_upstream_shows_registers() -> None:
    for policy in POLICIES.values():
        el2 = El2(policy=policy)
        guest = Guest(el2, [a64.WFI])
        assert guest.run() == ExitCode.TRAP
        el2.engine.x[20] = SECRET
        el2.engine.write_sysreg(r.TPIDR_EL1, SECRET)
        assert guest.run() == ExitCode.TRAP
        page = el2.bus.read(guest.vcpus[0], 4096)
        assert (SECRET.to_bytes(8, "little") in page) == (policy is UPSTREAM)


def test_only_upstream_takes_registers() -> None:
    for policy in POLICIES.values():
        el2 = El2(policy=policy)
        guest = Guest(el2, [a64.WFI])
        assert guest.run() == ExitCode.TRAP
        guest.set(HostVcpu.X + 8 * 20, SECRET)
        assert guest.run(flags=DIRTY) == ExitCode.TRAP
        assert (el2.engine.x[20] == SECRET) == (policy is UPSTREAM)


def test_sync_state_is_for_registers_that_the_host_may_see() -> None:
    for policy in POLICIES.values():
        el2 = El2(policy=policy)
        guest = Guest(el2, [a64.WFI])
        guest.run()
        guest.load()
        if policy is UPSTREAM:
            assert el2.x1(HostCall.VCPU_SYNC_STATE) == 0
        else:
            el2.assert_refused(errno.EINVAL, HostCall.VCPU_SYNC_STATE, check_name="vm_kind")


# Who answers


@pytest.mark.parametrize(
    "function", [Psci.PSCI_VERSION, Psci.CPU_ON_64, Function.SMCCC_VERSION, Function.KVM_PTP, 0]
)
@pytest.mark.parametrize("instruction", [a64.HVC, a64.SMC])
def test_upstream_sends_every_other_call_to_the_host(function: int, instruction: int) -> None:
    el2 = El2(policy=UPSTREAM)
    guest = Guest(el2, [instruction, a64.WFI])
    guest.set(HostVcpu.X, function)
    guest.set(HostVcpu.X + 8, SECRET)
    assert guest.run() == ExitCode.TRAP
    assert guest.ec() == (0x16 if instruction == a64.HVC else 0x17)
    assert (guest.x(0), guest.x(1)) == (function, SECRET)


@pytest.mark.parametrize("policy", [RFC, ANDROID], ids=lambda policy: policy.name)
@pytest.mark.parametrize("function", [Function.KVM_PTP, Function.PV_TIME_FEATURES, 0xC600_0040, 0])
@pytest.mark.parametrize("instruction", [a64.HVC, a64.SMC])
def test_the_others_answer_what_is_not_there(
    policy: Policy, function: int, instruction: int
) -> None:
    el2 = El2(policy=policy)
    guest = Guest(el2, [a64.WFI, instruction, a64.WFI])
    guest.run()
    el2.engine.x[0] = function
    assert guest.run(flags=INCREMENT_PC) == ExitCode.TRAP
    assert guest.ec() == 1
    assert el2.engine.x[0] == NOT_SUPPORTED


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_system_registers_are_el2s_in_every_dialect(policy: Policy) -> None:
    el2 = El2(policy=policy)
    guest = Guest(el2, [a64.WFI, a64.mrs(5, r.ID_AA64DFR0_EL1), a64.mrs(6, PMCR_EL0), a64.LOOP])
    guest.run()
    engine = el2.engine
    engine.write_sysreg(r.VBAR_EL1, RAM_IPA - 0x200)
    assert guest.run(flags=INCREMENT_PC) == ExitCode.TRAP
    assert engine.x[5] == 0x000F_00F0_0000_0000
    assert engine.read_sysreg(r.ESR_EL1) == 1 << 25
    assert engine.elr_el1() == RAM_IPA + 8


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_aarch32_ends_a_vcpu_in_every_dialect(policy: Policy) -> None:
    el2 = El2(policy=policy)
    code = [
        *a64.mov(1, RAM_IPA + 0x100), a64.msr(r.SysReg(3, 0, 4, 0, 1), 1),
        *a64.mov(1, r.PSTATE_NRW), a64.msr(r.SysReg(3, 0, 4, 0, 0), 1),
        *a64.mov(1, NOWHERE), a64.ERET,
    ]  # fmt: skip
    code += [0] * (0x40 - len(code)) + [a64.A32_LDR_R0_R1]
    guest = Guest(el2, code)
    for _ in range(3):
        assert guest.run() == ExitCode.ILLEGAL
    assert guest.shown[RunResult.ESR :] == (0,) * 6
    assert "AArch32" in el2.refusals()[0].why
