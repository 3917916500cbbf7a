# SPDX-License-Identifier: GPL-2.0-or-later
"""The RFC's contract for KVM_CAP_ARM_PROTECTED_VM, line by line, with real guest code.

Each test drives the system-call seam. What is the host's afterwards, and that
EL2's invariants hold, is checked at the end of every one (see `rig`).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fakes.contract_rig import (
    FIRMWARE_BYTES,
    FIRMWARE_IPA,
    FIRMWARE_SLOT,
    PAGE,
    RAM_BYTES,
    RAM_IPA,
    RAM_SLOT,
    Rig,
    enable_cap,
    errno_of,
    rig,
    running_system,
)
from pkvm import fdt, guests
from pkvm.events import Event, Message
from pkvm.firmware.host_tree import FIRMWARE_COMPATIBLE
from pkvm.guests.agent import AgentExitError
from pkvm.guests.protocol import Boot, Info, Op
from pkvm.kvm import FailEntry, SystemEvent
from pkvm.machine.machine import DMA_BASE, DMA_STREAM, RAM_BASE
from pkvm.machine.stage2 import Stage2Fault
from pkvm.system import System
from pkvm.trace.counting import CountingRecorder
from pkvm.uapi import kvm as uapi
from pkvm.uapi.errors import ProtectedPageError

ENABLE, INFO = 0, 1
CPU_ON = 0xC400_0003
CPU_OFF = 0x8400_0002
SYSTEM_OFF = 0x8400_0008
MEM_SHARE = 0xC600_0003
CAP = uapi.Cap.ARM_PROTECTED_VM


@pytest.fixture
def a() -> Iterator[Rig]:
    with rig() as made:
        yield made


# 1. CHECK_EXTENSION


@pytest.mark.parametrize(("protected", "value"), [(True, 1), (False, 0)])
def test_check_extension_tells_protected_mode(protected: bool, value: int) -> None:
    with rig(protected=protected) as made:
        assert made.kvm.check_extension(199) == value
        assert made.vm.check_extension(199) == value


def test_a_host_not_in_protected_mode_cannot_protect() -> None:
    with rig(protected=False) as made:
        assert enable_cap(made.vm, ENABLE, [FIRMWARE_SLOT]) == errno.EINVAL
        [vcpu] = made.vcpus()
        made.firmware.write(0, guests.image("agent"))
        vcpu.set_reg("pc", FIRMWARE_IPA)
        vcpu.set_reg("sp_el1", FIRMWARE_IPA + FIRMWARE_BYTES)
        agent = made.agent(vcpu)
        agent.store(RAM_IPA, 0x1234)
        assert made.ram.read(0, 8) == struct.pack("<Q", 0x1234)


# 2. Flags, arguments, order of errors


@pytest.mark.parametrize("flags", [2, 3, 1 << 31, 0xFFFF_FFFF])
def test_flags_are_one_value(a: Rig, flags: int) -> None:
    assert enable_cap(a.vm, flags, [FIRMWARE_SLOT]) == errno.EINVAL


@pytest.mark.parametrize("place", [1, 2, 3])
def test_enable_wants_its_other_arguments_zero(a: Rig, place: int) -> None:
    args = [FIRMWARE_SLOT, 0, 0, 0]
    args[place] = 1
    assert enable_cap(a.vm, ENABLE, args) == errno.EINVAL


@pytest.mark.parametrize("place", [2, 3])
def test_info_wants_its_last_arguments_zero(a: Rig, place: int) -> None:
    args = [a.ram.address, 0, 0, 0]
    args[place] = 1
    assert enable_cap(a.vm, INFO, args) == errno.EINVAL


def test_the_order_of_enables_errors(a: Rig) -> None:
    vm, kvm = a.vm, a.kvm
    assert enable_cap(vm, 7, [0, 1]) == errno.EINVAL  # arguments before flags
    assert enable_cap(vm, ENABLE, [uapi.MEM_SLOTS_NUM]) == errno.EINVAL
    assert enable_cap(vm, ENABLE, [1 << 40]) == errno.EINVAL
    assert enable_cap(vm, ENABLE, [5]) == errno.ENOENT
    small = kvm.mmap(PAGE)
    vm.set_user_memory_region(5, 0x2_0000_0000, small)
    assert enable_cap(vm, ENABLE, [5]) == errno.ENOMEM
    vm.set_user_memory_region(5, 0, None)
    vm.set_user_memory_region(
        6, 0x2_0000_0000, kvm.mmap(FIRMWARE_BYTES), flags=uapi.MemFlag.LOG_DIRTY_PAGES
    )
    assert enable_cap(vm, ENABLE, [6]) == errno.EINVAL
    assert enable_cap(vm, ENABLE, [FIRMWARE_SLOT]) == 0
    # a VM already protected says EPERM before anything about the slot
    assert enable_cap(vm, ENABLE, [uapi.MEM_SLOTS_NUM]) == errno.EPERM


def test_without_firmware_enable_is_refused_and_a_vm_without_slots_has_none() -> None:
    with rig(firmware=b"") as made:
        assert enable_cap(made.vm, ENABLE, [FIRMWARE_SLOT]) == errno.EINVAL
    with rig() as made, made.kvm.create_vm() as empty:
        assert enable_cap(empty, ENABLE, [0]) == errno.ENOENT


# 3. ENABLE takes every slot


def test_enable_takes_every_byte_of_every_slot(a: Rig) -> None:
    a.ram.write(0, b"payload" * 1000)
    third = a.kvm.mmap(3 * PAGE)
    a.vm.set_user_memory_region(2, 0x8000_0000, third)
    scratch = a.kvm.mmap(PAGE)
    dma = a.system.kernel.open("/dev/dma-copy")
    a.vm.protect(FIRMWARE_SLOT)
    for memory in (a.ram, a.firmware, third):
        for offset in range(0, memory.length, PAGE):
            inside = offset + offset // PAGE * 8 % PAGE
            attempts: tuple[tuple[Callable[[int, Any], object], object], ...] = (
                (memory.read, 1),
                (memory.write, b"\xff"),
                (memory.syscall_read, 1),
                (memory.syscall_write, b"\xff"),
            )
            for attempt, what in attempts:
                with pytest.raises(ProtectedPageError) as refused:
                    attempt(inside, what)
                assert refused.value.address == memory.address + inside
            copies = ((memory.address + offset, scratch.address),)
            for source, target in (*copies, *(pair[::-1] for pair in copies)):
                arguments = bytearray(uapi.DmaCopy.ARGS.pack(source, target, 8))
                assert (
                    errno_of(a.system.kernel.ioctl, dma, uapi.DmaCopy.COPY, arguments) == errno.EIO
                )
    assert scratch.read(0, PAGE) == bytes(PAGE)
    a.check()
    # and the guest finds what the VMM had put there
    agent = a.agent(a.vcpus()[0])
    assert agent.load(RAM_IPA).to_bytes(8, "little") == b"payloadp"


def test_the_firmware_slot_holds_the_image_and_zeroes(a: Rig) -> None:
    a.firmware.write(0, b"\xa5" * FIRMWARE_BYTES)
    a.vm.protect(FIRMWARE_SLOT)
    agent = a.agent(a.vcpus()[0])
    image = guests.image("agent")
    for offset in (0, len(image) // 2 & ~7):
        word = agent.load(FIRMWARE_IPA + offset)
        assert word.to_bytes(8, "little") == image[offset : offset + 8]
    for offset in (len(image) + 7 & ~7, 1 << 20, FIRMWARE_BYTES // 2 + 8):
        assert agent.load(FIRMWARE_IPA + offset) == 0


def test_pages_that_cannot_be_given_leave_everything_as_it_was(a: Rig) -> None:
    """Two slots over the same memory: the second donation is refused, so is ENABLE."""
    a.ram.write(0, b"content")
    a.vm.set_user_memory_region(2, 0x9000_0000, a.ram)
    before = a.system.census()
    assert enable_cap(a.vm, ENABLE, [FIRMWARE_SLOT]) == errno.EPERM
    assert a.system.census() == before
    assert a.ram.read(0, 7) == b"content"
    a.check()
    a.vm.set_user_memory_region(2, 0, None)
    a.vm.protect(FIRMWARE_SLOT)


def test_a_slot_without_memory_behind_it_is_efault(a: Rig) -> None:
    region = bytearray(uapi.MEMORY_REGION.pack(2, 0, 0x9000_0000, PAGE, 0x1000))
    a.system.kernel.ioctl(a.vm.fd, uapi.Ioctl.SET_USER_MEMORY_REGION, region)
    assert enable_cap(a.vm, ENABLE, [FIRMWARE_SLOT]) == errno.EFAULT
    a.ram.write(0, b"still the host's")


# 4. Frozen slots, a second ENABLE


def test_after_enable_no_slot_changes(a: Rig) -> None:
    vm = a.vm
    vm.protect(FIRMWARE_SLOT)
    change = vm.set_user_memory_region
    more = a.kvm.mmap(PAGE)
    assert errno_of(change, 9, 0x9000_0000, more) == errno.EPERM  # create
    assert errno_of(change, RAM_SLOT, RAM_IPA, None) == errno.EPERM  # delete
    assert errno_of(change, RAM_SLOT, 0x9000_0000, a.ram) == errno.EPERM  # move
    assert errno_of(change, RAM_SLOT, RAM_IPA, a.ram, flags=1) == errno.EPERM  # flags
    assert errno_of(change, RAM_SLOT, RAM_IPA, a.ram) == errno.EPERM  # nothing new
    assert enable_cap(vm, ENABLE, [FIRMWARE_SLOT]) == errno.EPERM


# 5. ENABLE after KVM_RUN


def test_enable_after_run_is_ebusy(a: Rig) -> None:
    [vcpu] = a.vcpus()
    a.firmware.write(0, guests.image("agent"))
    vcpu.set_reg("pc", FIRMWARE_IPA)
    vcpu.set_reg("sp_el1", FIRMWARE_IPA + FIRMWARE_BYTES)
    a.agent(vcpu)
    assert enable_cap(a.vm, ENABLE, [FIRMWARE_SLOT]) == errno.EBUSY


def test_enable_after_run_of_a_protected_vm_is_eperm_first(a: Rig) -> None:
    a.protected_agent()
    assert enable_cap(a.vm, ENABLE, [FIRMWARE_SLOT]) == errno.EPERM


# 6. The primary's state


def test_the_primary_starts_in_the_documented_state(a: Rig) -> None:
    vm = a.vm
    [vcpu] = a.vcpus()
    vm.protect(FIRMWARE_SLOT)
    for n in range(31):
        vcpu.set_reg(f"x{n}", 0x1111_0000_0000_0000 + n)
    lies = {"pc": RAM_IPA, "pstate": 0x3C4, "sp_el0": 0x66, "sp_el1": 0x77, "elr_el1": 0x88}
    for name, value in lies.items():
        vcpu.set_reg(name, value)
    for n in range(32):
        vcpu.set_reg(f"v{n}", (0xABCD << 64) + n)
    for register in vcpu.reg_list():
        if register & (0xFFFF << 16) == uapi.REG_ARM64_SYSREG:
            # some, such as MPIDR_EL1, are fixed and say so
            assert errno_of(vcpu.set_one_reg, register, 0x5555) in (0, errno.EINVAL)
    agent = a.agent(vcpu)
    state = agent.boot_state()
    assert state[:15] == tuple(0x1111_0000_0000_0000 + n for n in range(15))
    assert state[15:31] == (0,) * 16
    assert state[Boot.PC] == FIRMWARE_IPA
    assert state[Boot.SP] == FIRMWARE_IPA + FIRMWARE_BYTES
    assert state[Boot.CURRENT_EL] >> 2 == 1
    assert state[Boot.DAIF] == 0x3C0
    assert state[Boot.SPSEL] == 1
    assert state[Boot.NZCV] == 0
    assert state[Boot.SCTLR_EL1] == 0x00C5_0078
    assert state[Boot.MPIDR_EL1] == 0x8000_0000
    for word in (
        Boot.CPACR_EL1, Boot.VBAR_EL1, Boot.TCR_EL1, Boot.TTBR0_EL1, Boot.TTBR1_EL1, Boot.SP_EL0,
        Boot.ELR_EL1, Boot.SPSR_EL1, Boot.ESR_EL1, Boot.TPIDR_EL0, Boot.TPIDR_EL1,
        Boot.TPIDRRO_EL0, Boot.CONTEXTIDR_EL1, Boot.CNTKCTL_EL1, Boot.CNTV_CTL_EL0, Boot.PAR_EL1,
    ):  # fmt: skip
        assert state[word] == 0, word.name


def test_sp_is_sp_el1_and_simd_registers_are_zero(a: Rig) -> None:
    [vcpu] = a.vcpus()
    vcpu.set_reg("v3", 0xFEED)
    a.vm.protect(FIRMWARE_SLOT)
    agent = a.agent(vcpu)
    assert agent.boot_state()[Boot.SP_EL0] == 0
    assert agent.op(Op.V_GET, 3)[1:3] == (0, 0)


def test_the_primary_is_the_first_to_enter_not_vcpu_0(a: Rig) -> None:
    first, second = a.vm.create_vcpu(0), a.vm.create_vcpu(1)
    first.init(power_off=True)
    second.init()
    a.vm.protect(FIRMWARE_SLOT)
    second.set_reg("x0", 77)
    agent = a.agent(second, cpu=1)
    state = agent.boot_state()
    assert (state[0], state[Boot.PC]) == (77, FIRMWARE_IPA)
    assert state[Boot.MPIDR_EL1] == 0x8000_0001


def test_nothing_the_vmm_writes_after_the_start_reaches_the_guest(a: Rig) -> None:
    [vcpu] = a.vcpus()
    a.vm.protect(FIRMWARE_SLOT)
    agent = a.agent(vcpu)
    for name in ("pc", "sp_el1", "x5", "x30", "pstate"):
        vcpu.set_reg(name, 0xDEAD_0000)
    agent.store(RAM_IPA, 42)
    assert agent.load(RAM_IPA) == 42
    # and nothing of the guest's is readable
    agent.execute(0xD503_201F, x=(0x5EC7E7,) * 8)
    assert all(vcpu.get_reg(f"x{n}") != 0x5EC7E7 for n in range(31))


# 7. Secondaries


def test_a_secondary_without_power_off_is_eperm(a: Rig) -> None:
    primary, secondary = a.vcpus(2, power_off=False)
    a.vm.protect(FIRMWARE_SLOT)
    a.agent(primary)
    assert errno_of(secondary.run) == errno.EPERM
    assert errno_of(secondary.run) == errno.EPERM


def test_a_secondary_starts_by_cpu_on_only(a: Rig) -> None:
    primary, secondary = a.vcpus(2)
    a.vm.protect(FIRMWARE_SLOT)
    agent = a.agent(primary)
    # The VMM cannot start it: EL2 does not run a vCPU that the guest has not switched on.
    secondary.mp_state = uapi.MpState.RUNNABLE
    secondary.set_reg("pc", RAM_IPA)
    assert isinstance(secondary.run(), FailEntry)
    secondary.init(power_off=True)
    entry = agent.info()[Info.SECONDARY]
    assert agent.hvc(CPU_ON, 1, entry, 0xC0FFEE)[0] == 0
    other = a.agent(secondary, cpu=1)
    state = other.boot_state()
    assert (state[0], state[Boot.PC]) == (0xC0FFEE, entry)
    assert state[1:31] == (0,) * 30
    assert state[Boot.SCTLR_EL1] == 0x00C5_0078
    assert agent.hvc(CPU_ON, 1, entry, 0)[0] == -4 & (1 << 64) - 1
    other.store(RAM_IPA + PAGE, 7)
    assert agent.load(RAM_IPA + PAGE) == 7


# 8. No AArch32


def test_no_aarch32_vcpu(a: Rig) -> None:
    vcpu = a.vm.create_vcpu(0)
    features = (uapi.VcpuFeature.PSCI_0_2, uapi.VcpuFeature.EL1_32BIT)
    assert errno_of(vcpu.init, features=features) == errno.EINVAL


@pytest.mark.parametrize("spsr", [0x1D0, 0x1F0], ids=["A32", "T32"])
def test_a_guest_that_drops_to_aarch32_ends(a: Rig, spsr: int) -> None:
    a.vm.protect(FIRMWARE_SLOT)
    [vcpu] = a.vcpus()
    agent = a.agent(vcpu)
    # "ldr r0, [r0]" at the mailbox leaves the guest in AArch32 state, if nothing did before
    word = 0xE590_0000 if spsr == 0x1D0 else 0x6800_6800
    with pytest.raises(AgentExitError) as ended:
        agent.eret(spsr, word, x=(0x0B00_0000,))
    assert isinstance(ended.value.exit, FailEntry)
    assert errno_of(vcpu.run) == errno.ENOEXEC
    assert errno_of(vcpu.run) == errno.ENOEXEC


# 9 and 10. INFO


def test_info_writes_64_bytes(a: Rig) -> None:
    a.ram.write(0, b"\xff" * 128)
    assert enable_cap(a.vm, INFO, [a.ram.address]) == 0
    size = -(-len(guests.image("agent")) // PAGE) * PAGE
    assert a.ram.read(0, 128) == struct.pack("<8Q", size, *[0] * 7) + b"\xff" * 64
    a.vm.protect(FIRMWARE_SLOT)
    assert a.vm.protected_vm_info().firmware_size == size


def test_info_without_firmware() -> None:
    with rig(firmware=b"") as made:
        assert made.vm.protected_vm_info() == (0, 0)


@pytest.mark.parametrize("address", [0, 8, 1 << 63, 2**64 - 8])
def test_info_with_a_bad_pointer_is_efault(a: Rig, address: int) -> None:
    assert enable_cap(a.vm, INFO, [address]) == errno.EFAULT


def test_info_at_the_end_of_a_mapping_is_efault(a: Rig) -> None:
    last = a.kvm.mmap(PAGE)
    assert enable_cap(a.vm, INFO, [last.address + PAGE - 32]) in (0, errno.EFAULT)
    last.close()
    assert enable_cap(a.vm, INFO, [last.address]) == errno.EFAULT


def test_info_into_memory_that_the_guest_owns_is_efault(a: Rig) -> None:
    a.vm.protect(FIRMWARE_SLOT)
    assert enable_cap(a.vm, INFO, [a.ram.address]) == errno.EFAULT


@pytest.mark.parametrize("size", [8, 16, 24, 64, 65, 200, PAGE])
def test_info_with_a_size(a: Rig, size: int) -> None:
    a.ram.write(0, b"\xff" * 2 * PAGE)
    assert enable_cap(a.vm, INFO, [a.ram.address, size]) == 0
    firmware = -(-len(guests.image("agent")) // PAGE) * PAGE
    whole = struct.pack("<8Q", firmware, 64, *[0] * 6)
    expected = (whole + bytes(max(0, size - 64)))[:size]
    assert a.ram.read(0, 2 * PAGE) == expected + b"\xff" * (2 * PAGE - size)


def test_info_with_a_size_that_leaves_the_mapping_is_efault_and_writes_nothing(a: Rig) -> None:
    memory = a.kvm.mmap(PAGE)
    memory.write(0, b"\xff" * PAGE)
    assert enable_cap(a.vm, INFO, [memory.address, 1 << 40]) == errno.EFAULT
    assert enable_cap(a.vm, INFO, [memory.address, 2**64 - 1]) == errno.EFAULT


# 11. The firmware comes from the host's firmware

REGION = RAM_BASE + (16 << 20)


def host_tree(**changes: object) -> bytes:
    """A host device tree whose firmware node is right but for `changes`: base, size, no_map,
    reusable, twice."""
    tree = fdt.Tree()
    tree.root.set_u32("#address-cells", 2)
    tree.root.set_u32("#size-cells", 2)
    reserved = tree.root.add("reserved-memory")
    reserved.set_u32("#address-cells", 2)
    reserved.set_u32("#size-cells", 2)
    reserved.set_empty("ranges")
    base, size = changes.get("base", REGION), changes.get("size", 64 << 10)
    assert isinstance(base, int)
    assert isinstance(size, int)
    for count in range(2 if changes.get("twice") else 1):
        node = reserved.add(f"firmware@{base + (count << 20):x}")
        node.set_strings("compatible", FIRMWARE_COMPATIBLE)
        node.set_u64("reg", base + (count << 20), size)
        if changes.get("no_map", True):
            node.set_empty("no-map")
        if changes.get("reusable"):
            node.set_empty("reusable")
    return fdt.build(tree)


class Messages(CountingRecorder):
    """Keeps what kernels print."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def record(self, event: Event, /) -> None:
        if isinstance(event, Message):
            self.lines.append(event.text)
        super().record(event)


