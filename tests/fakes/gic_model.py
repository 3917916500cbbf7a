# SPDX-License-Identifier: GPL-2.0-or-later
"""A GICv3's virtual CPU interface, as plainly as the architecture tells it (IHI 0069, 4.8 and 12).

Written from the manual, without regard for speed, to compare
`pkvm.machine.gic.VirtualCpuInterface` with: interrupts are objects, active
priorities a list of (group, priority), binary points strings of bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Interrupt:
    """A list register taken apart."""

    pending: bool
    active: bool
    hw: bool
    group: int
    priority: int
    eoi: bool
    intid: int

    @classmethod
    def of(cls, word: int) -> Interrupt:
        def bit(number: int) -> bool:
            return bool(word >> number & 1)

        return cls(
            pending=bit(62),
            active=bit(63),
            hw=bit(61),
            group=int(bit(60)),
            priority=word >> 48 & 0xFF,
            eoi=bit(41),
            intid=word & 0xFFFF_FFFF,
        )

    def word(self) -> int:
        return (
            self.active << 63
            | self.pending << 62
            | self.hw << 61
            | self.group << 60
            | self.priority << 48
            | self.eoi << 41
            | self.intid
        )

    @property
    def valid(self) -> bool:
        return self.pending or self.active


def empty() -> Interrupt:
    return Interrupt.of(0)


@dataclass
class Model:
    """State in words of the manual; methods are named after the registers."""

    lrs: list[Interrupt] = field(default_factory=lambda: [empty() for _ in range(4)])
    running: list[tuple[int, int]] = field(default_factory=list)
    """Active (group, group priority), one bit of an ICH_AP<g>R0_EL2 each."""
    enable: list[bool] = field(default_factory=lambda: [False, False])
    binary_point: list[int] = field(default_factory=lambda: [2, 3])
    common: bool = False
    split: bool = False
    mask: int = 0
    eoicount: int = 0
    wants: set[str] = field(default_factory=set)
    """Maintenance interrupts enabled: U LRENP NP 0E 0D 1E 1D."""

    # What is signalled

    def group_priority(self, priority: int, group: int) -> int:
        """The priority without its subpriority: the binary point says where to cut."""
        if group == 1 and not self.common:
            kept = 8 - self.binary_point[1]
        else:
            kept = 7 - self.binary_point[0]
        bits = f"{priority:08b}"
        return int(bits[:kept] + "0" * (8 - kept), 2)

    def running_priority(self) -> int:
        return min((priority for _, priority in self.running), default=0xFF)

    def highest(self) -> Interrupt | None:
        able = [lr for lr in self.lrs if lr.pending and not lr.active and self.enable[lr.group]]
        return min(able, key=lambda lr: lr.priority, default=None)

    def signalled(self) -> Interrupt | None:
        lr = self.highest()
        if lr is None or not lr.priority < self.mask:
            return None
        if not self.group_priority(lr.priority, lr.group) < self.running_priority():
            return None
        return lr

    def lines(self) -> tuple[bool, bool]:
        lr = self.signalled()
        return lr is not None and lr.group == 1, lr is not None and lr.group == 0

    # ICC_*

    def iar(self, group: int) -> int:
        lr = self.signalled()
        if lr is None or lr.group != group:
            return 1023
        lr.pending = False
        if lr.intid in range(1020, 1024):
            return lr.intid
        lr.active = lr.intid < 8192
        entry = (group, self.group_priority(lr.priority, group))
        if entry not in self.running:
            self.running.append(entry)
        return lr.intid

    def eoir(self, group: int, intid: int) -> None:
        intid &= 0xFF_FFFF
        if intid in range(1020, 1024) or not self.running:
            return
        # Equal priorities of both groups: group 0's goes first.
        _, dropped = entry = min(self.running, key=lambda one: (one[1], one[0]))
        self.running.remove(entry)
        if self.split or intid >= 8192:
            return
        lr = self.active(intid)
        if lr is None:
            self.eoicount = (self.eoicount + 1) % 32
        elif lr.group == group and self.group_priority(lr.priority, group) == dropped:
            lr.active = False

    def dir(self, intid: int) -> None:
        intid &= 0xFF_FFFF
        if not self.split or intid in range(1020, 1024) or intid >= 8192:
            return
        lr = self.active(intid)
        if lr is None:
            self.eoicount = (self.eoicount + 1) % 32
        else:
            lr.active = False

    def active(self, intid: int) -> Interrupt | None:
        return next((lr for lr in self.lrs if lr.active and lr.intid == intid), None)

    def hppir(self, group: int) -> int:
        lr = self.highest()
        return lr.intid if lr is not None and lr.group == group else 1023

    def bpr1(self) -> int:
        return min(7, self.binary_point[0] + 1) if self.common else self.binary_point[1]

    def set_bpr0(self, value: int) -> None:
        self.binary_point[0] = max(2, value % 8)

    def set_bpr1(self, value: int) -> None:
        if not self.common:
            self.binary_point[1] = max(3, value % 8)

    def set_ctlr(self, value: int) -> None:
        self.common, self.split = bool(value & 1), bool(value & 2)

    def ctlr(self) -> int:
        return 4 << 8 | self.split << 1 | self.common

    def ap(self, group: int) -> int:
        return sum(1 << priority // 8 for owner, priority in self.running if owner == group)

    def set_ap(self, group: int, value: int) -> None:
        self.running = [one for one in self.running if one[0] != group]
        self.running += [(group, 8 * bit) for bit in range(32) if value >> bit & 1]

    # ICH_*

    def vmcr(self) -> int:
        return (
            self.enable[0]
            | self.enable[1] << 1
            | 1 << 3
            | self.common << 4
            | self.split << 9
            | self.binary_point[1] << 18
            | self.binary_point[0] << 21
            | self.mask << 24
        )

    def eisr(self) -> list[bool]:
        return [not lr.valid and lr.eoi and not lr.hw for lr in self.lrs]

    def elrsr(self) -> list[bool]:
        return [not lr.valid and (lr.hw or not lr.eoi) for lr in self.lrs]

    def misr(self) -> int:
        conditions = {
            "U": sum(lr.valid for lr in self.lrs) < 2,
            "LRENP": self.eoicount > 0,
            "NP": not any(lr.pending and not lr.active for lr in self.lrs),
            "0E": self.enable[0],
            "0D": not self.enable[0],
            "1E": self.enable[1],
            "1D": not self.enable[1],
        }
        word = int(any(self.eisr()))
        for number, (name, true) in enumerate(conditions.items(), start=1):
            word |= (name in self.wants and true) << number
        return word
