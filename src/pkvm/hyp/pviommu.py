# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest asks of EL2 about devices that it was given: what they are, and what they may reach
(facts §6.5, §10). The work is `assignment`'s."""

from __future__ import annotations

from collections.abc import Callable

from pkvm.arm64.smccc import SUCCESS, Function, PviommuOp
from pkvm.hyp.assignment import Assignment
from pkvm.hyp.errors import Errno, Refused
from pkvm.hyp.vm import Vm
from pkvm.machine.cpu.engine import CpuEngine

Results = tuple[int, int, int, int]
Call = Callable[[Vm, int, int, int], Results]
"""(VM, X1, X2, X3) -> X0-X3; raises Refused."""
_DONE: Results = (SUCCESS, 0, 0, 0)


class Pviommu:
    """The calls of one CPU's guests; `table` has them by function id."""

    def __init__(self, engine: CpuEngine, assignment: Assignment) -> None:
        self._x = engine.x
        self._devices = assignment
        self.table: dict[int, Call] = {
            Function.DEV_REQ_MMIO: self._dev_req_mmio,
            Function.DEV_REQ_DMA: self._dev_req_dma,
            Function.PVIOMMU_OP: self._pviommu_op,
        }

    def _dev_req_mmio(self, vm: Vm, ipa: int, x2: int, x3: int) -> Results:
        if x2 or x3 or any(self._x[4:7]):
            raise Refused(Errno.EINVAL, "arguments", "X2 to X6 must be 0", vm=vm.handle)
        return (SUCCESS, self._devices.mmio_token(vm, ipa), 0, 0)

    def _dev_req_dma(self, vm: Vm, pviommu: int, vsid: int, x3: int) -> Results:
        if x3 or any(self._x[4:7]):
            raise Refused(Errno.EINVAL, "arguments", "X3 to X6 must be 0", vm=vm.handle)
        return (SUCCESS, *self._devices.dma_tokens(vm, pviommu, vsid), 0)

    def _pviommu_op(self, vm: Vm, op: int, x2: int, x3: int) -> Results:
        devices = self._devices
        x4, x5, x6 = self._x[4:7]
        if op == PviommuOp.MAP:
            return (SUCCESS, devices.map(vm, x2, x3, x4, x5, x6), 0, 0)
        if op == PviommuOp.UNMAP:
            return (SUCCESS, devices.unmap(vm, x2, x3, x4), 0, 0)
        if op == PviommuOp.ALLOC_DOMAIN:
            return (SUCCESS, devices.alloc_domain(vm), 0, 0)
        if op == PviommuOp.FREE_DOMAIN:
            devices.free_domain(vm, x2)
        elif op == PviommuOp.ATTACH:
            devices.attach(vm, x2, x3, x4, x5)
        elif op == PviommuOp.DETACH:
            devices.detach(vm, x2, x3, x4, x5)
        else:
            raise Refused(Errno.EINVAL, "op", f"there is no operation {op:#x}", vm=vm.handle)
        return _DONE
