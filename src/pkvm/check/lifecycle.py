# SPDX-License-Identifier: GPL-2.0-or-later
"""P12, P13 and P14: what EL2 holds for its VMs, and that nothing else is held (facts §11.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.check.dma import pages_of_domains
from pkvm.check.view import View
from pkvm.hyp.area import Area
from pkvm.hyp.vcpu import Vcpu
from pkvm.hyp.vm import Vm
from pkvm.hyp.vmemmap import HOST_SHARED_WITH_HYP


def pinned(view: View, vms: Sequence[Vm]) -> Iterator[str]:
    """P12: a host page that EL2 reads is shared with it, and pinned once for each VM and vCPU that
    it stands for, or as a message buffer; no other page is pinned."""
    base = view.mem.memory.ram_base
    windows = [vm.host_pa for vm in vms] + [vcpu.host_pa for vm in vms for vcpu in _vcpus(vm)]
    windows += view.buffers
    expected: dict[int, int] = {}
    for pa in windows:
        page = (pa - base) >> PAGE_SHIFT
        expected[page] = expected.get(page, 0) + 1
        if view.states[page] != HOST_SHARED_WITH_HYP:
            yield f"P12: EL2 reads PA {pa:#x}, which the host does not share with it"
    counts = view.mem.vmemmap.refcount
    shared = view.counted[view.states[view.counted] == HOST_SHARED_WITH_HYP]
    for page in sorted(expected.keys() | set(shared.tolist())):
        pins, users = counts[page], expected.get(page, 0)
        if pins != users and view.states[page] == HOST_SHARED_WITH_HYP:
            yield f"P12: PA {view.pa(page):#x} is pinned {pins} times for {users} users"


def loaded_once(view: View, vms: Sequence[Vm]) -> Iterator[str]:
    """P13: one CPU has at most one vCPU loaded; a VM's users are its loaded vCPUs; a dying VM has
    none."""
    loaded = 0
    for vm in vms:
        mine = sum(vcpu.loaded for vcpu in _vcpus(vm))
        loaded += mine
        if vm.users != mine:
            yield f"P13: VM {vm.handle:#x} has {vm.users} users, but {mine} vCPUs are loaded"
        if vm.dying and mine:
            yield f"P13: VM {vm.handle:#x} is dying, and {mine} vCPUs are loaded"
    if loaded > 1:
        yield f"P13: {loaded} vCPUs are loaded on one CPU"


def accounted(view: View, vms: Sequence[Vm]) -> Iterator[str]:
    """P14: every page of EL2's is its own memory, or a table, a free page or an area of a VM that
    is there. (A guest's page has a leaf of a VM that is there by P1.) So what a VM took comes back
    with its end."""
    base = view.mem.memory.ram_base
    lost = view.is_hyp.copy()
    for region in (view.mem.carveout, view.mem.firmware):
        if region is not None:
            first = (region[0] - base) >> PAGE_SHIFT
            lost[first : first + (region[1] >> PAGE_SHIFT)] = False
    forest = view.forest
    for tables in (*(part for part, _ in forest.above), forest.last):
        lost[tables.pages] = False
    own = np.array(list(pages_of_domains(view)), np.int64)
    lost[own - base >> PAGE_SHIFT] = False
    areas: list[Area] = [*vms, *(vcpu for vm in vms for vcpu in _vcpus(vm))]
    for vm in vms:
        lost[np.array(vm.memcache.pages(), np.int64) - base >> PAGE_SHIFT] = False
    for area in areas:
        first = (area.pa - base) >> PAGE_SHIFT
        part = slice(first, first + (area.nbytes >> PAGE_SHIFT))
        if not view.is_hyp[part].all():
            yield f"P14: the area at PA {area.pa:#x} is not EL2's"
        lost[part] = False
    for page in view.pages(lost):
        yield f"P14: PA {view.pa(page):#x} is EL2's, for nothing"


def _vcpus(vm: Vm) -> Iterator[Vcpu]:
    return (vcpu for vcpu in vm.vcpus if vcpu is not None)
