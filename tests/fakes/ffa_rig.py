# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that speaks FF-A through EL2, and the ways in which it and the secure world misbehave."""

from __future__ import annotations

from collections.abc import Sequence

from fakes.doors import SP, Doors
from fakes.el2_rig import PAGE, Guest
from pkvm.arm64 import ffa, ffa_memory
from pkvm.arm64.ffa import Function, Registers
from pkvm.arm64.ffa_memory import Constituent
from pkvm.hyp.policy import RFC, Policy

SHARE, LEND = Function.FFA_MEM_SHARE_64, Function.FFA_MEM_LEND_64
HEADER, ENDPOINT, COMPOSITE, FIRST = 0, 48, 80, 96
"""Offsets in `FfaRig.transaction` of version 1.2; FIRST is that of the first range."""
VERSIONS = (ffa.VERSION_1_0, ffa.VERSION_1_1, ffa.VERSION_1_2)


class FfaRig(Doors):
    """With the host's driver, and pages to play with."""

    def __init__(self, version: int = ffa.VERSION_1_2, policy: Policy = RFC) -> None:
        super().__init__(policy=policy)
        self.host = self.driver(version)
        self.base = self.pages(64)
        self.warm()
        self.seen.clear()

    def warm(self) -> None:
        """Have the host's TLB filled, so that its own accesses do not change it."""
        for pa in (self.host.tx, *range(self.base, self.page(64), PAGE)):
            self.bus.write(pa, bytes(8))

    def guest(self) -> Guest:
        guest = Guest(self)
        self.warm()
        return guest

    def page(self, number: int) -> int:
        return self.base + number * PAGE

    def owned(self, *numbers: int) -> list[str]:
        """The host's state of these pages, as EL2's record has it."""
        states = self.hyp.mem.vmemmap.state
        first = self.machine.memory.ram_base
        return [f"{states[(self.page(at) - first) >> 12]:#04x}" for at in numbers]

    def transaction(self, *ranges: tuple[int, int], **more: int) -> bytes:
        constituents = [Constituent(*item) for item in ranges]
        version = self.host.version
        return ffa_memory.write_transaction(version, constituents, receivers=[SP], **more)

    def give(self, *ranges: tuple[int, int], function: Function = SHARE) -> int:
        return self.host.give(ranges, SP, function)


def edit(data: bytes, offset: int, size: int, value: int) -> bytes:
    return data[:offset] + value.to_bytes(size, "little") + data[offset + size :]


def begin(rig: FfaRig, ranges: Sequence[tuple[int, int]], sent: int) -> tuple[bytes, int]:
    """The first fragment, of `sent` ranges."""
    data = rig.transaction(*ranges)
    rig.bus.write(rig.host.tx, data[: FIRST + 16 * sent])
    answer = rig.host.call(SHARE, len(data), FIRST + 16 * sent)
    assert answer[0] == Function.FFA_MEM_FRAG_RX
    return data, ffa.handle_of(answer[1], answer[2])


def answers(rig: Doors, function: Function, *answer: int) -> None:
    """The secure world answers a call of EL2's so from now on, after it has served it."""
    el3 = rig.machine.firmware.call

    def odd(cpu: object, registers: Registers) -> Registers:
        result = el3(cpu, registers)  # type: ignore[arg-type]
        return ffa.registers(*answer) if registers[0] == function else result

    rig.machine.firmware.call = odd  # type: ignore[method-assign]
