# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_RUN on a scripted EL2: exits, MMIO, faults, kicks and closes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from fakes.host_fakes import BLOCK, PAGE, FakeVcpu, Guest, errno_of
from fakes.host_machine import DEVICE, RAM_IPA, TIMEOUT_S, Machine, dabt
from pkvm.arm64.esr import CM, EC, EC_SHIFT, IL, SF, SRT_SHIFT, SSE
from pkvm.arm64.registers import SCTLR_EE
from pkvm.host.files import VcpuFile
from pkvm.hyp.abi import ExitCode, HostCall, HostVcpu, HypRequest, VcpuFlag
from pkvm.uapi import kvm as uapi

EPERM, EINTR, ENOEXEC, ENOMEM, EFAULT, EINVAL, ENOSYS = 1, 4, 8, 12, 14, 22, 38
MASK64 = (1 << 64) - 1


def test_an_mmio_store_comes_out_and_the_next_run_steps_over_it() -> None:
    seen: list[int] = []

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield vcpu.publish(x0=0x1122_3344_5566_7788, **dabt(DEVICE + 0x18, 1, write=True))
        seen.append(vcpu.flags)
        yield vcpu.publish(x0=0x41, **dabt(DEVICE, 0, write=True))

    machine = Machine(guest)
    assert machine.run() == uapi.ExitReason.MMIO
    assert machine.mmio() == (DEVICE + 0x18, b"\x88\x77" + bytes(6), 2, 1)
    assert machine.run() == uapi.ExitReason.MMIO
    assert machine.mmio() == (DEVICE, b"A" + bytes(7), 1, 1)
    assert seen == [VcpuFlag.INCREMENT_PC]
    machine.close()


def test_an_mmio_load_gives_el2_the_zero_extended_data() -> None:
    seen: list[int] = []

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield vcpu.publish(**dabt(DEVICE, 1))
        seen.extend((vcpu.flags, vcpu.x0))
        yield ExitCode.ILLEGAL

    machine = Machine(guest)
    assert machine.run() == uapi.ExitReason.MMIO
    assert machine.mmio()[2:] == (2, 0)
    machine.answer(b"\xff\x80\xaa\xaa")
    assert errno_of(machine.run) == EINVAL
    assert seen == [VcpuFlag.INCREMENT_PC, 0x80FF]


@pytest.mark.parametrize(
    ("pstate", "endian", "big"),
    [(5, SCTLR_EE, True), (0, SCTLR_EE, False), (0, SCTLR_EE >> 1, True), (5, 0, False)],
)
def test_a_big_endian_guests_bytes_are_in_bus_order(pstate: int, endian: int, big: bool) -> None:
    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        more = {"pstate": pstate, "sctlr_ee": endian}
        yield vcpu.publish(x0=0x0102_0304, **more, **dabt(DEVICE, 2, write=True))
        yield vcpu.publish(**more, **dabt(DEVICE, 2))
        assert vcpu.x0 == 0x0A0B_0C0D

    machine = Machine(guest)
    machine.run()
    assert machine.mmio()[1][:4] == (b"\1\2\3\4" if big else b"\4\3\2\1")
    machine.run()
    machine.answer(b"\x0a\x0b\x0c\x0d" if big else b"\x0d\x0c\x0b\x0a")
    assert errno_of(machine.run) == EINVAL


