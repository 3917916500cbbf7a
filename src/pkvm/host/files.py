# SPDX-License-Identifier: GPL-2.0-or-later
"""What a file descriptor names, and the ioctls of each: KVM itself, a VM, a vCPU, the DMA device.

One method a request, in the order of the requests' numbers. A method gets the
`Argument` and returns ioctl(2)'s value. The kernel lock is held.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from pkvm.host import capabilities, dirty_log, events, irqchip, regs, stolen_time
from pkvm.host.argument import Argument, Handler
from pkvm.host.assignment import Assignment
from pkvm.host.dma import CopyDriver
from pkvm.host.host import IPA_BITS, Host
from pkvm.host.mm import UserSpace
from pkvm.host.run import kvm_run
from pkvm.host.vcpu import Vcpu
from pkvm.host.vm import Vm
from pkvm.uapi.kvm import (
    API_VERSION,
    CLEAR_DIRTY_LOG,
    DIRTY_LOG,
    MEMORY_REGION,
    MEMORY_REGION2_BYTES,
    MP_STATE,
    ONE_REG,
    TARGET_GENERIC_V8,
    TYPE_PROTECTED,
    VCPU_INIT,
    VCPU_MMAP_SIZE,
    Cap,
    DeviceAssign,
    DmaCopy,
    Ioctl,
    MpState,
)

_RUN = int(Ioctl.RUN)
_IPA_SIZE_MASK = 0xFF
_MIN_IPA_BITS = 32
_COUNT_BYTES = 8


class File(Protocol):
    """An open file."""

    def ioctl(self, request: int, arg: int | bytearray) -> int:
        """ioctl(2) with an unsigned 32-bit request."""
        ...

    def release(self) -> None:
        """The last descriptor was closed."""
        ...


class KvmFile:
    """/dev/kvm. `install` gives a new file a descriptor."""

    def __init__(self, host: Host, install: Callable[[File], int]) -> None:
        self._host = host
        self._install = install
        self._requests: Mapping[int, Handler] = {
            Ioctl.GET_API_VERSION: self._get_api_version,
            Ioctl.CREATE_VM: self._create_vm,
            Ioctl.CHECK_EXTENSION: lambda argument: capabilities.of_system(host, argument.number),
            Ioctl.GET_VCPU_MMAP_SIZE: self._get_vcpu_mmap_size,
        }

    def ioctl(self, request: int, arg: int | bytearray) -> int:
        """System ioctls; EINVAL for any other."""
        handler = _known(self._requests, request, "/dev/kvm")
        return handler(Argument(arg, self._host.users))

    def release(self) -> None:
        """Nothing is kept for it."""

    def _get_api_version(self, argument: Argument) -> int:
        """KVM_GET_API_VERSION (KVM API 4.1)."""
        _no_argument(argument)
        return API_VERSION

    def _create_vm(self, argument: Argument) -> int:
        """KVM_CREATE_VM (KVM API 4.2). The type is an IPA size in bits, 0 for 40, which a host in
        protected mode ignores; and where the dialect has it bit 31 for a protected VM. Raises
        EINVAL for any other type, ENOMEM beyond 255 VMs."""
        kind = argument.number
        host = self._host
        dialect = host.dialect
        if kind & ~dialect.type_mask:
            raise OSError(
                errno.EINVAL,
                f"machine type {kind:#x}: in dialect {dialect.name} a VM becomes protected by "
                f"{dialect.creation.value}",
            )
        protected = bool(kind & TYPE_PROTECTED)
        if protected and not host.protected_mode:
            raise OSError(errno.EINVAL, "the host is not in protected mode: no VM can be protected")
        kind &= _IPA_SIZE_MASK
        if kind and not host.protected_mode and not _MIN_IPA_BITS <= kind <= IPA_BITS:
            raise OSError(errno.EINVAL, f"an IPA space has 32 to {IPA_BITS} bits, not {kind}")
        vm = Vm(host, protected=protected)
        if protected and dialect.taints and not host.tainted:
            host.tainted = True
            host.say("protected VMs are experimental: the kernel is tainted (TAINT_USER)")
        try:
            return self._install(VmFile(vm, self._install))
        except OSError:
            vm.put()
            raise

    def _get_vcpu_mmap_size(self, argument: Argument) -> int:
        """KVM_GET_VCPU_MMAP_SIZE (KVM API 4.5)."""
        _no_argument(argument)
        return VCPU_MMAP_SIZE


class VmFile:
    """A VM's descriptor."""

    def __init__(self, vm: Vm, install: Callable[[File], int]) -> None:
        self.vm = vm
        self._install = install
        self._requests: Mapping[int, Handler] = {
            Ioctl.CHECK_EXTENSION: self._check_extension,
            Ioctl.CREATE_VCPU: self._create_vcpu,
            Ioctl.SET_USER_MEMORY_REGION: self._set_user_memory_region,
            Ioctl.SET_USER_MEMORY_REGION2: self._set_user_memory_region2,
            Ioctl.GET_DIRTY_LOG: self._get_dirty_log,
            Ioctl.CLEAR_DIRTY_LOG: self._clear_dirty_log,
            Ioctl.ENABLE_CAP: partial(capabilities.enable, vm),
            Ioctl.ARM_SET_DEVICE_ADDR: self._set_device_addr,
            Ioctl.ARM_PREFERRED_TARGET: self._preferred_target,
            **irqchip.requests(vm, install),
        }

    def ioctl(self, request: int, arg: int | bytearray) -> int:
        """VM ioctls; EINVAL for any other."""
        handler = _known(self._requests, request, "a VM")
        return handler(Argument(arg, self.vm.host.users))

    def release(self) -> None:
        """The VM lives on while a vCPU's descriptor or mapping does."""
        self.vm.put()

    def _create_vcpu(self, argument: Argument) -> int:
        """KVM_CREATE_VCPU (KVM API 4.7)."""
        vcpu = self.vm.create_vcpu(argument.number)
        try:
            return self._install(VcpuFile(vcpu))
        except OSError:
            self.vm.forget_vcpu(vcpu)
            raise

    def _set_user_memory_region(self, argument: Argument) -> int:
        """KVM_SET_USER_MEMORY_REGION (KVM API 4.35)."""
        self.vm.set_memory_region(argument.read(MEMORY_REGION.size))
        return 0

    def _set_user_memory_region2(self, argument: Argument) -> int:
        """KVM_SET_USER_MEMORY_REGION2 (KVM API 4.140): the same, as there is no guest_memfd."""
        self.vm.set_memory_region(argument.read(MEMORY_REGION2_BYTES)[: MEMORY_REGION.size])
        return 0

    def _get_dirty_log(self, argument: Argument) -> int:
        """KVM_GET_DIRTY_LOG (KVM API 4.8)."""
        number, _, address = DIRTY_LOG.unpack(argument.read(DIRTY_LOG.size))
        dirty_log.get(self.vm, number, address)
        return 0

    def _clear_dirty_log(self, argument: Argument) -> int:
        """KVM_CLEAR_DIRTY_LOG (KVM API 4.117)."""
        number, npages, first, address = CLEAR_DIRTY_LOG.unpack(argument.read(CLEAR_DIRTY_LOG.size))
        dirty_log.clear(self.vm, number, first, npages, address)
        return 0

    def _check_extension(self, argument: Argument) -> int:
        """KVM_CHECK_EXTENSION (KVM API 4.4)."""
        return capabilities.of_vm(self.vm, argument.number)

    def _set_device_addr(self, argument: Argument) -> int:
        """KVM_ARM_SET_DEVICE_ADDR (KVM API 4.85): where a GICv2 is, which there is not. Raises
        ENODEV; EINVAL where the VM's descriptor does not offer it."""
        if not capabilities.of_vm(self.vm, Cap.ARM_SET_DEVICE_ADDR):
            raise OSError(errno.EINVAL, "a protected VM has no device whose address is set so")
        raise OSError(errno.ENODEV, "there is no GICv2: KVM_CREATE_DEVICE makes a GICv3")

    def _preferred_target(self, argument: Argument) -> int:
        """KVM_ARM_PREFERRED_TARGET (KVM API 4.83)."""
        argument.write(VCPU_INIT.pack(TARGET_GENERIC_V8, *[0] * 7))
        return 0


