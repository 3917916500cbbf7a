# SPDX-License-Identifier: GPL-2.0-or-later
"""What must hold at the doors to firmware: no CPU and no secure world is a way round EL2.

P15: a CPU on which the host runs has the host's stage-2 in force, and traps its
SMCs. P16: whatever the secure world was given is marked so, and nobody else's
but the host's, if it is shared. Both look at the machine and not at what EL2 believes of it.
"""

from __future__ import annotations

from collections.abc import Iterator

from pkvm.arm64.psci import Affinity
from pkvm.arm64.registers import hcr
from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.hyp.hypervisor import Hypervisor
from pkvm.hyp.mem_protect import MemProtect
from pkvm.hyp.vmemmap import HOST_SHARED, SECURE_OWNED
from pkvm.machine.host_cpus import HostCpu
from pkvm.machine.machine import Machine
from pkvm.machine.stage2 import Stage2Context

_MUST = hcr("VM", "TSC")


def check_doors(hyp: Hypervisor, machine: Machine) -> list[str]:
    """What is wrong, in words, each with the property that it breaks. Takes EL2's lock."""
    mem = hyp.mem
    if not mem.protected:
        return []
    with mem.lock:
        problems = [text for cpu in machine.host_cpus.cpus for text in _cpu(mem, cpu)]
        if machine.has_firmware:
            problems += _secure(mem, machine.firmware.secure.grants.pages())
        return problems


def _cpu(mem: MemProtect, cpu: HostCpu) -> Iterator[str]:
    if cpu.power != Affinity.ON or cpu.suspended:
        return
    if cpu.el != 1 or cpu.hcr_el2 & _MUST != _MUST:
        yield f"P15: host CPU {cpu.index} runs at EL{cpu.el} with HCR_EL2 {cpu.hcr_el2:#x}"
    if cpu.bus.context != Stage2Context(mem.host.stage2.vttbr, mem.host.stage2.vtcr):
        yield f"P15: host CPU {cpu.index} is not behind the host's stage-2"


def _secure(mem: MemProtect, pfns: frozenset[int]) -> Iterator[str]:
    first = mem.memory.ram_base >> PAGE_SHIFT
    for pfn in sorted(pfns):
        state = mem.vmemmap.state[pfn - first]
        is_shared = state == HOST_SHARED and not mem.vmemmap.share_count[pfn - first]
        if not is_shared and state != SECURE_OWNED:
            yield (
                f"P16: the secure world has PA {pfn << PAGE_SHIFT:#x}, whose record says {state:#x}"
            )
