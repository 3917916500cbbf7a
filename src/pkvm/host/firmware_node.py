# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest firmware that the host's boot firmware left in memory (RFC patch 3/4, facts §1.5).

A node under /reserved-memory, compatible `linux,pkvm-guest-firmware-memory`,
names it. A node that breaks a rule is ignored, with a message that says which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pkvm import fdt
from pkvm.host.ports import PAGE_MASK

COMPATIBLE = "linux,pkvm-guest-firmware-memory"


class FirmwareRegion(NamedTuple):
    """Memory that holds the guest firmware: PA and bytes, both page-aligned."""

    base: int
    size: int


def guest_firmware(
    host_dtb: bytes, protected: bool, say: Callable[[str], None]
) -> FirmwareRegion | None:
    """The region that the host's device tree reserves for the guest firmware, None if none.

    `protected` tells whether the host is in protected mode. `say` gets one line about each node
    that names guest firmware: where it is, or why it is ignored; and one about a tree that
    cannot be read.
    """
    try:
        reserved = fdt.parse(host_dtb).root.find("reserved-memory")
    except fdt.FdtError as error:
        say(f"the host's device tree cannot be read: {error}")
        return None
    if reserved is None:
        return None
    region: FirmwareRegion | None = None
    for node in reserved.children:
        try:
            if not node.is_compatible(COMPATIBLE):
                continue
            found = _read(node, reserved)
            _check(node, found, protected, region)
        except fdt.FdtError as error:
            say(f"ignoring guest firmware node {node.name}: {error}")
            continue
        region = found
        say(f"guest firmware: {found.size:#x} bytes at PA {found.base:#x}")
    return region


def _read(node: fdt.Node, reserved: fdt.Node) -> FirmwareRegion:
    """The node's one range. Raises FdtError."""
    ranges = node.reg(reserved)
    if len(ranges) != 1:
        raise fdt.FdtError(f"it names {len(ranges)} ranges of memory, not one")
    return FirmwareRegion(*ranges[0])


def _check(
    node: fdt.Node, found: FirmwareRegion, protected: bool, before: FirmwareRegion | None
) -> None:
    """The kernel's rules, in its order. Raises FdtError with the reason to ignore the node."""
    if not protected:
        raise fdt.FdtError("the host is not in protected mode")
    if before is not None:
        raise fdt.FdtError(f"a firmware region at PA {before.base:#x} was registered already")
    if "no-map" not in node:
        raise fdt.FdtError("property no-map is missing: the host could read the firmware")
    if "reusable" in node:
        raise fdt.FdtError("property reusable is present: the host could overwrite the firmware")
    if found.base & PAGE_MASK:
        raise fdt.FdtError(f"its base {found.base:#x} is not page-aligned")
    if found.size & PAGE_MASK or not found.size:
        raise fdt.FdtError(f"its size {found.size:#x} is not a whole number of pages")
