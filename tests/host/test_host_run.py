# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_RUN on a scripted EL2: exits, MMIO, faults, PSCI, kicks and closes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from host_fakes import BLOCK, PAGE, FakeVcpu, Guest, Rig, errno_of

from pkvm.arm64 import psci
from pkvm.arm64.esr import EC, EC_SHIFT, IL, ISV, SAS_SHIFT, SF, SRT_SHIFT, SSE, WNR
from pkvm.arm64.registers import SCTLR_EE
from pkvm.arm64.smccc import VENDOR_HYP_UID, Function
from pkvm.host.firmware_node import FirmwareRegion
from pkvm.hyp.abi import ExitCode, HostCall, HostVcpu, HypRequest, VcpuFlag
from pkvm.uapi import kvm as uapi

EPERM, EINTR, ENOEXEC, ENOMEM, EFAULT, EINVAL = 1, 4, 8, 12, 14, 22
POWER_OFF = uapi.VcpuFeature.POWER_OFF
RAM_IPA = 0x4000_0000
DEVICE = 0x0900_0000
HVC = EC.HVC64 << EC_SHIFT | IL
MASK64 = (1 << 64) - 1
TIMEOUT_S = 20


class Machine:
    """A VM with RAM at RAM_IPA; `guests` are its vCPUs' programs."""

    def __init__(self, *guests: Guest, protected: bool = True, off: bool = True) -> None:
        self.rig = Rig(firmware=FirmwareRegion(0x9000_0000, PAGE))
        self.free = self.rig.kernel.free_pages
        rig = self.rig
        self.vm = rig.vm()
        self.ram = rig.kernel.mmap(2 * BLOCK)
        self.fw = rig.kernel.mmap(PAGE)
        rig.slot(self.vm, 0, RAM_IPA, 2 * BLOCK, self.ram.address)
        rig.slot(self.vm, 1, 0, PAGE, self.fw.address)
        self.vcpus = [
            rig.vcpu(self.vm, index, *([POWER_OFF] if index and off else []))
            for index in range(len(guests))
        ]
        self.pages = [rig.kernel.mmap_vcpu(fd, uapi.VCPU_MMAP_SIZE) for fd in self.vcpus]
        if protected:
            rig.cap(self.vm, uapi.ProtectedVm.ENABLE, 1)
        rig.el2.guests.update(enumerate(guests))

    def run(self, index: int = 0) -> int:
        """KVM_RUN; the exit reason."""
        assert self.rig.run(self.vcpus[index]) == 0
        return self.reason(index)

    def reason(self, index: int = 0) -> int:
        return int.from_bytes(self.pages[index].view[8:12], "little")

    def mmio(self, index: int = 0) -> tuple[int, bytes, int, int]:
        address, data, size, is_write = uapi.Run.MMIO.unpack_from(self.pages[index].view, 32)
        return address, data, size, is_write

    def answer(self, data: bytes) -> None:
        self.pages[0].view[40 : 40 + len(data)] = data

    def close(self) -> None:
        for page in self.pages:
            page.close()
        for fd in (self.vm, *self.vcpus):
            self.rig.kernel.close(fd)
        self.ram.close()
        self.fw.close()
        assert self.rig.kernel.free_pages == self.free
        assert not self.rig.bus.lost
        assert not self.rig.el2.vms


def dabt(
    ipa: int, size: int = 2, *, write: bool = False, isv: bool = True, more: int = 0
) -> dict[str, int]:
    esr = EC.DABT_LOW << EC_SHIFT | IL | 0x07 | more
    if isv:
        esr |= ISV | size << SAS_SHIFT
    if write:
        esr |= WNR
    return {"esr": esr, "far": ipa & 0xFFF, "hpfar": ipa >> 12 << 4}


def test_an_mmio_store_comes_out_and_the_next_run_steps_over_it() -> None:
    seen: list[int] = []

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield vcpu.publish(x0=0x1122_3344_5566_7788, **dabt(DEVICE + 0x18, 1, write=True))
        seen.append(vcpu.read(HostVcpu.FLAGS))
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
        seen.extend((vcpu.read(HostVcpu.FLAGS), vcpu.read(HostVcpu.X)))
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
        assert vcpu.read(HostVcpu.X) == 0x0A0B_0C0D

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
        seen.extend((vcpu.read(HostVcpu.X + 56), vcpu.read(HostVcpu.FLAGS)))
        yield vcpu.publish(x0=3, **dabt(DEVICE, 1, more=31 << SRT_SHIFT))
        seen.extend((vcpu.read(HostVcpu.X), vcpu.read(HostVcpu.FLAGS)))
        yield vcpu.publish(x9=0x77, **dabt(DEVICE, 0, write=True, more=9 << SRT_SHIFT))
        yield vcpu.publish(x9=0x77, **dabt(DEVICE, 3, write=True, more=31 << SRT_SHIFT))

    machine = Machine(guest, protected=False)
    for _ in range(2):
        machine.run()
        machine.answer(answer)
    machine.run()
    both = VcpuFlag.INCREMENT_PC | VcpuFlag.DIRTY
    assert seen == [expected, both, 3, VcpuFlag.INCREMENT_PC]
    assert machine.mmio()[1][0] == 0x77
    machine.run()
    assert machine.mmio()[1] == bytes(8)
    machine.close()


