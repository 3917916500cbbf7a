# SPDX-License-Identifier: GPL-2.0-or-later
"""The `upstream` dialect beyond its rows: what a Linux 7.3 host in protected mode was seen to do.

Lines of its log stand in the tests' names and numbers.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from fakes.contract_rig import PAGE, RAM_IPA, errno_of
from fakes.dialect_rig import CODE_IPA, FREE_IPA, Party, host, party
from pkvm import guests
from pkvm.arm64.psci import Function01
from pkvm.arm64.smccc import INVALID_PARAMETER, NOT_SUPPORTED, Function
from pkvm.check.invariants import check
from pkvm.guests.agent import Agent, AgentExitError, GuestExceptionError
from pkvm.kvm import SystemEvent
from pkvm.uapi import kvm as uapi
from pkvm.uapi.errors import HostOopsError, ProtectedPageError

PSCI_FEATURES = 0x8400_000A
CPU_ON = 0xC400_0003
AFFINITY_INFO = 0xC400_0004
SYSTEM_OFF = 0x8400_0008
SYSTEM_RESET2 = 0xC400_0012
SYSTEM_OFF2 = 0xC400_0015
INVALID_PARAMS = -2 & (1 << 64) - 1
ALREADY_ON = -4 & (1 << 64) - 1


@pytest.fixture
def made() -> Iterator[Party]:
    with party("upstream") as one:
        yield one


def check_invariants(made: Party) -> None:
    assert check(made.system.hyp.mem, made.system.hyp.vms()) == []


def test_sharing_step_by_step(made: Party) -> None:
    agent, page = made.agent(), RAM_IPA + 16 * PAGE
    made.ram.write(16 * PAGE, b"\x11\x11")
    assert agent.hvc(Function.MEM_SHARE, page)[:4] == (0, 0, 0, 0), "never touched by the guest"
    assert made.ram.read(16 * PAGE, 2) == b"\x11\x11"
    agent.store(page, 0x2222, 2)
    assert made.ram.read(16 * PAGE, 2) == b"\x22\x22"
    assert agent.hvc(Function.MEM_SHARE, page)[0] == INVALID_PARAMETER
    assert agent.hvc(Function.MEM_UNSHARE, page)[0] == 0
    for access in (made.ram.read, made.ram.syscall_read):
        with pytest.raises(ProtectedPageError) as refused:
            access(16 * PAGE + 8, 8)
        assert refused.value.address == made.ram.address + 16 * PAGE + 8
    assert agent.load(page, 2) == 0x2222
    assert agent.hvc(Function.MEM_UNSHARE, page)[0] == INVALID_PARAMETER
    check_invariants(made)
    for arguments in ((page + 8,), (page, 1), (page, 0, 1), (1 << 40,)):
        assert agent.hvc(Function.MEM_SHARE, *arguments)[0] == INVALID_PARAMETER
    never = RAM_IPA + (2 << 20)
    assert agent.hvc(Function.MEM_UNSHARE, never)[0] == INVALID_PARAMETER
    with pytest.raises(GuestExceptionError) as abort:
        agent.hvc(Function.MEM_SHARE, FREE_IPA)
    assert (abort.value.esr, abort.value.far) == (0x9600_0010, 0)


def test_forced_reclaim_wipes_one_page_and_no_more(made: Party) -> None:
    agent = made.agent()
    for page in range(3):
        agent.store(RAM_IPA + page * PAGE, 0xABCD)
    locked = made.system.host.memlock.pages
    assert made.ram.forced_read(PAGE, 8) == bytes(8)
    check_invariants(made)
    assert made.system.host.memlock.pages == locked, "pinned until the VM's end"
    assert agent.load(RAM_IPA) == agent.load(RAM_IPA + 2 * PAGE) == 0xABCD
    made.ram.forced_write(PAGE - 4, b"8 bytes.")
    with pytest.raises(ProtectedPageError):
        made.ram.read(2 * PAGE, 8)
    for call in (lambda: agent.load(RAM_IPA + PAGE), agent.resume):
        with pytest.raises(OSError, match="by force") as fault:
            call()
        assert fault.value.errno == errno.EFAULT
    check_invariants(made)


def test_munmap_gives_back_what_the_guest_does_not_have(made: Party) -> None:
    """Two guests have pages of one mapping: one its own, one that it shares with the VMM."""
    agent, kernel = made.agent(), made.system.host
    with made.kvm.create_vm() as plain:
        code = made.kvm.mmap(2 << 20)
        code.write(0, guests.image("agent"))
        plain.set_user_memory_region(0, CODE_IPA, code)
        plain.set_user_memory_region(1, RAM_IPA, made.ram, offset=64 * PAGE, size=8 * PAGE)
        vcpu = plain.create_vcpu(0)
        vcpu.init()
        vcpu.set_reg("pc", CODE_IPA)
        lent = Agent(vcpu)
        lent.start()
        for page in (0, 1, 7):
            agent.store(RAM_IPA + page * PAGE, 0x100 + page)
        for page in (2, 3):
            lent.store(RAM_IPA + page * PAGE, 0x200 + page)
        free = kernel.free_pages
        made.ram.close()
        assert kernel.free_pages == free + made.ram.length // PAGE - 3
        check_invariants(made)
        others = made.kvm.mmap(made.ram.length - 64 * PAGE)
        others.write(0, b"\xff" * others.length)
        assert [agent.load(RAM_IPA + page * PAGE) for page in (0, 1, 7)] == [0x100, 0x101, 0x107]
        assert errno_of(lent.load, RAM_IPA + 2 * PAGE) == errno.EFAULT
        vcpu.close()


def test_el2s_own_memory_is_never_taken_by_force(made: Party) -> None:
    memory = made.kvm.mmap(PAGE)
    kernel = made.system.host
    pfn = kernel._host.users.pa(memory.address, PAGE) >> 12
    made.system.hyp.mem.host_donate_hyp(pfn, 1)
    with pytest.raises(HostOopsError, match="hypervisor-protected") as oops:
        memory.forced_read(0, 8)
    assert oops.value.address == memory.address
    made.system.hyp.mem.hyp_donate_host(pfn, 1)


def test_memory_of_one_guest_is_not_given_to_another(made: Party) -> None:
    made.agent().store(RAM_IPA, 1)
    with made.kvm.create_vm(uapi.TYPE_PROTECTED) as other:
        code = made.kvm.mmap(2 << 20)
        code.write(0, guests.image("agent"))
        other.set_user_memory_region(0, CODE_IPA, code)
        other.set_user_memory_region(1, RAM_IPA, made.ram)
        vcpu = other.create_vcpu(0)
        vcpu.init()
        vcpu.set_reg("pc", CODE_IPA)
        agent = Agent(vcpu)
        agent.start()
        with pytest.raises(OSError, match="EL2 does not give") as fault:
            agent.load(RAM_IPA)
        assert fault.value.errno == errno.EPERM
        check_invariants(made)
        vcpu.close()


def test_the_same_page_twice_in_one_guest(made: Party) -> None:
    made.vm.set_user_memory_region(5, FREE_IPA, made.ram)
    agent = made.agent()
    agent.store(RAM_IPA, 1)
    assert errno_of(agent.load, FREE_IPA) == errno.EPERM
    check_invariants(made)


def test_a_limit_of_locked_memory_stops_the_guest_and_lets_it_go_on(made: Party) -> None:
    agent = made.agent()
    agent.load(CODE_IPA)
    lock = made.system.host.memlock
    lock.limit = (lock.pages + 2) * PAGE
    agent.load(RAM_IPA)
    agent.load(RAM_IPA + PAGE)
    with pytest.raises(OSError, match="ulimit -l") as full:
        agent.load(RAM_IPA + 2 * PAGE)
    assert full.value.errno == errno.ENOMEM
    lock.limit += PAGE
    assert agent.resume().results[0] == RAM_IPA + 2 * PAGE


def test_registers_are_the_hosts_to_read_and_write(made: Party) -> None:
    agent = made.agent()
    [vcpu] = made.vcpus
    vbar = uapi.sysreg(0xC600)
    assert vcpu.get_one_reg(vbar)
    pc = vcpu.get_reg("pc")
    vcpu.set_one_reg(vbar, 0x1234_5000)
    assert vcpu.get_reg("pc") == pc
    assert agent.read_sysreg(3, 0, 12, 0, 0) == 0x1234_5000
    vcpu.set_reg("v3", 0x5EC2E7)
    assert agent.execute(0x9E66_0060)[0] == 0x5EC2E7  # fmov x0, d3
    vcpu.set_reg("x28", vcpu.get_reg("x28"))
    assert vcpu.get_reg("v3") == 0x5EC2E7


def test_the_hosts_psci_is_1_3(made: Party) -> None:
    secondary = made.vcpu(1, power_off=True)
    agent = made.agent()
    assert agent.hvc(AFFINITY_INFO, 1)[0] == 1
    assert agent.hvc(CPU_ON, 7, CODE_IPA, 0)[0] == INVALID_PARAMS
    assert agent.hvc(CPU_ON, 1, CODE_IPA, 0x51)[0] == 0
    assert secondary.get_reg("x0") == 0x51
    assert agent.hvc(CPU_ON, 1, CODE_IPA, 0)[0] == ALREADY_ON
    assert agent.hvc(AFFINITY_INFO, 1)[0] == 0
    assert agent.hvc(AFFINITY_INFO, 2)[0] == INVALID_PARAMS
    assert agent.hvc(PSCI_FEATURES, SYSTEM_RESET2)[0] == 0
    assert agent.hvc(PSCI_FEATURES, SYSTEM_OFF2)[0] == 1
    assert agent.hvc(PSCI_FEATURES, 0xC400_000E)[0] == NOT_SUPPORTED
    for arguments in ((2, 0), (0, 1)):
        assert agent.hvc(SYSTEM_OFF2, *arguments)[0] == INVALID_PARAMS
    with pytest.raises(AgentExitError) as left:
        agent.hvc(SYSTEM_OFF2, 1)
    assert isinstance(left.value.exit, SystemEvent)
    assert left.value.exit.kind == "shutdown"


@pytest.mark.parametrize(
    ("version", "features", "reset2", "off2"),
    [(0x2, False, False, False), (0x1_0000, True, False, False), (0x1_0001, True, True, False),
     (0x1_0002, True, True, False), (0x1_0003, True, True, True)],
)  # fmt: skip
def test_older_psci(made: Party, version: int, features: bool, reset2: bool, off2: bool) -> None:
    vcpu = made.vcpu()
    vcpu.set_one_reg(uapi.REG_PSCI_VERSION, version)
    assert vcpu.get_one_reg(uapi.REG_PSCI_VERSION) == version
    agent = Agent(vcpu)
    agent.start()
    assert agent.hvc(0x8400_0000)[0] == version
    assert (agent.hvc(PSCI_FEATURES, SYSTEM_OFF)[0] == 0) == features
    for function, there in ((SYSTEM_RESET2, reset2), (SYSTEM_OFF2, off2)):
        answer = agent.hvc(PSCI_FEATURES, function)[0]
        assert (answer != NOT_SUPPORTED) == there
        if not there:
            assert agent.hvc(function)[0] == NOT_SUPPORTED


def test_time_of_day_and_random_numbers(made: Party) -> None:
    agent = made.agent()
    first, second = (agent.hvc(Function.KVM_PTP, counter)[:4] for counter in (0, 1))
    wall, count = ((one[0] << 32 | one[1], one[2] << 32 | one[3]) for one in (first, second))
    assert wall[0] > 1_700_000_000 * 10**9
    assert count > wall or count[1] > wall[1], "both clocks go on"
    assert agent.hvc(Function.KVM_PTP, 2)[0] == NOT_SUPPORTED
    assert agent.hvc(Function.TRNG_UUID)[:4] == (0xE0210D, 0xEB118443, 0x44527080, 0x4C5A4E55)
    status, high, middle, low = agent.hvc(Function.TRNG_RND64, 64)[:4]
    assert (status, high, middle) == (0, 0, 0)
    assert low
    assert agent.hvc(Function.TRNG_RND32, 96)[0] == 0
    assert agent.hvc(Function.TRNG_RND32, 0)[:4] == (0, 0, 0, 0)
    assert agent.hvc(Function.TRNG_RND32, 97)[0] == INVALID_PARAMS
    assert agent.hvc(Function.TRNG_FEATURES, Function.TRNG_RND32)[0] == 0
    assert agent.hvc(Function.TRNG_FEATURES, Function.KVM_PTP)[0] == NOT_SUPPORTED


def test_with_the_virtual_clock_randomness_repeats() -> None:
    seen = []
    for _ in range(2):
        with party("upstream", clock="virtual") as made:
            agent = made.agent()
            seen.append((agent.hvc(Function.TRNG_RND64, 192), agent.hvc(Function.KVM_PTP, 0)))
    assert seen[0] == seen[1]


def test_255_vms_of_either_kind() -> None:
    with host("upstream", memory=128 << 20) as (_, kvm):
        vms = [kvm.create_vm(uapi.TYPE_PROTECTED * (n & 1)) for n in range(255)]
        assert errno_of(kvm.create_vm) == errno.ENOMEM
        assert errno_of(kvm.create_vm, uapi.TYPE_PROTECTED) == errno.ENOMEM
        vms.pop().close()
        kvm.create_vm(uapi.TYPE_PROTECTED).close()
        for vm in vms:
            vm.close()


def test_a_guest_without_psci_0_2_has_kvms_calls_of_0_1(made: Party) -> None:
    secondary = made.vm.create_vcpu(1)
    secondary.init(power_off=True, features=())
    vcpu = made.vm.create_vcpu(0)
    vcpu.init(features=())
    vcpu.set_reg("pc", CODE_IPA)
    agent = Agent(vcpu)
    agent.start()
    assert agent.hvc(0x8400_0000)[0] == NOT_SUPPORTED
    assert agent.hvc(Function01.CPU_SUSPEND)[0] == NOT_SUPPORTED
    assert agent.hvc(Function01.CPU_ON, 9, CODE_IPA)[0] == INVALID_PARAMS
    assert agent.hvc(Function01.CPU_ON, 1, CODE_IPA, 0x51)[0] == 0
    assert secondary.get_reg("x0") == 0x51
    assert agent.hvc(Function01.CPU_ON, 1, CODE_IPA)[0] == INVALID_PARAMS, "it is on"
    for one in (vcpu, secondary):
        one.close()
