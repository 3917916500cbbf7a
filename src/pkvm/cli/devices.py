# SPDX-License-Identifier: GPL-2.0-or-later
"""The options that put virtio devices on the board: one row of `KINDS` each.

Devices get their slots in the order of the command line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pkvm.vmm.board import VIRTIO_SLOTS
from pkvm.vmm.errors import LoadError
from pkvm.vmm.faults import Faults

if TYPE_CHECKING:
    from pkvm.vmm.virtio.bus import VirtioBus
    from pkvm.vmm.virtio.device import VirtioDevice
    from pkvm.vmm.vmm import Vmm


class Kind(NamedTuple):
    """An option, and what it makes. `make` gets the option's value (None where it has none), and
    raises LoadError or OSError for one that cannot be used."""

    option: str
    metavar: str | None
    """None for an option without a value."""
    help: str
    make: Callable[[str | None], VirtioDevice]


def disk(value: str | None) -> VirtioDevice:
    """`--disk FILE[,ro]`."""
    # Imported here, as below: a device that is not asked for costs no start-up time.
    from pkvm.vmm.virtio.blk import Block
    from pkvm.vmm.virtio.disk import Disk

    text = value or ""
    path = text.removesuffix(",ro")
    return Block(Disk(path, read_only=path != text), identity=path.rpartition("/")[2])


def rng(value: str | None) -> VirtioDevice:
    """`--rng`."""
    from pkvm.vmm.virtio.rng import Entropy

    return Entropy()


KINDS = (
    Kind("--disk", "FILE[,ro]", "a raw disk image; ,ro: the guest may only read it", disk),
    Kind("--rng", None, "a source of entropy", rng),
)


class Traffic(NamedTuple):
    """What a device has moved: a protected guest bounces all of it through shared pages."""

    device: str
    buffers: int
    from_guest: int
    """Bytes."""
    to_guest: int
    """Bytes."""


class _Append(argparse.Action):
    """Keep the options in their order, whatever their kind."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        chosen = [*getattr(namespace, self.dest), (self.const, values or None)]
        setattr(namespace, self.dest, chosen)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options, under a heading of their own; what they ask for is in `args.devices`."""
    group = parser.add_argument_group("virtio devices (each may be given several times)")
    for kind in KINDS:
        group.add_argument(
            kind.option,
            action=_Append,
            dest="devices",
            default=[],
            const=kind,
            nargs=None if kind.metavar else 0,
            metavar=kind.metavar,
            help=kind.help,
        )


class Devices:
    """The devices asked for, by slot, opened: `close` ends each. Raises LoadError, OSError."""

    def __init__(self, args: argparse.Namespace) -> None:
        if len(args.devices) > VIRTIO_SLOTS:
            raise LoadError(
                f"{len(args.devices)} virtio devices: the board has {VIRTIO_SLOTS} slots"
            )
        self.faults = Faults()
        """What went wrong with them, in all lives of the VM."""
        self.by_slot: dict[int, VirtioDevice] = {}
        self._bus: VirtioBus | None = None
        try:
            for slot, (kind, value) in enumerate(args.devices):
                self.by_slot[slot] = kind.make(value)
        except BaseException:
            self.close()
            raise

    def plug(self, vmm: Vmm) -> None:
        """Put them on a VM's board: for `Vmm(plug=...)`, once for each of its lives."""
        if self.by_slot:
            # Imported here: without devices there is no bus.
            from pkvm.vmm.virtio.bus import plug

            self._bus = plug(self.by_slot, self.faults)(vmm)

    def traffic(self) -> list[Traffic]:
        """What each has moved in the VM's last life."""
        if self._bus is None:
            return []
        return [
            Traffic(
                device.name,
                sum(queue.chains for queue in device.queues),
                sum(queue.bytes_read for queue in device.queues),
                sum(queue.bytes_written for queue in device.queues),
            )
            for device in self._bus.devices.values()
        ]

    def close(self) -> None:
        """Close the devices. Idempotent."""
        for device in self.by_slot.values():
            device.close()