@pytest.mark.parametrize(
    ("more", "answer", "expected"),
    [
        (SF, b"\xfe\xff", 0xFFFE),
        (SF | SSE, b"\xfe\xff", MASK64 - 1),
        (SSE, b"\xfe\xff", 0xFFFF_FFFE),
        (SF | SSE, b"\xfe\x7f", 0x7FFE),
    ],
)
def test_a_non_protected_load_fills_its_register(more: int, answer: bytes, expected: int) -> None:
    seen: list[int] = []

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield vcpu.publish(x7=5, **dabt(DEVICE, 1, more=more | 7 << SRT_SHIFT))
        seen.extend((vcpu.read(HostVcpu.X + 56), vcpu.flags))
        yield vcpu.publish(x0=3, **dabt(DEVICE, 1, more=31 << SRT_SHIFT))
        seen.extend((vcpu.read(HostVcpu.X), vcpu.flags))
        yield vcpu.publish(x9=0x77, **dabt(DEVICE, 0, write=True, more=9 << SRT_SHIFT))
        yield vcpu.publish(x9=0x77, **dabt(DEVICE, 3, write=True, more=31 << SRT_SHIFT))

    machine = Machine(guest, protected=False)
    for _ in range(2):
        machine.run()
        machine.answer(answer)
    machine.run()
    both = VcpuFlag.INCREMENT_PC | VcpuFlag.DIRTY_X
    assert seen == [expected, both, 3, VcpuFlag.INCREMENT_PC]
    assert machine.mmio()[1][0] == 0x77
    machine.run()
    assert machine.mmio()[1] == bytes(8)
    machine.close()


@pytest.mark.parametrize("protected", [False, True])
def test_what_cannot_be_emulated_is_an_external_abort(protected: bool) -> None:
    seen: list[int] = []
    fetch = {**dabt(DEVICE), "esr": EC.IABT_LOW << EC_SHIFT | IL | 7}
    exits = [dabt(DEVICE, more=1 << 7), fetch]
    if protected:
        exits += [dabt(DEVICE, isv=False), dabt(RAM_IPA), {**fetch, "hpfar": RAM_IPA >> 8}]

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        for one in exits:
            yield vcpu.publish(**one)
            seen.append(vcpu.flags & ~VcpuFlag.DIRTY)

    machine = Machine(guest, protected=protected)
    assert errno_of(machine.run) == EINVAL
    assert seen == [VcpuFlag.PENDING_EXCEPTION] * len(exits)
    machine.close()


def test_without_a_syndrome_a_plain_guest_stops_and_cache_maintenance_does_nothing() -> None:
    seen: list[int] = []

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield vcpu.publish(**dabt(DEVICE, isv=False, more=CM))
        seen.append(vcpu.flags)
        yield vcpu.publish(**dabt(DEVICE, isv=False))

    machine = Machine(guest, protected=False)
    assert errno_of(machine.run) == ENOSYS
    assert seen == [VcpuFlag.INCREMENT_PC]
    machine.close()


def test_immediate_exit_finishes_the_mmio_first() -> None:
    seen: list[int] = []

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield vcpu.publish(**dabt(DEVICE, 0))
        seen.append(vcpu.x0)

    machine = Machine(guest)
    machine.run()
    machine.answer(b"\x5a")
    machine.pages[0].view[1] = 1
    assert errno_of(machine.run) == EINTR
    assert machine.reason() == uapi.ExitReason.INTR
    machine.answer(b"\0")
    machine.pages[0].view[1] = 0
    assert errno_of(machine.run) == EINVAL
    assert seen == [0x5A]


def test_fail_entry_then_enoexec_until_init() -> None:
    machine = Machine(lambda vcpu: iter([ExitCode.ILLEGAL, ExitCode.IRQ, ExitCode.ILLEGAL]))
    for _ in range(2):
        assert errno_of(machine.run) == EINVAL
        assert machine.reason() == uapi.ExitReason.FAIL_ENTRY
        assert errno_of(machine.run) == ENOEXEC
        machine.rig.init(machine.vcpus[0])
    machine.close()


def test_run_takes_no_argument() -> None:
    machine = Machine(lambda vcpu: iter(()))
    assert errno_of(machine.rig.kernel.ioctl, machine.vcpus[0], uapi.Ioctl.RUN, 1) == EINVAL


