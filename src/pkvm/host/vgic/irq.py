# SPDX-License-Identifier: GPL-2.0-or-later
"""One interrupt: what the distributor or a redistributor keeps about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pkvm.arm64.gicv3 import NR_PRIVATE, NR_SGIS

if TYPE_CHECKING:
    from pkvm.host.vgic.cpu import GicCpu


class Irq:
    """An interrupt's state (IHI 0069, 4.1). Whoever changes it calls `Gic.update` afterwards.

    `target` is the CPU that it goes to, None if its affinity names none.
    """

    __slots__ = (
        "active",
        "edge",
        "enabled",
        "group",
        "home",
        "intid",
        "latch",
        "level",
        "lowered",
        "mpidr",
        "priority",
        "sample",
        "target",
    )

    def __init__(self, intid: int, target: GicCpu | None) -> None:
        self.intid = intid
        self.target = target
        self.mpidr = 0
        """GICD_IROUTER."""
        self.group = 1
        self.enabled = intid < NR_SGIS
        self.edge = not NR_SGIS <= intid < NR_PRIVATE
        """SPIs too, until a guest says otherwise: the reset value is the implementation's to choose
        (IHI 0069, GICD_ICFGR), and Linux's is this one."""
        self.priority = 0
        self.latch = False
        """Pending by an edge, an SGI or a write to ISPENDR."""
        self.level = False
        """The input; of an edge-triggered interrupt it counts for nothing."""
        self.active = False
        self.home: GicCpu | None = None
        """The CPU whose list it is on: pending and enabled there, or active."""
        self.sample: Callable[[], bool] | None = None
        """Asks for the level of the input, if the host must ask."""
        self.lowered: Callable[[], None] | None = None
        """What to tell when the guest has handled the interrupt: the input goes low by itself
        then, until that raises it again (a resampling irqfd)."""

    @property
    def pending(self) -> bool:
        """Whether it is pending (the manual's "pending" and "active and pending")."""
        return self.latch or (self.level and not self.edge)
