# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's own loads, stores and system calls on a guest's memory: EFAULT, the page intact."""

from __future__ import annotations

from functools import partial

from pkvm.check.scenarios.bench import CODE, PAGE, RAM, Bench
from pkvm.check.scenarios.handling import device_read, device_write, memory, system_call
from pkvm.check.scenarios.sharing import SHARE, UNSHARE
from pkvm.kvm.registers import register_id
from pkvm.uapi.kvm import ONE_REG, Ioctl
from pkvm.uapi.memory import SystemCall

TITLE = "Host access by load and by system calls"


def bad_loads(bench: Bench) -> None:
    """Any byte of a private page is refused, and only those."""
    vm = bench.vm()
    guest = vm.agent()
    guest.store(RAM + PAGE, 0xABCD)
    for offset, length in (
        (PAGE, 1),
        (PAGE + 7, 2),
        (2 * PAGE - 1, 1),
        (PAGE - 1, 1),
        (PAGE - 1, 2),
        (2 * PAGE - 8, 16),
        (2 * PAGE, 8),
        (0, 8),
    ):
        vm.load(offset, length)
    guest.load(RAM + PAGE)


def bad_stores(bench: Bench) -> None:
    """A store changes nothing of the page, and everything before it."""
    vm = bench.vm()
    guest = vm.agent()
    guest.store(RAM + PAGE, 0xABCD)
    vm.store(PAGE, b"\xee" * 8)
    vm.store(2 * PAGE - 1, b"\xee")
    vm.store(PAGE - 2, b"\x11\x22\x33")
    vm.load(PAGE - 4, 4)
    vm.store(2 * PAGE, b"\x44")
    guest.load(RAM + PAGE)
    guest.load(RAM + 2 * PAGE - 8)


def bad_code(bench: Bench) -> None:
    """The agent's own pages: those that it has run in or looked at."""
    vm = bench.vm()
    assert vm.code is not None
    bench.load(vm.code, 0, 4)
    guest = vm.agent()
    bench.load(vm.code, 0, 4)
    bench.store(vm.code, 0, b"\xff" * 4)
    bench.load(vm.code, 60 * PAGE, 4)
    guest.load(CODE, 4)


def bad_system_calls(bench: Bench) -> None:
    """Every system call on a private page fails, and the guest does not notice."""
    vm = bench.vm()
    guest = vm.agent()
    guest.store(RAM, 0x5EC2E7)
    for call in SystemCall:
        system_call(bench, vm.ram, call)
    vm.load(0)
    guest.load(RAM)


def bad_part_of_a_buffer(bench: Bench) -> None:
    """A buffer that begins before the private page: what is done before it, and reported."""
    vm = bench.vm()
    guest = vm.agent()
    guest.store(RAM + PAGE, 0x5EC2E7)
    for call in SystemCall:
        if call not in (SystemCall.OPEN, SystemCall.NANOSLEEP, SystemCall.UNAME):
            system_call(bench, vm.ram, call, PAGE - 8, 16)
    guest.load(RAM + PAGE)


def good_shared(bench: Bench) -> None:
    """On a page that the guest shares they do what they always do."""
    vm = bench.vm()
    guest = vm.agent()
    guest.hvc(SHARE, RAM)
    for call in SystemCall:
        if call is not SystemCall.URANDOM:
            system_call(bench, vm.ram, call)
    guest.load(RAM, 4)
    guest.hvc(UNSHARE, RAM)
    system_call(bench, vm.ram, SystemCall.WRITE)
    system_call(bench, vm.ram, SystemCall.READ)


def good_not_protected(bench: Bench) -> None:
    """The memory of a VM that is not protected is the host's too."""
    vm = bench.vm(protected=False)
    guest = vm.agent()
    guest.store(RAM, 0x1122)
    vm.load(0)
    vm.store(0, b"\x33\x44")
    guest.load(RAM, 2)
    system_call(bench, vm.ram, SystemCall.WRITE)
    system_call(bench, vm.ram, SystemCall.READ)
    guest.load(RAM, 2)


def bad_ioctl_pointer(bench: Bench) -> None:
    """An ioctl whose structure lies in a private page."""
    vm = bench.vm()
    guest = vm.agent()
    guest.store(RAM, 1)
    free = memory(bench, "free", 1)
    assert free is not None
    ioctl = bench.kvm.kernel.ioctl
    for request, fd in (
        (Ioctl.SET_USER_MEMORY_REGION, vm.vm.fd),
        (Ioctl.ARM_PREFERRED_TARGET, vm.vm.fd),
        (Ioctl.GET_MP_STATE, guest.vcpu.fd),
        (Ioctl.SET_MP_STATE, guest.vcpu.fd),
        (Ioctl.GET_ONE_REG, guest.vcpu.fd),
        (Ioctl.GET_REG_LIST, guest.vcpu.fd),
    ):
        for where in (vm.ram, free):
            says = f"structure at {bench.user(where.address)}"
            bench.call(f"KVM_{request.name}", says, partial(ioctl, fd, request, where.address))
    guest.load(RAM)


def bad_one_reg_pointer(bench: Bench) -> None:
    """KVM_GET_ONE_REG and KVM_SET_ONE_REG of X0 with the value in a private page."""
    vm = bench.vm()
    guest = vm.agent()
    guest.store(RAM, 1)
    ioctl = bench.kvm.kernel.ioctl
    for request in (Ioctl.GET_ONE_REG, Ioctl.SET_ONE_REG):
        for offset in (0, PAGE - 4, PAGE):
            address = vm.ram.address + offset
            argument = bytearray(ONE_REG.pack(register_id("x0"), address))
            says = f"value at {bench.user(address)}"
            bench.call(
                f"KVM_{request.name}", says, partial(ioctl, guest.vcpu.fd, request, argument)
            )
    guest.load(RAM)


def bad_device(bench: Bench) -> None:
    """A disk of the host's, told to read and write a private page (DMA)."""
    vm = bench.vm()
    guest = vm.agent()
    guest.store(RAM, 0x5EC2E7)
    device_read(bench, vm.ram)
    device_write(bench, vm.ram, b"\x11")
    guest.load(RAM)
    vm.load(0)


def good_device(bench: Bench) -> None:
    """The same with a page that the guest shares, one it has not touched, and one of a guest that
    is not protected."""
    vm = bench.vm()
    guest = vm.agent()
    guest.hvc(SHARE, RAM)
    guest.store(RAM, 0x1234)
    device_read(bench, vm.ram)
    device_write(bench, vm.ram, b"\x55")
    guest.load(RAM)
    device_write(bench, vm.ram, b"\x66", PAGE)
    guest.load(RAM + PAGE)
    other = bench.vm(protected=False, name="other ")
    second = other.agent()
    second.store(RAM, 0x77)
    device_read(bench, other.ram)
    device_write(bench, other.ram, b"\x88")
    second.load(RAM)