def test_the_firmware_comes_from_the_reserved_memory_node() -> None:
    with rig(host_dtb=host_tree(), firmware=guests.image("agent")) as made:
        assert made.vm.protected_vm_info().firmware_size == 64 << 10
        made.protected_agent()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"no_map": False}, "no-map"),
        ({"reusable": True}, "reusable"),
        ({"base": REGION + 8}, "page-aligned"),
        ({"size": (64 << 10) + 1}, "pages"),
        ({"size": 0}, "pages"),
        ({"base": 0x1000}, "RAM"),
    ],
)
def test_a_malformed_node_is_ignored_with_a_reason(changes: dict[str, object], word: str) -> None:
    recorder = Messages()
    with rig(host_dtb=host_tree(**changes), recorder=recorder) as made:
        assert made.vm.protected_vm_info().firmware_size == 0
        assert enable_cap(made.vm, ENABLE, [FIRMWARE_SLOT]) == errno.EINVAL
    assert any("ignoring" in line and word in line for line in recorder.lines), recorder.lines


def test_the_first_of_two_nodes_counts() -> None:
    recorder = Messages()
    with rig(host_dtb=host_tree(twice=True), recorder=recorder) as made:
        assert made.vm.protected_vm_info().firmware_size == 64 << 10
    assert any("registered already" in line for line in recorder.lines)