def test_el2_gets_table_pages_when_it_asks() -> None:
    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        vcpu.publish(req_type=HypRequest.MEMCACHE, req_pages=3)
        yield ExitCode.HYP_REQ
        yield vcpu.publish(**dabt(DEVICE, 0))

    machine = Machine(guest)
    before = machine.rig.el2.vms[0x1000].memcache
    assert machine.run() == uapi.ExitReason.MMIO
    assert machine.rig.el2.vms[0x1000].memcache == before + 3
    machine.close()


# Memory of non-protected guests


def touching(*ipas: int) -> Guest:
    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        for ipa in ipas:
            yield vcpu.publish(**dabt(ipa))

    return guest


def test_faults_share_blocks_where_they_fit_and_pages_elsewhere() -> None:
    machine = Machine(touching(RAM_IPA + 0x1234, RAM_IPA + 5, 0x10), protected=False)
    machine.rig.el2.tables_needed = 2
    assert errno_of(machine.run) == EINVAL
    (vm,) = machine.rig.el2.vms.values()
    assert vm.shared == {RAM_IPA >> 12: (512, 7), 0: (1, 7)}
    machine.close()


def test_a_block_that_el2_refuses_is_shared_page_by_page() -> None:
    machine = Machine(touching(RAM_IPA + 0x1234, RAM_IPA + 5), protected=False)
    machine.rig.el2.refuse[HostCall.HOST_SHARE_GUEST] = EPERM
    assert errno_of(machine.run) == EINVAL
    (vm,) = machine.rig.el2.vms.values()
    assert vm.shared == {(RAM_IPA >> 12) + 1: (1, 7), RAM_IPA >> 12: (1, 7)}
    machine.close()


def test_a_readonly_slot_is_shared_without_write_and_its_stores_are_mmio() -> None:
    store = dabt(0x8000_0010, 3, write=True)
    denied = {**store, "esr": store["esr"] & ~0x3F | 0x0F}

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield vcpu.publish(**dabt(0x8000_0000))
        yield vcpu.publish(**denied)

    machine = Machine(guest, protected=False)
    machine.rig.slot(machine.vm, 5, 0x8000_0000, PAGE, machine.ram.address, uapi.MemFlag.READONLY)
    assert machine.run() == uapi.ExitReason.MMIO
    assert machine.mmio()[0] == 0x8000_0010
    (vm,) = machine.rig.el2.vms.values()
    assert vm.shared == {0x8000_0000 >> 12: (1, 5)}
    machine.close()


def test_a_fault_on_a_slot_without_memory_is_efault_and_can_be_repaired() -> None:
    machine = Machine(touching(0x8000_0000, 0x8000_0000), protected=False)
    machine.rig.slot(machine.vm, 5, 0x8000_0000, PAGE, 0x1000)
    assert errno_of(machine.run) == EFAULT
    machine.rig.slot(machine.vm, 5, 0, 0, 0)
    machine.rig.slot(machine.vm, 5, 0x8000_0000, PAGE, machine.ram.address)
    assert errno_of(machine.run) == EINVAL
    (vm,) = machine.rig.el2.vms.values()
    assert list(vm.shared) == [0x8000_0000 >> 12]
    machine.close()


def test_deleting_or_moving_a_slot_takes_its_pages_back() -> None:
    machine = Machine(touching(RAM_IPA, 0), protected=False)
    assert errno_of(machine.run) == EINVAL
    (vm,) = machine.rig.el2.vms.values()
    machine.rig.slot(machine.vm, 0, RAM_IPA + BLOCK, 2 * BLOCK, machine.ram.address)
    assert list(vm.shared) == [0]
    machine.rig.slot(machine.vm, 1, 0, 0, 0)
    assert not vm.shared
    machine.close()


def test_a_shared_page_goes_with_its_mapping() -> None:
    machine = Machine(touching(RAM_IPA, RAM_IPA), protected=False)
    assert errno_of(machine.run) == EINVAL
    (vm,) = machine.rig.el2.vms.values()
    assert vm.shared
    machine.ram.close()
    assert not vm.shared
    machine.close()


