# SPDX-License-Identifier: GPL-2.0-or-later
"""The `upstream` dialect's registers as Linux 7.3 has them: what ONE_REG shows of the CPU, what a
guest that is not protected reads, the bitmaps of KVM's services, and events of the VMM's."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from fakes.contract_rig import errno_of
from fakes.dialect_rig import CODE_IPA, Party, party
from pkvm.arm64 import registers as r
from pkvm.arm64.psci import NOT_SUPPORTED
from pkvm.arm64.smccc import Function
from pkvm.guests.agent import Agent, AgentExitError, GuestExceptionError
from pkvm.kvm import FailEntry, Vcpu
from pkvm.uapi import kvm as uapi

DEVICE = 0x0A00_0000
ABORT = 0x9600_0010


@pytest.fixture
def made() -> Iterator[Party]:
    with party("upstream") as one:
        yield one


@pytest.fixture
def plain() -> Iterator[Party]:
    """A party with a non-protected VM."""
    with party("upstream", protect=False) as one:
        one.vm.close()
        one.vm = one.kvm.create_vm(0)
        one.vm.set_user_memory_region(1, CODE_IPA, one.code)
        yield one
        for vcpu in one.vcpus:
            vcpu.close()
        one.vm.close()


def sysreg(register: r.SysReg) -> int:
    return uapi.sysreg(register.one_reg)


def test_the_list_is_what_can_be_read(made: Party) -> None:
    vcpu = made.vcpu()
    registers = vcpu.reg_list()
    assert len(set(registers)) == len(registers) == 251
    for register in registers:
        value = vcpu.get_one_reg(register)
        vcpu.set_one_reg(register, value)
        assert vcpu.get_one_reg(register) == value


def test_what_a_cpu_is_cannot_be_changed(made: Party) -> None:
    vcpu = made.vcpu()
    pfr0, midr = sysreg(r.ID_AA64PFR0_EL1), sysreg(r.MIDR_EL1)
    before = vcpu.get_one_reg(pfr0)
    assert before & 0xFFF == 0x222, "AArch32 at EL0 and EL1"
    assert before >> 24 & 0xF, "a VM may still get a GICv3"
    for register in (pfr0, midr):
        assert errno_of(vcpu.set_one_reg, register, 1) == errno.EINVAL
    Agent(vcpu).start()
    assert vcpu.get_one_reg(pfr0) == before & ~(0xF << 24)
    assert errno_of(vcpu.set_one_reg, pfr0, 1) == errno.EBUSY
    assert errno_of(vcpu.set_one_reg, midr, 1) == errno.EINVAL


def test_debug_registers_of_a_plain_guest_are_kept_and_do_nothing(plain: Party) -> None:
    agent = plain.agent()
    [vcpu] = plain.vcpus
    agent.write_sysreg(*r.DBGBVR0_EL1, 0x1000)
    assert vcpu.get_one_reg(sysreg(r.DBGBVR0_EL1)) == agent.read_sysreg(*r.DBGBVR0_EL1) == 0x1000
    assert agent.read_sysreg(*r.OSLSR_EL1) == 8
    assert agent.read_sysreg(*r.ACTLR_EL1) == 0
    agent.execute(0xD508_7E40)  # DC CISW, X0
    with pytest.raises(GuestExceptionError):
        agent.read_sysreg(*r.PMCR_EL0)
    with pytest.raises(GuestExceptionError):
        agent.write_sysreg(*r.ID_AA64PFR0_EL1, 0)
    vcpu.init()
    assert vcpu.get_one_reg(sysreg(r.DBGBVR0_EL1)) == 0


def test_a_protected_guest_has_no_debug_registers_whatever_the_host_keeps(made: Party) -> None:
    agent = made.agent()
    [vcpu] = made.vcpus
    vcpu.set_one_reg(sysreg(r.DBGBVR0_EL1), 0x1000)
    agent.write_sysreg(*r.DBGBVR0_EL1, 0x2000)
    assert agent.read_sysreg(*r.DBGBVR0_EL1) == 0
    assert vcpu.get_one_reg(sysreg(r.DBGBVR0_EL1)) == 0x1000


@pytest.mark.parametrize(
    ("bitmap", "bits", "function"),
    [(uapi.REG_STD_BMAP, 1, Function.TRNG_VERSION), (uapi.REG_STD_HYP_BMAP, 1, Function.PV_TIME_ST),
     (uapi.REG_VENDOR_HYP_BMAP, 2, Function.KVM_PTP)],
)  # fmt: skip
def test_the_vmm_takes_services_away(made: Party, bitmap: int, bits: int, function: int) -> None:
    vcpu = made.vcpu()
    whole = vcpu.get_one_reg(bitmap)
    assert whole & bits
    assert errno_of(vcpu.set_one_reg, bitmap, whole | 1 << 40) == errno.EINVAL
    vcpu.set_one_reg(bitmap, whole & ~bits)
    agent = Agent(vcpu)
    agent.start()
    assert agent.hvc(function)[0] == NOT_SUPPORTED
    assert agent.hvc(Function.VENDOR_UID)[0] != NOT_SUPPORTED
    vcpu.set_one_reg(bitmap, whole & ~bits)
    assert errno_of(vcpu.set_one_reg, bitmap, whole) == errno.EBUSY


def give(vcpu: Vcpu, *, serror: int = 0, abort: int = 0, has_syndrome: int = 0) -> None:
    events = bytearray(uapi.VCPU_EVENTS.pack(serror, has_syndrome, abort, 0, *[0] * 12))
    vcpu.vm.kvm.kernel.ioctl(vcpu.fd, uapi.Ioctl.SET_VCPU_EVENTS, events)


def test_an_external_abort_in_place_of_a_devices_answer(made: Party) -> None:
    agent = made.agent()
    [vcpu] = made.vcpus
    with pytest.raises(AgentExitError):
        agent.load(DEVICE + 8, 4)
    give(vcpu, abort=1)
    answer = agent.resume()
    assert answer.results[:2] == (ABORT, DEVICE + 8)
    assert agent.execute(0xD503_201F)[0] == 0, "the agent goes on"


def test_an_serror_waits_until_it_is_unmasked_at_an_entry(made: Party) -> None:
    agent = made.agent()
    [vcpu] = made.vcpus
    assert errno_of(give, vcpu, serror=1, has_syndrome=1) == errno.EINVAL
    give(vcpu, serror=1)
    agent.execute(0xD503_201F)
    with pytest.raises(AgentExitError):
        # MSR DAIFClr, #4; then an exit with SErrors unmasked: LDR W1, [X0]
        agent.execute(0xD503_44FF, 0xB940_0001, x=(DEVICE,))
    answer = agent.resume()
    assert answer.results[0] == 0xBE00_0000
    assert answer.results[4] == 0x380, "vector"
    assert agent.execute(0xD503_201F)[0] == 0, "it is taken once"


def test_events_take_a_vcpu_that_is_initialised(made: Party) -> None:
    raw = made.vm.create_vcpu(3)
    made.vcpus.append(raw)
    assert errno_of(give, raw, abort=1) == errno.ENOEXEC
    debug = bytearray(uapi.GUEST_DEBUG.pack(3, 0, *[0] * 64))
    kernel = made.kvm.kernel
    assert errno_of(kernel.ioctl, raw.fd, uapi.Ioctl.SET_GUEST_DEBUG, debug) == errno.EINVAL


def test_aarch32_and_a_pmu_initialise_and_do_not_run(made: Party) -> None:
    psci = uapi.VcpuFeature.PSCI_0_2
    for feature in (uapi.VcpuFeature.EL1_32BIT, uapi.VcpuFeature.PMU_V3):
        with made.kvm.create_vm(uapi.TYPE_PROTECTED) as vm, vm.create_vcpu(0) as vcpu:
            vcpu.init(features=(psci, feature))
            if feature == uapi.VcpuFeature.PMU_V3:
                assert errno_of(vcpu.run) == errno.EINVAL
            else:
                assert isinstance(vcpu.run(), FailEntry)


def test_an_abort_before_the_first_run_goes_to_the_vector_of_reset(made: Party) -> None:
    vcpu = made.vcpu()
    give(vcpu, abort=1)
    assert vcpu.get_reg("pc") == 0x200
    assert vcpu.get_reg("elr_el1") == CODE_IPA