@pytest.mark.parametrize("protected", [False, True])
def test_what_cannot_be_emulated_is_an_external_abort(protected: bool) -> None:
    seen: list[int] = []
    fetch = {**dabt(DEVICE), "esr": EC.IABT_LOW << EC_SHIFT | IL | 7}
    exits = [dabt(DEVICE, isv=False), dabt(DEVICE, more=1 << 7), fetch]
    if protected:
        exits += [dabt(RAM_IPA), {**fetch, "hpfar": RAM_IPA >> 8}]

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        for one in exits:
            yield vcpu.publish(**one)
            seen.append(vcpu.read(HostVcpu.FLAGS) & ~VcpuFlag.DIRTY)

    machine = Machine(guest, protected=protected)
    assert errno_of(machine.run) == EINVAL
    assert seen == [VcpuFlag.PENDING_EXCEPTION] * len(exits)
    machine.close()


def test_immediate_exit_finishes_the_mmio_first() -> None:
    seen: list[int] = []

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield vcpu.publish(**dabt(DEVICE, 0))
        seen.append(vcpu.read(HostVcpu.X))

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


def test_a_shared_page_outlives_its_mapping() -> None:
    machine = Machine(touching(RAM_IPA), protected=False)
    assert errno_of(machine.run) == EINVAL
    free = machine.rig.kernel.free_pages
    machine.ram.close()
    assert machine.rig.kernel.free_pages == free
    machine.close()


# Guest calls


def calls(*arguments: tuple[int, ...], esr: int = HVC) -> tuple[Guest, list[tuple[int, ...]]]:
    """A non-protected guest that makes calls, and their results."""
    results: list[tuple[int, ...]] = []

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        for one in arguments:
            words = {f"x{n}": value for n, value in enumerate((*one, 0, 0, 0)[:4])}
            yield vcpu.publish(esr=esr, **words)
            results.append(tuple(vcpu.read(HostVcpu.X + 8 * n) for n in range(4)))

    return guest, results


def test_smccc_and_psci_of_a_non_protected_guest() -> None:
    features = psci.Function.PSCI_FEATURES
    table: list[tuple[tuple[int, ...], tuple[int, ...] | int]] = [
        ((Function.SMCCC_VERSION,), 0x1_0001),
        ((Function.VENDOR_UID,), VENDOR_HYP_UID),
        ((Function.KVM_FEATURES,), 1),
        ((Function.HYP_MEMINFO,), MASK64),
        ((Function.MEM_SHARE, RAM_IPA), MASK64),
        ((0xC600_00FF,), MASK64),
        ((psci.Function.PSCI_VERSION,), 0x1_0001),
        ((psci.Function.PSCI_VERSION | 1 << 40,), 0x1_0001),
        ((features, psci.Function.CPU_ON_64), 0),
        ((features, Function.SMCCC_VERSION), 0),
        ((features, psci.Function.SYSTEM_SUSPEND_64), psci.NOT_SUPPORTED),
        ((psci.Function.MIGRATE_INFO_TYPE,), 2),
        ((psci.Function.AFFINITY_INFO_64, 0), 0),
        ((psci.Function.AFFINITY_INFO_64, 1), 1),
        ((psci.Function.AFFINITY_INFO_64, 0, 3), 0),
        ((psci.Function.AFFINITY_INFO_64, 7), psci.INVALID_PARAMS),
        ((psci.Function.AFFINITY_INFO_64, 0, 4), psci.INVALID_PARAMS),
        ((psci.Function.AFFINITY_INFO_64, 1 << 31), psci.INVALID_PARAMS),
        ((psci.Function.CPU_ON_64, 0, 1, 2), psci.ALREADY_ON),
        ((psci.Function.CPU_ON_64, 9, 1, 2), psci.INVALID_PARAMS),
        ((psci.Function.CPU_ON_64, 1 << 31 | 1, 1, 2), psci.INVALID_PARAMS),
        ((psci.Function.SYSTEM_RESET2_64, 5), psci.INVALID_PARAMS),
    ]
    guest, results = calls(*(arguments for arguments, _ in table))
    machine = Machine(guest, lambda vcpu: iter(()), protected=False)
    assert errno_of(machine.run) == EINVAL
    for (arguments, expected), result in zip(table, results, strict=True):
        wanted = expected if isinstance(expected, tuple) else (expected, 0, 0, 0)
        assert result == wanted, hex(arguments[0])


