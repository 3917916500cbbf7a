# SPDX-License-Identifier: GPL-2.0-or-later
"""The options that put virtio devices on the board: one row of `KINDS` each.

Devices get their slots in the order of the command line.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pkvm.cli.options import seed_of
from pkvm.vmm.board import VIRTIO_SLOTS
from pkvm.vmm.errors import LoadError
from pkvm.vmm.faults import Faults

if TYPE_CHECKING:
    from pkvm.vmm.virtio.bus import VirtioBus
    from pkvm.vmm.virtio.device import VirtioDevice
    from pkvm.vmm.vmm import Vmm


class Kind(NamedTuple):
    """An option, and what it makes. `make` gets the option's value (None where it has none) and all
    the others, and raises LoadError or OSError for one that cannot be used."""

    option: str
    metavar: str | None
    """None for an option without a value."""
    help: str
    make: Callable[[str | None, argparse.Namespace], VirtioDevice]


def disk(value: str | None, args: argparse.Namespace) -> VirtioDevice:
    """`--disk FILE[,ro][,dma]`."""
    # Imported here, as below: a device that is not asked for costs no start-up time.
    from pkvm.vmm.virtio.blk import Block
    from pkvm.vmm.virtio.disk import Disk

    path, flags = value or "", set()
    while path.endswith((",ro", ",dma")):
        path, _, flag = path.rpartition(",")
        flags.add(flag)
    if not path:
        raise LoadError(f"--disk {value}: name a file first")
    disk = Disk(path, read_only="ro" in flags)
    return Block(disk, identity=path.rpartition("/")[2], by_dma="dma" in flags)


def rng(value: str | None, args: argparse.Namespace) -> VirtioDevice:
    """`--rng`: from this machine's entropy, or, where a run is to be repeated, from its seed."""
    from pkvm.vmm.virtio.rng import Entropy

    seed = seed_of(args)
    return Entropy() if seed is None else Entropy(random.Random(seed).randbytes)


def net(value: str | None, args: argparse.Namespace) -> VirtioDevice:
    """`--net tap=NAME[,mac=..][,mtu=N]` or `--net passt=SOCKET[,mac=..][,mtu=N]`."""
    from pkvm.vmm.virtio.links import StreamLink, Tap
    from pkvm.vmm.virtio.net import DEFAULT_MTU, MAX_MTU, MIN_MTU, Net, parse_mac

    first, *rest = (value or "").split(",")
    kind, _, name = first.partition("=")
    if kind not in ("tap", "passt") or not name:
        raise LoadError(f"--net {value}: give tap=NAME or passt=SOCKET first")
    mac = None
    mtu = DEFAULT_MTU
    for part in rest:
        key, _, text = part.partition("=")
        if key == "mac":
            mac = parse_mac(text)
        elif key == "mtu" and text.isdecimal() and MIN_MTU <= int(text) <= MAX_MTU:
            mtu = int(text)
        else:
            raise LoadError(
                f"--net {value}: {part!r} is neither mac=ADDRESS nor mtu={MIN_MTU}..{MAX_MTU}"
            )
    return Net(Tap(name) if kind == "tap" else StreamLink.connect(name), mac=mac, mtu=mtu)


def vsock(value: str | None, args: argparse.Namespace) -> VirtioDevice:
    """`--vsock CID,SOCKET`."""
    from pkvm.vmm.virtio.vsock import Vsock

    cid, _, path = (value or "").partition(",")
    if not cid.isdecimal() or not path:
        raise LoadError(f"--vsock {value}: give a number of 3 or more, a comma, and a path")
    return Vsock(int(cid), path)


KINDS = (
    Kind(
        "--disk",
        "FILE[,ro][,dma]",
        "a raw disk image; ,ro: the guest may only read it; ,dma: rings and data move by DMA, "
        "through the SMMU",
        disk,
    ),
    Kind(
        "--net",
        "WIRE",
        "a network card: tap=NAME for a TAP interface, passt=SOCKET for a running passt, which "
        "needs no privileges; then ,mac=ADDRESS and ,mtu=N if wanted",
        net,
    ),
    Kind(
        "--vsock",
        "CID,SOCKET",
        "sockets between host and guest: the host connects to SOCKET and says CONNECT port, the "
        "guest's connections to port N come to SOCKET_N",
        vsock,
    ),
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
        self.faults = Faults()
        """What went wrong with them, in all lives of the VM."""
        self.by_slot: dict[int, VirtioDevice] = {}
        self._bus: VirtioBus | None = None
        try:
            for kind, value in args.devices:
                self.add(kind.make(value, args))
        except BaseException:
            self.close()
            raise

    def add(self, device: VirtioDevice) -> None:
        """Put one more into the next slot. Raises LoadError if there is none."""
        slot = len(self.by_slot)
        if slot == VIRTIO_SLOTS:
            device.close()
            raise LoadError(f"more virtio devices than the board has slots ({VIRTIO_SLOTS})")
        self.by_slot[slot] = device

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