def test_trapped_system_registers_are_undefined() -> None:
    seen: list[int] = []

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield vcpu.publish(esr=EC.SYS64 << EC_SHIFT | IL)
        seen.append(vcpu.flags)
        yield vcpu.publish(esr=EC.SVE << EC_SHIFT | IL)
        seen.append(vcpu.flags)

    machine = Machine(guest)
    assert errno_of(machine.run) == EINVAL
    assert seen == [VcpuFlag.PENDING_EXCEPTION] * 2
    assert any("exception class" in text for text in machine.rig.log.messages())


# Who may run


def idle(vcpu: FakeVcpu) -> Iterator[int]:
    while True:
        yield vcpu.publish(**dabt(DEVICE, 0))


def test_the_first_to_enter_is_the_primary_and_other_vcpus_need_power_off() -> None:
    machine = Machine(idle, idle, idle, off=False)
    assert machine.run(1) == uapi.ExitReason.MMIO
    assert errno_of(machine.run, 0) == EPERM
    assert errno_of(machine.run, 2) == EPERM
    assert machine.run(1) == uapi.ExitReason.MMIO
    machine.close()


def test_an_interrupted_entry_makes_no_primary() -> None:
    machine = Machine(idle, idle, off=False)
    machine.pages[0].view[1] = 1
    assert errno_of(machine.run) == EINTR
    assert machine.run(1) == uapi.ExitReason.MMIO
    machine.pages[0].view[1] = 0
    assert errno_of(machine.run) == EPERM
    machine.close()


def test_non_protected_vcpus_all_run() -> None:
    machine = Machine(idle, idle, protected=False, off=False)
    for index in (0, 1, 1, 0):
        assert machine.run(index) == uapi.ExitReason.MMIO
    machine.close()


def test_a_vcpu_that_came_late_to_a_non_protected_vm_does_not_run() -> None:
    machine = Machine(idle, protected=False)
    machine.run()
    late = machine.rig.vcpu(machine.vm, 1)
    assert errno_of(machine.rig.run, late) == EINVAL
    assert machine.run() == uapi.ExitReason.MMIO
    machine.rig.kernel.close(late)
    machine.close()


# Waiting, kicks, closes


def waiting(vcpu: FakeVcpu) -> Iterator[int]:
    yield vcpu.publish(esr=EC.WFX << EC_SHIFT | IL)
    yield vcpu.publish(**dabt(DEVICE, 0))


def test_wfi_waits_for_a_kick_and_is_over_then() -> None:
    machine = Machine(waiting)
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(errno_of(machine.run)))
    thread.start()
    file = machine.rig.kernel._files[machine.vcpus[0]]
    assert isinstance(file, VcpuFile)
    # A kick before the guest's WFI would end KVM_RUN all the same, and the WFI would come later.
    while not file.vcpu.runner.asleep:
        thread.join(0.001)
    machine.rig.kernel.kick(machine.vcpus[0])
    thread.join()
    assert result == [EINTR]
    assert machine.reason() == uapi.ExitReason.INTR
    assert machine.run() == uapi.ExitReason.MMIO
    machine.close()


def test_wfe_goes_on() -> None:
    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield vcpu.publish(esr=EC.WFX << EC_SHIFT | IL | 1)
        assert vcpu.flags == VcpuFlag.INCREMENT_PC
        yield vcpu.publish(**dabt(DEVICE, 0))

    assert Machine(guest).run() == uapi.ExitReason.MMIO


def spinning(vcpu: FakeVcpu) -> Iterator[int]:
    """Runs until the host interrupts it."""
    while True:
        vcpu.el2.interrupted.wait(TIMEOUT_S)
        vcpu.el2.interrupted.clear()
        yield ExitCode.IRQ


def test_a_kick_ends_a_run_that_is_in_the_guest() -> None:
    machine = Machine(spinning)
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(errno_of(machine.run)))
    thread.start()
    while thread.is_alive():
        machine.rig.kernel.kick(machine.vcpus[0])
        thread.join(0.01)
    assert result == [EINTR]
    machine.close()


