# SPDX-License-Identifier: GPL-2.0-or-later
"""P10: a refused call changes nothing (facts §11.3)."""

from __future__ import annotations

from collections.abc import Iterable

from pkvm.arm64.stage2 import PAGE_SIZE
from pkvm.hyp.mem_protect import GuestMemory, MemProtect
from pkvm.machine.bus import Bus
from pkvm.machine.stage2 import Stage2Context, iter_tables


class Snapshot:
    """P10: everything that EL2 keeps of memory, to be compared with later.

    The carve-out, every guest table and memcache page byte for byte, and what the buses cache.
    """

    def __init__(self, mem: MemProtect, vms: Iterable[GuestMemory]) -> None:
        with mem.lock:
            memory = mem.memory
            self._parts: dict[str, object] = {"carve-out": _carveout(mem)}
            self._parts["pool"] = mem.pool.available
            for vm in vms:
                name = f"VM {vm.handle:#x}"
                context = Stage2Context(vm.stage2.vttbr, vm.stage2.vtcr)
                self._parts[f"{name}'s memcache"] = vm.memcache.pages()
                for pa in [*iter_tables(memory, context), *vm.memcache.pages()]:
                    self._parts[f"{name}'s page {pa:#x}"] = memory.read(pa, PAGE_SIZE)
            for domain in mem.domains.values():
                name = f"domain {domain.number}"
                context = Stage2Context(domain.stage2.vttbr, domain.stage2.vtcr)
                self._parts[f"{name}'s memcache"] = domain.memcache.pages()
                for pa in [*iter_tables(memory, context), *domain.memcache.pages()]:
                    self._parts[f"{name}'s page {pa:#x}"] = memory.read(pa, PAGE_SIZE)
            host = mem.host.host_bus
            buses = (host, *host.peers) if isinstance(host, Bus) else ()
            cached = {bus.name: bus.tlb_entries() for bus in buses}
            if mem.smmu is not None:
                cached |= mem.smmu.hardware.tlb_entries()
            for name, entries in cached.items():
                self._parts[f"the {name} TLB"] = sorted(
                    entries, key=lambda entry: (entry.ipa, entry.access.value)
                )

    def differences(self, later: Snapshot) -> list[str]:
        """Names of the parts that differ."""
        names = sorted(self._parts.keys() | later._parts.keys())
        return [name for name in names if self._parts.get(name) != later._parts.get(name)]


def _carveout(mem: MemProtect) -> bytes:
    """EL2's memory, but for the SMMU's queues: what went through them is no state."""
    base, nbytes = mem.carveout
    content = bytearray(mem.memory.read(base, nbytes))
    for pa in mem.smmu.queue_pages if mem.smmu is not None else ():
        content[pa - base : pa - base + PAGE_SIZE] = bytes(PAGE_SIZE)
    return bytes(content)
