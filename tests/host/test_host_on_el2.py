# SPDX-License-Identifier: GPL-2.0-or-later
"""The host on the real EL2 and CPU: threads, closes, virtual time, hostile input, no page lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.contract_rig import RAM_BYTES, RAM_IPA, Rig, errno_of, rig, running_system
from pkvm import events, guests
from pkvm.check.invariants import check_hyp
from pkvm.guests.agent import Agent, MmioExit
from pkvm.kvm import Vcpu
from pkvm.kvm.kernel import Memory, RunPage
from pkvm.system import ClockName, System
from pkvm.uapi import kvm as uapi
from pkvm.vmm.board import Board
from pkvm.vmm.loader import load_image
from pkvm.vmm.vmm import Vmm

EINTR, EBADF, EINVAL = 4, 9, 22
PAGE = 4096
BLOCK = 2 << 20
TIMEOUT_S = 30
SPIN = (0x1400_0000).to_bytes(4, "little")
"""b ."""
DEVICE = 0x0A00_0000


def start(body: Callable[..., object], *args: object) -> threading.Thread:
    thread = threading.Thread(target=body, args=args, daemon=True)
    thread.start()
    return thread


def join(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "a KVM_RUN hangs"


def spinning(made: Rig, count: int) -> list[int]:
    """`count` vCPUs of a non-protected VM that run in circles; their descriptors."""
    made.ram.write(0, SPIN)
    vcpus = made.vcpus(count, power_off=False)
    for vcpu in vcpus:
        vcpu.set_reg("pc", RAM_IPA)
    return [vcpu.fd for vcpu in vcpus]


# Threads


@pytest.mark.parametrize("clock", ["real", "virtual"])
def test_vcpus_share_the_cpu_and_other_threads_get_in(clock: ClockName) -> None:
    with rig(clock=clock) as made:
        kernel = made.system.kernel
        fds = spinning(made, 3)
        results: list[int] = []
        threads = [
            start(lambda fd=fd: results.append(errno_of(kernel.ioctl, fd, uapi.Ioctl.RUN)))
            for fd in fds
        ]
        for _ in range(20):
            assert made.kvm.check_extension(uapi.Cap.USER_MEMORY) == 1
            assert made.ram.read(0, 4) == SPIN
        while any(thread.is_alive() for thread in threads):
            for fd in fds:
                kernel.kick(fd)
            threads[0].join(0.01)
        join(*threads)
        assert results == [EINTR] * 3


@pytest.mark.parametrize("protected", [True, False])
@pytest.mark.parametrize("clock", ["real", "virtual"])
def test_everything_closed_in_the_middle_of_runs(clock: ClockName, protected: bool) -> None:
    with running_system(clock=clock, firmware=SPIN) as system, system.open() as kvm:
        vm = kvm.create_vm()
        ram, firmware = kvm.mmap(RAM_BYTES), kvm.mmap(BLOCK)
        vm.set_user_memory_region(0, RAM_IPA, ram)
        vm.set_user_memory_region(1, 0, firmware)
        firmware.write(0, SPIN)
        if protected:
            vm.protect(1)
        vcpus = [vm.create_vcpu(index) for index in range(3)]
        for vcpu in vcpus:
            vcpu.init(power_off=vcpu.id == 2)
        primary_enters = threading.Event()
        threads = []
        for vcpu in vcpus:
            threads.append(start(errno_of, system.kernel.ioctl, vcpu.fd, uapi.Ioctl.RUN))
            primary_enters.wait(0.02)
        ram.close()
        vm.close()
        for vcpu in vcpus:
            vcpu.close()
        firmware.close()
        join(*threads)


def test_closing_a_vm_and_one_vcpu_leaves_the_other_running() -> None:
    with rig() as made:
        kernel = made.system.kernel
        fds = spinning(made, 2)
        gone = start(errno_of, kernel.ioctl, fds[1], uapi.Ioctl.RUN)
        stays = start(errno_of, kernel.ioctl, fds[0], uapi.Ioctl.RUN)
        kernel.close(made.vm.fd)
        kernel.close(fds[1])
        join(gone)
        stays.join(0.05)
        assert stays.is_alive()
        while stays.is_alive():
            kernel.kick(fds[0])
            stays.join(0.01)
        kernel.open("/dev/kvm")  # takes the number that `made.vm` will close


# Virtual time


class Log:
    def __init__(self) -> None:
        self.events: list[events.Event] = []

    def record(self, event: events.Event, /) -> None:
        self.events.append(event)


def smp_run(protected: bool) -> list[events.Event]:
    log = Log()
    with System(64 << 20, clock="virtual", recorder=log) as system, system.open() as kvm:
        board = Board(ram_bytes=8 << 20, cpus=3, command_line="quiet")
        vmm = Vmm(
            kvm,
            board,
            load_image(guests.image("smp"), board),
            protected=protected,
            firmware=None if protected else guests.image("firmware"),
            console=lambda data: None,
        )
        assert vmm.run(timeout=TIMEOUT_S).kind == "powered-off"
        vmm.close()
    return log.events


@pytest.mark.parametrize("protected", [True, False])
def test_with_the_virtual_clock_threads_make_no_difference(protected: bool) -> None:
    first = smp_run(protected)
    for _ in range(3):
        assert smp_run(protected) == first


# Non-protected guests


@pytest.fixture
def agent() -> Iterator[tuple[Rig, Agent, Vcpu]]:
    """The agent in a vCPU of a non-protected VM."""
    with rig() as made:
        made.firmware.write(0, guests.image("agent"))
        [vcpu] = made.vcpus()
        vcpu.set_reg("pc", 0x1_0000_0000)
        vcpu.set_reg("sp_el1", 0x1_0000_0000 + BLOCK)
        driver = Agent(vcpu, on_mmio=lambda mmio: 0x8182_8384_8586_8788)
        driver.start()
        yield made, driver, vcpu


@pytest.mark.parametrize(("size", "value"), [(1, 0x88), (2, 0x8788), (4, 0x8586_8788)])
def test_mmio_loads_of_a_non_protected_guest(
    agent: tuple[Rig, Agent, Vcpu], size: int, value: int
) -> None:
    _, driver, _ = agent
    assert driver.load(DEVICE, size) == value
    sign = (1 << 64) - (1 << 8 * size)
    assert driver.load(DEVICE, size, signed=True) == value | sign


def test_registers_of_a_non_protected_guest_are_the_vmms_to_read(
    agent: tuple[Rig, Agent, Vcpu],
) -> None:
    made, driver, vcpu = agent
    assert vcpu.get_reg("pc") >> 32 == 1
    assert vcpu.get_reg("pstate") & 0xF == 5
    driver.store(RAM_IPA + 0x3000, 77)
    assert made.ram.read(0x3000, 1) == b"M"
    made.ram.write(0x3000, b"N")
    assert driver.load(RAM_IPA + 0x3000, 1) == ord("N")


def test_a_slot_comes_and_goes_under_a_running_guest(agent: tuple[Rig, Agent, Vcpu]) -> None:
    made, driver, _ = agent
    memory = made.kvm.mmap(BLOCK)
    memory.write(8, b"slot")
    address = 0x8000_0000
    assert driver.load(address + 8, 4) == 0x8586_8788
    made.vm.set_user_memory_region(7, address, memory)
    assert driver.load(address + 8, 4) == int.from_bytes(b"slot", "little")
    made.vm.set_user_memory_region(7, address + BLOCK, memory)
    assert driver.load(address + 8, 4) == 0x8586_8788
    assert driver.load(address + BLOCK + 8, 4) == int.from_bytes(b"slot", "little")
    made.check()
    made.vm.set_user_memory_region(7, 0, None)
    assert driver.load(address + BLOCK + 8, 4) == 0x8586_8788
    made.check()
    memory.close()


def test_stores_to_a_readonly_slot_are_mmio_and_loads_are_not(
    agent: tuple[Rig, Agent, Vcpu],
) -> None:
    made, driver, _ = agent
    memory = made.kvm.mmap(PAGE)
    memory.write(0, b"rom!")
    made.vm.set_user_memory_region(7, 0x8000_0000, memory, flags=uapi.MemFlag.READONLY)
    seen: list[tuple[int, int]] = []

    def observe(mmio: MmioExit) -> int:
        seen.append((mmio.address, mmio.data))
        return 0

    driver.on_mmio = observe
    assert driver.load(0x8000_0000, 4) == int.from_bytes(b"rom!", "little")
    driver.store(0x8000_0010, 5)
    assert seen == [(0x8000_0010, 5)]
    assert memory.read(0x10, 1) == b"\0"


def test_two_vms_share_the_same_memory() -> None:
    with rig() as made:
        kernel = made.system.kernel
        spinning(made, 1)
        with made.kvm.create_vm() as other:
            other.set_user_memory_region(0, RAM_IPA, made.ram)
            vcpu = other.create_vcpu(0)
            vcpu.init()
            vcpu.set_reg("pc", RAM_IPA)
            for fd in (vcpu.fd, vcpu.fd - 3):
                thread = start(errno_of, kernel.ioctl, fd, uapi.Ioctl.RUN)
                while thread.is_alive():
                    if not errno_of(kernel.kick, fd):
                        thread.join(0.01)
            made.check()
            vcpu.close()


# Hostile input

_REQUESTS = [int(request) for request in uapi.Ioctl] + [uapi.DmaCopy.COPY, 0xAEFF, 0x5401]
_WORDS = st.one_of(
    st.integers(0, 8),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([1 << 63, (1 << 64) - 1, PAGE, RAM_IPA, 199, 5, 1 << 31, uapi.reg_x(3)]),
)


class Target:
    """A system with one descriptor of each kind, and everything that comes out of it."""

    def __init__(self, system: System, protect: bool) -> None:
        self.kernel = system.kernel
        kvm = self.kernel.open("/dev/kvm")
        vm = self.kernel.ioctl(kvm, uapi.Ioctl.CREATE_VM)
        vcpu = self.kernel.ioctl(vm, uapi.Ioctl.CREATE_VCPU, 0)
        dma = self.kernel.open("/dev/dma-copy")
        self.fds = [kvm, vm, vcpu, dma]
        self.memory: list[Memory] = [self.kernel.mmap(BLOCK), self.kernel.mmap(3 * PAGE)]
        self.pages: list[RunPage] = [self.kernel.mmap_vcpu(vcpu, uapi.VCPU_MMAP_SIZE)]
        self.pages[0].view[uapi.Run.IMMEDIATE_EXIT] = 1
        for slot, (ipa, memory) in enumerate(zip((0, RAM_IPA), self.memory, strict=True)):
            self.slot(vm, slot, ipa, memory)
        if protect:
            words = (uapi.Cap.ARM_PROTECTED_VM, uapi.ProtectedVm.ENABLE, 0, 0, 0, 0)
            buffer = bytearray(uapi.ENABLE_CAP.pack(*words))
            assert self.kernel.ioctl(vm, uapi.Ioctl.ENABLE_CAP, buffer) == 0

    def slot(self, vm: int, number: int, ipa: int, memory: Memory) -> None:
        region = uapi.MEMORY_REGION.pack(number, 0, ipa, memory.length, memory.address)
        self.kernel.ioctl(vm, uapi.Ioctl.SET_USER_MEMORY_REGION, bytearray(region))

    def address(self, word: int) -> int:
        """Sometimes a good address, else the word itself."""
        if word % 3 == 0:
            memory = self.memory[word // 3 % len(self.memory)]
            return memory.address + word // 7 % memory.length
        return word

    def argument(self, words: list[int], length: int) -> bytearray:
        """A structure of these words, cut or padded."""
        data = b"".join(self.address(word).to_bytes(8, "little") for word in words)
        return bytearray(data[:length].ljust(length, b"\0"))

    def call(self, fd: int, request: int, argument: int | bytearray) -> None:
        """One ioctl; it may fail, with OSError only. What it opens is fair game afterwards."""
        try:
            result = self.kernel.ioctl(fd, request, argument)
        except OSError as error:
            if not error.errno or not error.strerror:
                raise AssertionError("an error without errno or words") from error
            return
        if request in (uapi.Ioctl.CREATE_VM, uapi.Ioctl.CREATE_VCPU):
            self.fds.append(result)
        if request == uapi.Ioctl.CREATE_VCPU:
            page = self.kernel.mmap_vcpu(result, uapi.VCPU_MMAP_SIZE)
            page.view[uapi.Run.IMMEDIATE_EXIT] = 1
            self.pages.append(page)


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[System]:
    with running_system(memory=32 << 20) as system:
        yield system


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    protect=st.booleans(),
    calls=st.lists(
        st.tuples(
            st.integers(-2, 12),
            st.one_of(st.sampled_from(_REQUESTS), st.integers(-(1 << 40), 1 << 40)),
            st.one_of(_WORDS, st.integers(-(1 << 70), 1 << 70), st.lists(_WORDS, max_size=14)),
            st.integers(0, 112),
        ),
        max_size=25,
    ),
    closes=st.lists(st.integers(0, 12), max_size=6),
)
def test_any_ioctl_on_any_descriptor_raises_nothing_but_oserror_and_loses_nothing(
    fuzzed: System,
    protect: bool,
    calls: list[tuple[int, int, int | list[int], int]],
    closes: list[int],
) -> None:
    free = fuzzed.host.free_pages
    before = fuzzed.census()
    target = Target(fuzzed, protect)
    for at, request, argument, length in calls:
        fd = target.fds[at] if 0 <= at < len(target.fds) else at
        if isinstance(argument, list):
            target.call(fd, request, target.argument(argument, length))
        else:
            target.call(fd, request, argument)
    for at in closes:
        errno_of(target.kernel.close, at)
    for fd in target.fds:
        assert errno_of(target.kernel.close, fd) in (0, EBADF)
    for page in target.pages:
        page.close()
    for memory in target.memory:
        memory.close()
    assert check_hyp(fuzzed.hyp) == []
    assert fuzzed.census() == before
    assert fuzzed.host.free_pages == free


@settings(max_examples=25, deadline=None)
@given(
    registers=st.lists(st.integers(0, (1 << 64) - 1), min_size=31, max_size=31),
    code=st.binary(min_size=64, max_size=256),
    pstate=st.sampled_from([0x3C5, 0x3C4, 0x3C0, 0x5]),
)
def test_any_guest_code_in_any_state_is_stopped_by_a_kick(
    registers: list[int], code: bytes, pstate: int
) -> None:
    with rig(memory=32 << 20, clock="virtual") as made:
        [vcpu] = made.vcpus()
        made.ram.write(0, code)
        for number, value in enumerate(registers):
            vcpu.set_reg(f"x{number}", value)
        vcpu.set_reg("pc", RAM_IPA)
        vcpu.set_reg("pstate", pstate)
        done = threading.Event()

        def body() -> None:
            for _ in range(20):
                if errno_of(made.system.kernel.ioctl, vcpu.fd, uapi.Ioctl.RUN):
                    break
            done.set()

        thread = start(body)
        done.wait(0.01)
        while thread.is_alive():
            vcpu.kick()
            thread.join(0.005)
        made.check()


def test_a_closed_vcpu_that_another_thread_waits_for_is_ebadf() -> None:
    with rig() as made:
        kernel = made.system.kernel
        [fd] = spinning(made, 1)
        run = start(errno_of, kernel.ioctl, fd, uapi.Ioctl.RUN)
        result: list[int] = []
        while made.system.host._sched._guest is None:
            run.join(0.001)
        state = partial(errno_of, kernel.ioctl, fd, uapi.Ioctl.GET_MP_STATE, bytearray(4))
        other = start(lambda: result.append(state()))
        other.join(0.05)
        kernel.close(fd)
        join(run, other)
        assert result == [EBADF]
        assert kernel.open("/dev/kvm") == fd  # what `made` will close as the vCPU