def test_a_node_on_a_host_not_in_protected_mode_is_ignored() -> None:
    recorder = Messages()
    with rig(host_dtb=host_tree(), recorder=recorder, protected=False) as made:
        assert made.kvm.check_extension(199) == 0
    assert any("protected mode" in line for line in recorder.lines)


@pytest.mark.parametrize("length", [0, 10, 100])
def test_a_broken_host_tree_is_ignored_with_a_message(length: int) -> None:
    recorder = Messages()
    with rig(host_dtb=host_tree()[:length], recorder=recorder) as made:
        assert made.vm.protected_vm_info().firmware_size == 0
    assert any("device tree cannot be read" in line for line in recorder.lines)


def test_neither_host_nor_device_reads_the_firmware_region_or_el2s_memory() -> None:
    with running_system(host_dtb=host_tree()) as system:
        bus = system.machine.host_bus
        assert system.machine.smmu is not None
        device = system.machine.smmu.master(DMA_STREAM, "probe")
        base, size = system.hyp.mem.carveout
        for start, length in ((REGION, 64 << 10), (base, size)):
            for page in range(start, start + length, PAGE):
                for master in (bus, device):
                    with pytest.raises(Stage2Fault):
                        master.read(page + 16, 8)
                    with pytest.raises(Stage2Fault):
                        master.write(page + 16, b"\0" * 8)
        assert bus.read(DMA_BASE + 0x20, 8) == bytes(8)  # the host's own devices it reaches