def test_smc_is_as_hvc_but_for_its_immediate() -> None:
    smc = EC.SMC64 << EC_SHIFT | IL
    for immediate, expected in ((0, 0x1_0001), (1, MASK64)):
        guest, results = calls((Function.SMCCC_VERSION,), esr=smc | immediate)
        machine = Machine(guest, protected=False)
        assert errno_of(machine.run) == EINVAL
        assert results[0][0] == expected


@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize(
    ("function", "kind", "flags"),
    [
        (psci.Function.SYSTEM_OFF, uapi.SystemEvent.SHUTDOWN, 0),
        (psci.Function.SYSTEM_RESET, uapi.SystemEvent.RESET, 0),
        (psci.Function.SYSTEM_RESET2_64, uapi.SystemEvent.RESET, 1),
    ],
)
def test_the_system_ends_and_no_vcpu_runs_any_more(
    function: int, kind: int, flags: int, protected: bool
) -> None:
    guest, results = calls((function,))
    machine = Machine(guest, protected=protected)
    assert machine.run() == uapi.ExitReason.SYSTEM_EVENT
    event = uapi.Run.SYSTEM_EVENT.unpack_from(machine.pages[0].view, 32)
    assert event[:3] == (kind, 1, flags)
    assert machine.rig.get_reg(machine.vcpus[0], uapi.reg_x(0)) == psci.INTERNAL_FAILURE
    runs = threading.Thread(target=errno_of, args=(machine.run,))
    runs.start()
    runs.join(0.05)
    assert runs.is_alive(), "it waits, as a vCPU that is off does"
    while runs.is_alive():
        machine.rig.kernel.kick(machine.vcpus[0])
        runs.join(0.01)
    assert not results
    machine.close()


@pytest.mark.parametrize("protected", [False, True])
def test_cpu_on_wakes_the_thread_that_waits_in_kvm_run(protected: bool) -> None:
    order: list[str] = []
    seen: list[int] = []

    def first(vcpu: FakeVcpu) -> Iterator[int]:
        yield vcpu.publish(esr=HVC, x0=psci.Function.CPU_ON_64, x1=1, x2=0x5000, x3=77)
        order.append("on")
        seen.append(vcpu.read(HostVcpu.X))
        yield vcpu.publish(esr=HVC, x0=psci.Function.CPU_OFF)
        order.append("never")

    def second(vcpu: FakeVcpu) -> Iterator[int]:
        order.append("second")
        seen.extend(vcpu.read(HostVcpu.PC + at) for at in (0, 8))
        seen.append(vcpu.read(HostVcpu.X))
        yield vcpu.publish(**dabt(DEVICE, 0))

    machine = Machine(first, second, protected=protected)
    done: list[int] = []
    secondary = threading.Thread(target=lambda: done.append(machine.run(1)))
    secondary.start()
    primary = threading.Thread(target=errno_of, args=(machine.run,))
    primary.start()
    secondary.join(TIMEOUT_S)
    assert done == [uapi.ExitReason.MMIO]
    assert sorted(order) == ["on", "second"]
    assert 0 in seen
    if not protected:
        assert {0x5000, 0x3C5, 77} <= set(seen)
    while primary.is_alive():
        machine.rig.kernel.kick(machine.vcpus[0])
        primary.join(0.01)
    state = bytearray(4)
    machine.rig.kernel.ioctl(machine.vcpus[0], uapi.Ioctl.GET_MP_STATE, state)
    assert state[0] == uapi.MpState.STOPPED
    machine.close()


def test_trapped_system_registers_are_undefined() -> None:
    seen: list[int] = []

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield vcpu.publish(esr=EC.SYS64 << EC_SHIFT | IL)
        seen.append(vcpu.read(HostVcpu.FLAGS))
        yield vcpu.publish(esr=EC.SVE << EC_SHIFT | IL)
        seen.append(vcpu.read(HostVcpu.FLAGS))

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
    while thread.is_alive():
        machine.rig.kernel.kick(machine.vcpus[0])
        thread.join(0.01)
    assert result == [EINTR]
    assert machine.reason() == uapi.ExitReason.INTR
    assert machine.run() == uapi.ExitReason.MMIO
    machine.close()


def test_wfe_goes_on() -> None:
    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield vcpu.publish(esr=EC.WFX << EC_SHIFT | IL | 1)
        assert vcpu.read(HostVcpu.FLAGS) == VcpuFlag.INCREMENT_PC
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
        seen.append(vcpu.read(HostVcpu.FLAGS))
        yield vcpu.publish(**dabt(DEVICE, 0))
        seen.append(vcpu.read(HostVcpu.X + 8 * 5))
        seen.append(vcpu.read(HostVcpu.FLAGS))

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
