# SPDX-License-Identifier: GPL-2.0-or-later
"""What a hostile host tries on a running protected Linux guest, one module an attack.

A module says in `TRIES` what it tries, in `GUARD` which guard of EL2 is in its
way (a name of `check.mutants`), and has one function:

    def attempt(scene: Scene) -> str | None

which returns what it gained, in words, or None. An OSError or a fault of a bus
that comes out of it is a refusal. It may use all that a host has: the kernel's
insides, EL2's doors, every bus master. What it may not use is what only an
onlooker knows, but for `scene.secret`, where the guest's secret lies: a host
would find that by trying every page.

Where EL2 gives no error but takes no notice, `WHERE` names the function that
does so, as "module:function". A module may have `before(system)`, which is
called before there is a guest, and `ENDS_GUEST = True` where the guest does not
live on. `tour` runs the catalogue; with its guard taken away the same attack must
get through.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from pkvm.check.attacks.scene import Scene
from pkvm.system import System

NAMES: tuple[str, ...] = (
    "read_by_cpu",
    "write_by_cpu",
    "read_by_system_call",
    "write_by_system_call",
    "read_by_dma",
    "write_by_dma",
    "read_by_stale_tlb",
    "read_by_stale_smmu_tlb",
    "share_with_accomplice",
    "share_with_el2",
    "donate_twice",
    "donate_list_twice",
    "feed_table_pages",
    "feed_vcpu_area",
    "reclaim_living",
    "tear_down_running",
    "read_after_kill",
    "finish_early",
    "rewrite_guest_tables",
    "rewrite_ownership",
    "read_firmware",
    "share_beyond_memory",
    "lend_to_secure_world",
    "hide_in_fragment",
    "donate_to_secure_world",
    "disguise_smc",
    "call_firmware_itself",
    "start_cpu",
    "disable_smmu",
    "rewrite_stream_table",
    "map_for_dma",
    "donate_mapped",
    "unshare_pinned",
    "add_device",
    "remap_slot",
    "read_registers",
    "write_registers",
    "fake_exception",
    "skip_instructions",
    "read_while_dying",
    "restart_on_old_memory",
)
"""Every attack, in the order of the tour."""


class Attack(Protocol):
    """A module of this package."""

    TRIES: str
    """What it tries, in words."""
    GUARD: str
    """The guard in its way, by its name in `check.mutants`."""

    def attempt(self, scene: Scene) -> str | None:
        """Try it; what it gained, or None. Raises OSError, Stage2Fault or BusError if refused."""
        ...


def attack(name: str) -> Attack:
    """An attack of `NAMES`. Raises KeyError for any other name."""
    if name not in NAMES:
        raise KeyError(name)
    return cast(Attack, import_module(f"{__name__}.{name}"))


def ends_guest(one: Attack) -> bool:
    """Whether the guest does not live on after it."""
    return bool(getattr(one, "ENDS_GUEST", False))


def prepare(one: Attack, system: System) -> None:
    """What it does before there is a guest."""
    before = getattr(one, "before", None)
    if before is not None:
        before(system)


def where(one: Attack) -> str:
    """The function that takes no notice of it; "" if it is refused with an error."""
    return str(getattr(one, "WHERE", ""))