# 12. close


def closing(made: Rig, order: str) -> None:
    vcpu = made.vm.create_vcpu(0)
    vcpu.init()
    made.ram.write(PAGE, b"private" * 10)
    made.ram.write(2 * PAGE, b"shared!" * 10)
    made.vm.protect(FIRMWARE_SLOT)
    agent = made.agent(vcpu)
    assert agent.hvc(MEM_SHARE, RAM_IPA + 2 * PAGE, 1, 0)[:2] == (0, 1)
    made.ram.write(2 * PAGE, b"S")
    closers = {"vm": made.vm.close, "vcpu": vcpu.close, "kvm": made.kvm.close}
    for name in order.split():
        closers[name]()
    assert made.system.census().guest == {"owned": 0, "shared_with_host": 0}
    assert made.ram.read(PAGE, 70) == bytes(70)
    assert made.ram.read(2 * PAGE, 70) == b"Shared!" + b"shared!" * 9
    assert made.firmware.read(0, FIRMWARE_BYTES) == bytes(FIRMWARE_BYTES)
    assert made.ram.read(3 * PAGE, RAM_BYTES - 3 * PAGE) == bytes(RAM_BYTES - 3 * PAGE)


@pytest.mark.parametrize("order", ["vm vcpu", "vcpu vm", "kvm vm vcpu", "vcpu kvm vm"])
def test_pages_come_back_when_the_last_descriptor_goes(a: Rig, order: str) -> None:
    closing(a, order)


def test_memory_unmapped_by_the_vmm_stays_the_guests(a: Rig) -> None:
    agent = a.protected_agent()
    agent.store(RAM_IPA + 8, 99)
    a.ram.close()
    agent.store(RAM_IPA + 16, agent.load(RAM_IPA + 8) + 1)
    assert agent.load(RAM_IPA + 16) == 100


def test_system_off_ends_the_run(a: Rig) -> None:
    agent = a.protected_agent()
    with pytest.raises(AgentExitError) as ended:
        agent.hvc(SYSTEM_OFF)
    assert isinstance(ended.value.exit, SystemEvent)
    assert ended.value.exit.kind == "shutdown"


def test_255_vms_then_enomem() -> None:
    with System(memory=64 << 20) as system, system.open() as kvm:
        vms = [kvm.create_vm() for _ in range(255)]
        assert errno_of(kvm.create_vm) == errno.ENOMEM
        vms.pop().close()
        kvm.create_vm().close()
        for vm in vms:
            vm.close()
