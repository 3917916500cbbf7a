# SPDX-License-Identifier: GPL-2.0-or-later
"""`Vcpu`: the owner of a vCPU's file descriptor and of its mmapped struct kvm_run."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from pkvm.kvm.device import Attributes
from pkvm.kvm.exits import INTR, Exit, FailEntry, Mmio, decode
from pkvm.kvm.registers import register_bytes, register_id
from pkvm.kvm.scratch import Scratch
from pkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from pkvm.kvm.vm import Vm

_RUN = int(uapi.Ioctl.RUN)
_MMIO = int(uapi.ExitReason.MMIO)
_EXIT_REASON = uapi.Run.EXIT_REASON // 4
_UNION = uapi.Run.UNION
_MMIO_DATA = _UNION + 8
_unpack_mmio = uapi.Run.MMIO.unpack_from
_make = tuple.__new__
_MASKS = tuple((1 << 8 * size) - 1 for size in range(9))
"""By the bytes of an access."""


class Vcpu(Attributes):
    """One vCPU. As on a real kernel, one thread runs it; `kick` comes from any other.

    Made by `Vm.create_vcpu`. Every method raises OSError with the kernel's errno.
    """

    def __init__(self, vm: Vm, vcpu_id: int, fd: int, mmap_size: int) -> None:
        self.vm = vm
        self.id = vcpu_id
        """The id that CREATE_VCPU was given; the guest's MPIDR follows from it."""
        self.fd = fd
        self._kernel = vm.kvm.kernel
        self._ioctl = self._kernel.ioctl
        self._page = self._kernel.mmap_vcpu(fd, mmap_size)
        self._run = self._page.view
        self._words = self._run.cast("I")
        self._scratch = Scratch(self._kernel)
        self._closed = False

    def run(self) -> Exit:
        """KVM_RUN (KVM API 4.10): run the guest until there is something to do, and say what.

        EINTR comes back as `Intr`, an entry that the kernel refuses with KVM_EXIT_FAIL_ENTRY as
        `FailEntry`; every other error is raised. An `Mmio` read is answered by `complete`
        before the next `run`.
        """
        run = self._run
        try:
            self._ioctl(self.fd, _RUN)
        except InterruptedError:
            run[uapi.Run.IMMEDIATE_EXIT] = 0
            return INTR
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            exit_ = decode(run)
            if not isinstance(exit_, FailEntry):
                raise
            # Said once: the page must not explain a later EINVAL.
            self._words[_EXIT_REASON] = uapi.ExitReason.UNKNOWN
            return exit_
        if self._words[_EXIT_REASON] == _MMIO:
            address, data, size, is_write = _unpack_mmio(run, _UNION)
            # Made as a tuple is: `Mmio(...)` is one more Python call for each device access.
            if is_write:
                return _make(Mmio, (address, size, data & _MASKS[size], True))
            return _make(Mmio, (address, size, 0, False))
        return decode(run)

    def complete(self, mmio: Mmio, value: int) -> None:
        """Answer an MMIO read with `value`, of which the guest gets the low `mmio.size` bytes at
        the next `run`. A write needs no answer and gets none."""
        if not mmio.is_write:
            data = (value & 0xFFFF_FFFF_FFFF_FFFF).to_bytes(8, "little")
            self._run[_MMIO_DATA : _MMIO_DATA + 8] = data

    def kick(self) -> None:
        """Make `run` return `Intr`: the one under way, or else the next one. Any thread may."""
        if not self._closed:
            self._run[uapi.Run.IMMEDIATE_EXIT] = 1
            self._kernel.kick(self.fd)

    def init(
        self,
        *,
        power_off: bool = False,
        features: Iterable[uapi.VcpuFeature] = (uapi.VcpuFeature.PSCI_0_2,),
        target: int | None = None,
    ) -> None:
        """KVM_ARM_VCPU_INIT (KVM API 4.82): reset to the architecture's reset state. `power_off`
        adds the feature of that name: the vCPU waits for the guest's CPU_ON. Without `target` it
        is the one that the kernel prefers."""
        if target is None:
            target = self.vm.preferred_target()
        words = [0] * 7
        for feature in features:
            words[feature // 32] |= 1 << feature % 32
        if power_off:
            words[0] |= 1 << uapi.VcpuFeature.POWER_OFF
        buffer = bytearray(uapi.VCPU_INIT.pack(target, *words))
        self._ioctl(self.fd, uapi.Ioctl.ARM_VCPU_INIT, buffer)

    def get_one_reg(self, register: int) -> int:
        """KVM_GET_ONE_REG (KVM API 4.69): the register of this ONE_REG id, as a number."""
        memory = self._scratch.memory
        buffer = bytearray(uapi.ONE_REG.pack(register, memory.address))
        self._ioctl(self.fd, uapi.Ioctl.GET_ONE_REG, buffer)
        return int.from_bytes(memory.read(0, register_bytes(register)), "little")

    def set_one_reg(self, register: int, value: int) -> None:
        """KVM_SET_ONE_REG (KVM API 4.68). Raises ValueError if the value does not fit."""
        size = register_bytes(register)
        if not 0 <= value < 1 << 8 * size:
            raise ValueError(f"{value:#x} does not fit in the {size} bytes of the register")
        memory = self._scratch.memory
        memory.write(0, value.to_bytes(size, "little"))
        buffer = bytearray(uapi.ONE_REG.pack(register, memory.address))
        self._ioctl(self.fd, uapi.Ioctl.SET_ONE_REG, buffer)

    def get_reg(self, name: str) -> int:
        """`get_one_reg` of a core register by name: "x0", "sp_el1", "pc", "pstate", "v0", ..."""
        return self.get_one_reg(register_id(name))

    def set_reg(self, name: str, value: int) -> None:
        """`set_one_reg` of a core register by name."""
        self.set_one_reg(register_id(name), value)

    def reg_list(self) -> tuple[int, ...]:
        """KVM_GET_REG_LIST (KVM API 4.84): the ONE_REG ids that the kernel knows."""
        buffer = bytearray(8)
        try:
            self._ioctl(self.fd, uapi.Ioctl.GET_REG_LIST, buffer)
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
        count = int.from_bytes(buffer, "little")
        buffer += bytes(8 * count)
        self._ioctl(self.fd, uapi.Ioctl.GET_REG_LIST, buffer)
        words = memoryview(buffer).cast("Q")
        return tuple(words[1 : 1 + words[0]])

    @property
    def mp_state(self) -> int:
        """KVM_GET_MP_STATE (KVM API 4.38): one of `uapi.MpState`."""
        buffer = bytearray(uapi.MP_STATE.size)
        self._ioctl(self.fd, uapi.Ioctl.GET_MP_STATE, buffer)
        state: int = uapi.MP_STATE.unpack(buffer)[0]
        return state

    @mp_state.setter
    def mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE (KVM API 4.39)."""
        self._ioctl(self.fd, uapi.Ioctl.SET_MP_STATE, bytearray(uapi.MP_STATE.pack(state)))

    def close(self) -> None:
        """munmap struct kvm_run and close the descriptor. Idempotent."""
        if not self._closed:
            self._closed = True
            self._scratch.close()
            self._words.release()
            self._page.close()
            self._kernel.close(self.fd)

    def __enter__(self) -> Vcpu:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