def test_other_threads_get_into_the_kernel_while_a_guest_spins() -> None:
    machine = Machine(spinning)
    thread = threading.Thread(target=errno_of, args=(machine.run,))
    thread.start()
    for _ in range(20):
        machine.rig.kernel.ioctl(machine.rig.kvm, uapi.Ioctl.GET_API_VERSION)
    machine.rig.kernel.kick(machine.vcpus[0])
    while thread.is_alive():
        machine.rig.kernel.kick(machine.vcpus[0])
        thread.join(0.01)
    machine.close()


@pytest.mark.parametrize("guest", [spinning, waiting])
def test_closing_everything_in_the_middle_of_a_run_loses_nothing(guest: Guest) -> None:
    machine = Machine(guest)
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(errno_of(machine.run)))
    thread.start()
    while not machine.rig.el2.loaded:
        thread.join(0.001)
    for page in machine.pages:
        page.close()
    for fd in (machine.vm, *machine.vcpus):
        machine.rig.kernel.close(fd)
    thread.join(TIMEOUT_S)
    assert result == [EINTR]
    machine.ram.close()
    machine.fw.close()
    assert machine.rig.kernel.free_pages == machine.free
    assert not machine.rig.bus.lost


def test_shutdown_ends_a_run_and_waits_for_it() -> None:
    machine = Machine(spinning)
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(errno_of(machine.run)))
    thread.start()
    while not machine.rig.el2.loaded:
        thread.join(0.001)
    machine.rig.kernel.shutdown()
    assert machine.rig.kernel.free_pages == machine.rig.pages_at_start
    thread.join(TIMEOUT_S)
    assert result == [EINTR]


def test_another_ioctl_of_a_vcpu_waits_for_its_run() -> None:
    machine = Machine(spinning)
    thread = threading.Thread(target=errno_of, args=(machine.run,))
    thread.start()
    while not machine.rig.el2.loaded:
        thread.join(0.001)
    answers: list[int] = []
    other = threading.Thread(
        target=lambda: answers.append(machine.rig.get_reg(machine.vcpus[0], uapi.REG_PSTATE))
    )
    other.start()
    other.join(0.05)
    assert other.is_alive()
    while thread.is_alive():
        machine.rig.kernel.kick(machine.vcpus[0])
        thread.join(0.01)
    other.join(TIMEOUT_S)
    assert len(answers) == 1


def test_el2s_refusal_to_run_is_its_errno() -> None:
    machine = Machine(idle)
    machine.rig.el2.refuse[HostCall.VCPU_RUN] = 95
    assert errno_of(machine.run) == 95
    assert machine.run() == uapi.ExitReason.MMIO


def test_guest_registers_reach_the_page_of_a_non_protected_vcpu() -> None:
    seen: list[int] = []

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        seen.append(vcpu.read(HostVcpu.X + 8 * 5))
        seen.append(vcpu.flags)
        yield vcpu.publish(**dabt(DEVICE, 0))
        seen.append(vcpu.read(HostVcpu.X + 8 * 5))
        seen.append(vcpu.flags)

    machine = Machine(guest, protected=False)
    fd = machine.vcpus[0]
    machine.rig.set_reg(fd, uapi.reg_x(5), 55)
    machine.run()
    machine.rig.set_reg(fd, uapi.reg_x(5), 66)
    assert machine.rig.get_reg(fd, uapi.reg_x(5)) == 66
    assert errno_of(machine.run) == EINVAL
    both = VcpuFlag.DIRTY | VcpuFlag.INCREMENT_PC
    assert seen[:3] == [55, VcpuFlag.DIRTY, 66]
    assert seen[3] == both
    syncs = [name for name, _ in machine.rig.el2.calls if name == "VCPU_SYNC_STATE"]
    assert len(syncs) == 1, "a dirty page is not synchronised"