class VcpuFile:
    """A vCPU's descriptor."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self._requests: Mapping[int, Handler] = {
            Ioctl.GET_MP_STATE: self._get_mp_state,
            Ioctl.SET_MP_STATE: self._set_mp_state,
            Ioctl.SET_GUEST_DEBUG: partial(events.set_guest_debug, vcpu),
            Ioctl.GET_VCPU_EVENTS: partial(events.get, vcpu),
            Ioctl.SET_VCPU_EVENTS: partial(events.set_events, vcpu),
            Ioctl.GET_ONE_REG: self._get_one_reg,
            Ioctl.SET_ONE_REG: self._set_one_reg,
            Ioctl.ARM_VCPU_INIT: self._vcpu_init,
            Ioctl.GET_REG_LIST: self._get_reg_list,
            Ioctl.SET_DEVICE_ATTR: partial(stolen_time.attribute, vcpu, Ioctl.SET_DEVICE_ATTR),
            Ioctl.GET_DEVICE_ATTR: partial(stolen_time.attribute, vcpu, Ioctl.GET_DEVICE_ATTR),
            Ioctl.HAS_DEVICE_ATTR: partial(stolen_time.attribute, vcpu, Ioctl.HAS_DEVICE_ATTR),
        }

    def ioctl(self, request: int, arg: int | bytearray) -> int:
        """vCPU ioctls, KVM_RUN (KVM API 4.10) first; EINVAL for any other.

        One at a time: a KVM_RUN in another thread is awaited. The vCPU outlives the call, whoever
        closes its descriptor meanwhile.
        """
        vcpu = self.vcpu
        vcpu.references += 1
        try:
            if not vcpu.mutex.acquire(False):
                self._wait_for_mutex()
            try:
                if request == _RUN:
                    if arg != 0:
                        _no_argument(Argument(arg, self._users))
                    kvm_run(vcpu)
                    return 0
                handler = _known(self._requests, request, "a vCPU")
                return handler(Argument(arg, self._users))
            finally:
                vcpu.mutex.release()
        finally:
            if vcpu.references > 1:
                vcpu.references -= 1
            else:
                vcpu.put()

    def release(self) -> None:
        """A KVM_RUN under way is interrupted; the vCPU goes when nothing uses it any more."""
        vcpu = self.vcpu
        vcpu.closed = True
        vcpu.vm.host.sched.forget(vcpu.runner)
        vcpu.put()

    def _wait_for_mutex(self) -> None:
        """Take the vCPU's mutex without the kernel lock, which comes after it. Raises EBADF."""
        vcpu = self.vcpu
        lock = vcpu.vm.host.sched.lock
        lock.leave()
        try:
            vcpu.mutex.acquire()
        finally:
            lock.enter()
        if vcpu.closed:
            vcpu.mutex.release()
            raise OSError(errno.EBADF, "the vCPU was closed")

    def _get_mp_state(self, argument: Argument) -> int:
        """KVM_GET_MP_STATE (KVM API 4.38)."""
        argument.write(MP_STATE.pack(self.vcpu.mp_state))
        return 0

    def _set_mp_state(self, argument: Argument) -> int:
        """KVM_SET_MP_STATE (KVM API 4.39): RUNNABLE or STOPPED, else EINVAL. It is the host's
        view; EL2 has a protected vCPU's power state."""
        state = MP_STATE.unpack(argument.read(MP_STATE.size))[0]
        if state not in (MpState.RUNNABLE, MpState.STOPPED):
            raise OSError(errno.EINVAL, f"MP state {state} is neither RUNNABLE nor STOPPED")
        self.vcpu.mp_state = MpState(state)
        return 0

    def _get_one_reg(self, argument: Argument) -> int:
        """KVM_GET_ONE_REG (KVM API 4.69)."""
        register, address = self._one_reg(argument)
        regs.size_of(self.vcpu, register)
        self._users.copy_to_user(address, regs.get_one_reg(self.vcpu, register))
        return 0

    def _set_one_reg(self, argument: Argument) -> int:
        """KVM_SET_ONE_REG (KVM API 4.68)."""
        register, address = self._one_reg(argument)
        value = self._users.copy_from_user(address, regs.size_of(self.vcpu, register))
        regs.set_one_reg(self.vcpu, register, value)
        return 0

    def _vcpu_init(self, argument: Argument) -> int:
        """KVM_ARM_VCPU_INIT (KVM API 4.82)."""
        vcpu = self.vcpu
        vcpu.init(argument.read(VCPU_INIT.size))
        if vcpu.vm.at_el2 and vcpu.vm.ran:
            vcpu.vm.init_vcpus_at_el2()
        return 0

    def _get_reg_list(self, argument: Argument) -> int:
        """KVM_GET_REG_LIST (KVM API 4.84). Raises E2BIG, with n written, for too small a list."""
        self._need_init()
        room = int.from_bytes(argument.read(_COUNT_BYTES), "little")
        registers = regs.reg_list(self.vcpu)
        count = len(registers).to_bytes(_COUNT_BYTES, "little")
        argument.write(count)
        if room < len(registers):
            raise OSError(errno.E2BIG, f"there are {len(registers)} registers")
        argument.write(count + b"".join(item.to_bytes(8, "little") for item in registers))
        return 0

    def _one_reg(self, argument: Argument) -> tuple[int, int]:
        """(register id, user address) of a struct kvm_one_reg."""
        self._need_init()
        register, address = ONE_REG.unpack(argument.read(ONE_REG.size))
        return register, address

    def _need_init(self) -> None:
        if not self.vcpu.initialised:
            raise OSError(errno.ENOEXEC, f"vCPU {self.vcpu.id} has had no KVM_ARM_VCPU_INIT")

    @property
    def _users(self) -> UserSpace:
        return self.vcpu.vm.host.users


class DmaFile:
    """/dev/dma-copy."""

    def __init__(self, driver: CopyDriver, users: UserSpace, assignment: Assignment) -> None:
        self._driver = driver
        self._users = users
        self._assignment = assignment

    def ioctl(self, request: int, arg: int | bytearray) -> int:
        """DMA_COPY and DeviceAssign.ASSIGN; ENOTTY for any other."""
        if request == DeviceAssign.ASSIGN:
            self._assignment.assign(Argument(arg, self._users).read(DeviceAssign.ARGS.size))
            return 0
        if request != DmaCopy.COPY:
            raise OSError(errno.ENOTTY, f"/dev/dma-copy has no ioctl {request:#x}")
        self._driver.copy(Argument(arg, self._users).read(DmaCopy.ARGS.size))
        return 0

    def release(self) -> None:
        """Nothing is kept for it."""


def _known(requests: Mapping[int, Handler], request: int, what: str) -> Handler:
    handler = requests.get(request)
    if handler is None:
        raise OSError(errno.EINVAL, f"{what} has no ioctl {request:#x}")
    return handler


def _no_argument(argument: Argument) -> None:
    if argument.number:
        raise OSError(errno.EINVAL, "this request takes no argument")
