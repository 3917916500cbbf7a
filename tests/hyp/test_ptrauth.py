# SPDX-License-Identifier: GPL-2.0-or-later
"""Pointer authentication: a VM has it if its vCPUs ask for it on a CPU that can."""

from __future__ import annotations

import errno

import pytest

from fakes import a64
from fakes.el2_rig import RAM_IPA, El2, Guest
from pkvm.arm64 import registers as r
from pkvm.hyp.abi import VCPU_AREA_BYTES, ExitCode, HostCall, HostVcpu

PTRAUTH = 1 << 5 | 1 << 6
PACIA_X5_X1 = 0xDAC1_0025
PACIASP = 0xD503_233F
APIAKEYLO_EL1 = r.SysReg(3, 0, 2, 1, 0)
APGAKEYLO_EL1 = r.SysReg(3, 0, 2, 3, 0)
ENABLE_IA = 1 << 31
UNDEFINED = 1 << 25


def run(guest: Guest, *instructions: int, x5: int = 0) -> int:
    """Execute from the guest's start with an address in X1; X5 after it."""
    engine, memory = guest.el2.engine, guest.el2.machine.memory
    memory.write(guest.ram, a64.code([*instructions, a64.WFI, a64.LOOP]))
    engine.invalidate_code(guest.ram, 64)
    engine.write_sysreg(r.VBAR_EL1, RAM_IPA + 0x800)
    memory.write(guest.ram + 0xA00, a64.code([a64.WFI, a64.LOOP]))
    engine.write_sysreg(r.ESR_EL1, 0)
    engine.pc, engine.pstate = RAM_IPA, r.PSTATE_RESET
    engine.x[1], engine.x[2], engine.x[5] = 0x12_3456, 7, x5
    assert guest.run() == ExitCode.TRAP
    return engine.x[5]


def guest_with(el2: El2, features: int) -> Guest:
    guest = Guest(el2, [a64.WFI], features=features, vcpus=2)
    assert guest.run() == ExitCode.TRAP
    return guest


@pytest.fixture(scope="module")
def el2() -> El2:
    return El2(cpu_model="max")


def test_with_it(el2: El2) -> None:
    guest = guest_with(el2, PTRAUTH)
    engine = el2.engine
    isar1 = run(guest, a64.mrs(5, r.ID_AA64ISAR1_EL1))
    assert isar1 >> 4 & 0xFF, "address authentication, by one of the algorithms"
    assert isar1 >> 24 & 0xFF
    assert isar1 >> 4 & 0xF <= 1
    run(guest, a64.msr(APIAKEYLO_EL1, 2))
    assert engine.read_sysreg(APIAKEYLO_EL1) == 7
    assert run(guest, a64.PACGA_X5_X1_X2) != 0
    engine.write_sysreg(r.SCTLR_EL1, r.SCTLR_EL1_RESET | ENABLE_IA)
    assert run(guest, PACIA_X5_X1, x5=0x12_3456) != 0x12_3456
    assert engine.read_sysreg(r.ESR_EL1) == 0


def test_without_it_every_part_is_undefined(el2: El2) -> None:
    guest = guest_with(el2, 0)
    engine = el2.engine
    assert run(guest, a64.mrs(5, r.ID_AA64ISAR1_EL1)) & 0xFF00_0FF0 == 0
    for instruction in (a64.PACGA_X5_X1_X2, a64.msr(APIAKEYLO_EL1, 2), a64.mrs(5, APGAKEYLO_EL1)):
        assert run(guest, instruction, x5=9) == 9
        assert engine.read_sysreg(r.ESR_EL1) == UNDEFINED, hex(instruction)
    engine.write_sysreg(r.SCTLR_EL1, r.SCTLR_EL1_RESET | ENABLE_IA)
    run(guest, PACIA_X5_X1)
    assert engine.read_sysreg(r.ESR_EL1) == UNDEFINED
    engine.write_sysreg(r.SCTLR_EL1, r.SCTLR_EL1_RESET)
    run(guest, PACIASP)
    assert engine.read_sysreg(r.ESR_EL1) == 0, "in the hint space: does nothing"


def test_keys_are_the_vcpus_own(el2: El2) -> None:
    first, second = guest_with(el2, PTRAUTH), guest_with(el2, PTRAUTH)
    engine = el2.engine
    first.run()
    engine.write_sysreg(APIAKEYLO_EL1, 0x5EC2E7)
    second.run()
    assert engine.read_sysreg(APIAKEYLO_EL1) == 0
    engine.write_sysreg(APIAKEYLO_EL1, 0xBAD)
    first.run()
    assert engine.read_sysreg(APIAKEYLO_EL1) == 0x5EC2E7


@pytest.mark.parametrize("features", [1 << 5, 1 << 6])
def test_by_halves_it_is_not_to_be_had(el2: El2, features: int) -> None:
    with pytest.raises(AssertionError, match="INIT_VCPU"):
        Guest(el2, [a64.WFI], features=features)
    assert el2.refusals()[-1].check == "features"


def test_all_vcpus_of_a_vm_have_it_or_none(el2: El2) -> None:
    guest = Guest(el2, [a64.WFI], features=PTRAUTH, created_vcpus=2)
    page = el2.shared_page({HostVcpu.VCPU_ID: 1, HostVcpu.VCPU_IDX: 1})
    area = el2.pages(VCPU_AREA_BYTES // 4096)
    args = (guest.handle, page, area)
    el2.assert_refused(errno.EINVAL, HostCall.INIT_VCPU, *args, check_name="features", tables=False)
    guest.features = PTRAUTH
    guest.add_vcpu(1)


def test_a_cpu_that_cannot() -> None:
    with pytest.raises(AssertionError, match="INIT_VCPU"):
        Guest(El2(), [a64.WFI], features=PTRAUTH)


def test_other_features_are_not_looked_at() -> None:
    guest = Guest(El2(), [a64.WFI], features=1 << 2 | 1 << 3 | 1 << 4 | 1 << 40)
    assert guest.run() == ExitCode.TRAP
    assert guest.vm.features == 0
