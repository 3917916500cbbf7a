# SPDX-License-Identifier: GPL-2.0-or-later
"""A protected guest with a device of its own: the agent programs the copy engine by its registers,
and moves bytes of its private memory by DMA."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from fakes.contract_rig import RAM_IPA
from fakes.dialect_rig import Party, party
from pkvm.arm64.smccc import INVALID_PARAMETER, SUCCESS, Function, PviommuOp
from pkvm.guests.agent import Agent
from pkvm.hyp.abi import HOST_CALL_BASE, HostCall
from pkvm.machine.dma import CTRL, CTRL_START, DST, FAULT_IPA, LEN, SRC, STATUS, STATUS_BUSY
from pkvm.machine.machine import DMA_BASE, DMA_STREAM, SMMU_BASE
from pkvm.machine.stage2 import Stage2Fault
from pkvm.uapi.kvm import DeviceAssign, DmaCopy

PAGE = 4096
DEVICE_IPA = 0x1A00_0000
IOVA = 0x5000_0000
PVIOMMU, VSID = DeviceAssign.PVIOMMU, 0x10
BUFFER = RAM_IPA + 0x10_0000
SECRET = 0x5EC2E7_5EC2E7


def host_call(party: Party, call: HostCall, *args: int) -> int:
    status, result = party.system.hyp.host_call(HOST_CALL_BASE + call, *args)[:2]
    assert status == 0
    return result


def give(party: Party, driver: int, vm_fd: int, ipa: int) -> None:
    argument = bytearray(DeviceAssign.ARGS.pack(vm_fd, VSID, ipa))
    party.kvm.kernel.ioctl(driver, DeviceAssign.ASSIGN, argument)


class Owner:
    """The agent in a VM that has the copy engine."""

    def __init__(self, party: Party) -> None:
        self.party = party
        self.agent: Agent = party.agent()
        (vm,) = party.system.hyp.vms()
        self.handle = vm.handle
        kernel = party.kvm.kernel
        self.driver = kernel.open("/dev/dma-copy")
        give(party, self.driver, party.vm.fd, DEVICE_IPA)

    def op(self, op: PviommuOp, *args: int) -> tuple[int, int]:
        x = self.agent.hvc(Function.PVIOMMU_OP, op, *args)
        return x[0], x[1]

    def attached(self) -> int:
        """A domain that the device follows."""
        status, domain = self.op(PviommuOp.ALLOC_DOMAIN)
        assert status == SUCCESS
        assert self.op(PviommuOp.ATTACH, PVIOMMU, VSID, 0, domain)[0] == SUCCESS
        return domain

    def register(self, offset: int) -> int:
        return self.agent.load(DEVICE_IPA + offset)

    def copy(self, source: int, destination: int, length: int) -> int:
        """Have the device copy; its STATUS afterwards."""
        for offset, value in ((SRC, source), (DST, destination), (LEN, length), (CTRL, CTRL_START)):
            self.agent.store(DEVICE_IPA + offset, value)
        while (status := self.register(STATUS)) == STATUS_BUSY:
            pass
        return status


@pytest.fixture
def owner() -> Iterator[Owner]:
    with party("android") as one:
        yield Owner(one)


def test_the_guest_programs_its_device(owner: Owner) -> None:
    agent, domain = owner.agent, owner.attached()
    agent.store(BUFFER, SECRET)
    agent.store(BUFFER + PAGE, 0)
    assert owner.op(PviommuOp.MAP, domain, IOVA, BUFFER, 2 * PAGE, 3) == (SUCCESS, 2 * PAGE)
    assert owner.copy(IOVA, IOVA + PAGE, 8) == 0
    assert agent.load(BUFFER + PAGE) == SECRET
    assert owner.op(PviommuOp.UNMAP, domain, IOVA, PAGE) == (SUCCESS, PAGE)
    assert (owner.copy(IOVA, IOVA + PAGE, 8), owner.register(FAULT_IPA)) == (1, IOVA)


def test_registers_have_their_width(owner: Owner) -> None:
    """Whole, aligned doublewords reach them, and nothing else."""
    agent = owner.agent
    agent.store(DEVICE_IPA + SRC, 0x1122_3344_5566_7788)
    assert agent.load(DEVICE_IPA + SRC) == 0x1122_3344_5566_7788
    for size in (1, 2, 4):
        agent.store(DEVICE_IPA + SRC, 0xFF, size)
        assert agent.load(DEVICE_IPA + SRC, size) == 0
    assert agent.load(DEVICE_IPA + SRC) == 0x1122_3344_5566_7788


def test_what_the_guest_is_told_it_has(owner: Owner) -> None:
    assert owner.agent.hvc(Function.DEV_REQ_MMIO, DEVICE_IPA)[:2] == (SUCCESS, DMA_BASE)
    tokens = owner.agent.hvc(Function.DEV_REQ_DMA, PVIOMMU, VSID)[:3]
    assert tokens == (SUCCESS, SMMU_BASE, DMA_STREAM)


def test_a_page_that_was_never_touched_is_asked_of_the_host(owner: Owner) -> None:
    """The HVC is executed again when it is there; the device finds zeroes."""
    domain, fresh = owner.attached(), BUFFER + 0x8_0000
    assert owner.op(PviommuOp.MAP, domain, IOVA, fresh, 3 * PAGE, 3) == (SUCCESS, 3 * PAGE)
    owner.agent.store(fresh, SECRET)
    assert owner.copy(IOVA, IOVA + 2 * PAGE, 8) == 0
    assert owner.agent.load(fresh + 2 * PAGE) == SECRET


def test_the_hosts_driver_has_lost_its_device(owner: Owner) -> None:
    with pytest.raises(Stage2Fault):
        owner.party.system.machine.host_bus.read_u64(DMA_BASE)


def test_the_host_gives_a_device_by_its_driver_and_gets_it_back() -> None:
    with party("android") as one:
        owner, kernel = Owner(one), one.kvm.kernel
        buffer = kernel.mmap(2 * PAGE)
        copy = DmaCopy.ARGS.pack(buffer.address, buffer.address + PAGE, 8)
        with pytest.raises(OSError, match="refused") as lost:
            kernel.ioctl(owner.driver, DmaCopy.COPY, bytearray(copy))
        assert lost.value.errno == errno.EFAULT
        with pytest.raises(OSError, match="EBUSY"):
            give(one, owner.driver, one.vm.fd, DEVICE_IPA + PAGE)
        one.vcpus[0].close()
        one.vm.close()
        buffer.write(0, b"the host")
        kernel.ioctl(owner.driver, DmaCopy.COPY, bytearray(copy))
        assert buffer.read(PAGE, 8) == b"the host"


@pytest.mark.parametrize(
    ("dialect", "ipa", "number"),
    [
        ("android", DEVICE_IPA + 8, errno.EINVAL),
        ("android", RAM_IPA, errno.EINVAL),
        ("android", 1 << 45, errno.EINVAL),
        ("upstream", DEVICE_IPA, errno.ENOSYS),
        ("rfc", DEVICE_IPA, errno.ENOSYS),
    ],
)
def test_what_is_not_given(dialect: str, ipa: int, number: int) -> None:
    with party(dialect) as one:
        one.agent()
        driver = one.kvm.kernel.open("/dev/dma-sg")
        with pytest.raises(OSError, match=r"no page without memory|no devices for guests") as error:
            give(one, driver, one.vm.fd, ipa)
        assert error.value.errno == number
        with pytest.raises(OSError, match="not a VM's") as error:
            give(one, driver, driver, DEVICE_IPA)
        assert error.value.errno == errno.EBADF


def test_a_device_with_a_ring_is_let_go_first() -> None:
    with party("android") as one:
        one.agent()
        kernel = one.kvm.kernel
        driver, another = kernel.open("/dev/dma-sg"), kernel.open("/dev/dma-sg")
        with pytest.raises(OSError, match="somebody else"):
            give(one, driver, one.vm.fd, DEVICE_IPA)
        kernel.close(another)
        give(one, driver, one.vm.fd, DEVICE_IPA)
        with pytest.raises(OSError, match="given away") as error:
            give(one, driver, one.vm.fd, DEVICE_IPA)
        assert error.value.errno == errno.ENODEV
        with pytest.raises(OSError, match="refused"):
            kernel.open("/dev/dma-sg")
        kernel.close(driver)
        one.vcpus[0].close()
        one.vm.close()
        kernel.close(kernel.open("/dev/dma-sg"))


def test_code_that_dma_wrote_is_what_runs(owner: Owner) -> None:
    """A device's write is seen by the CPU's instruction fetch, too."""
    agent, domain = owner.agent, owner.attached()
    code = BUFFER + 0x1000
    for at, result in ((0, 1), (0x800, 2)):  # mov x0, #result; ret
        agent.store(code + at, 0xD65F_03C0_D280_0000 | result << 5)
    assert owner.op(PviommuOp.MAP, domain, IOVA, code, PAGE, 3) == (SUCCESS, PAGE)
    assert agent.branch(code)[0] == 1
    assert owner.copy(IOVA + 0x800, IOVA, 8) == 0
    assert agent.branch(code)[0] == 2


def test_pages_that_are_not_the_guests_own(owner: Owner) -> None:
    agent, domain = owner.agent, owner.attached()
    agent.store(BUFFER, 1)
    assert agent.hvc(Function.MEM_SHARE, BUFFER)[0] == SUCCESS
    for ipa in (BUFFER, DEVICE_IPA, 1 << 40):
        assert owner.op(PviommuOp.MAP, domain, IOVA, ipa, PAGE, 3)[0] == INVALID_PARAMETER
    assert agent.hvc(Function.MEM_UNSHARE, BUFFER)[0] == SUCCESS
    assert owner.op(PviommuOp.MAP, domain, IOVA, BUFFER, PAGE, 3)[0] == SUCCESS
    assert agent.hvc(Function.MEM_SHARE, BUFFER)[0] == INVALID_PARAMETER
    assert agent.hvc(Function.MEM_RELINQUISH, BUFFER)[0] == INVALID_PARAMETER


def test_the_end_of_the_vm_gives_the_device_back() -> None:
    with party("android") as one:
        owner = Owner(one)
        domain = owner.attached()
        owner.agent.store(BUFFER, SECRET)
        assert owner.op(PviommuOp.MAP, domain, IOVA, BUFFER, PAGE, 3) == (SUCCESS, PAGE)
        assert owner.copy(IOVA, IOVA + 8, 8) == 0
        for vcpu in one.vcpus:
            vcpu.close()
        one.vm.close()
        bus = one.system.machine.host_bus
        assert [bus.read_u64(DMA_BASE + at) for at in (SRC, DST, LEN, STATUS)] == [0] * 4
        assert not one.system.hyp.mem.domains
