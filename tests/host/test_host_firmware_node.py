# SPDX-License-Identifier: GPL-2.0-or-later
"""The reserved-memory node of the guest firmware: taken, or ignored with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pkvm import fdt
from pkvm.host.firmware_node import COMPATIBLE, FirmwareRegion, guest_firmware

BASE, SIZE = 0x9000_0000, 0x10_0000


def tree(*changes: Callable[[fdt.Node], None], cells: int = 2) -> bytes:
    """A host's tree with a firmware node for each change, which may spoil it."""
    made = fdt.Tree()
    reserved = made.root.add("reserved-memory")
    reserved.set_u32("#address-cells", cells)
    reserved.set_u32("#size-cells", cells)
    for index, change in enumerate(changes):
        node = reserved.add(f"firmware@{index}")
        node.set_strings("compatible", "vendor,other", COMPATIBLE)
        (node.set_u64 if cells == 2 else node.set_u32)("reg", BASE + index * SIZE, SIZE)
        node.set_empty("no-map")
        change(node)
    return fdt.build(made)


def good(node: fdt.Node) -> None:
    """Leave it as it is."""


def find(blob: bytes, protected: bool = True) -> tuple[FirmwareRegion | None, list[str]]:
    said: list[str] = []
    return guest_firmware(blob, protected, said.append), said


@pytest.mark.parametrize("cells", [1, 2])
def test_a_good_node_is_taken_and_logged(cells: int) -> None:
    region, said = find(tree(good, cells=cells))
    assert region == (BASE, SIZE)
    assert len(said) == 1
    assert f"{BASE:#x}" in said[0]


def no_map_absent(node: fdt.Node) -> None:
    del node.properties["no-map"]


def reusable(node: fdt.Node) -> None:
    node.set_empty("reusable")


def base_unaligned(node: fdt.Node) -> None:
    node.set_u64("reg", BASE + 0x800, SIZE)


def size_unaligned(node: fdt.Node) -> None:
    node.set_u64("reg", BASE, SIZE + 1)


def size_zero(node: fdt.Node) -> None:
    node.set_u64("reg", BASE, 0)


def two_ranges(node: fdt.Node) -> None:
    node.set_u64("reg", BASE, SIZE, BASE + SIZE, SIZE)


def no_reg(node: fdt.Node) -> None:
    del node.properties["reg"]


def odd_reg(node: fdt.Node) -> None:
    node.properties["reg"] = bytes(9)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_map_absent, "no-map"),
        (reusable, "reusable"),
        (base_unaligned, "base"),
        (size_unaligned, "size"),
        (size_zero, "size"),
        (two_ranges, "2 ranges"),
        (no_reg, "'reg'"),
        (odd_reg, "9 bytes"),
    ],
)
def test_a_malformed_node_is_ignored_with_its_reason(
    change: Callable[[fdt.Node], None], reason: str
) -> None:
    region, said = find(tree(change))
    assert region is None
    assert len(said) == 1
    assert "ignoring" in said[0]
    assert reason in said[0]


def test_a_second_node_is_ignored() -> None:
    region, said = find(tree(good, good))
    assert region == (BASE, SIZE)
    assert "registered already" in said[1]


def test_a_bad_node_does_not_spoil_the_good_one_after_it() -> None:
    region, said = find(tree(reusable, good))
    assert region == (BASE + SIZE, SIZE)
    assert len(said) == 2


def test_a_host_that_is_not_in_protected_mode_ignores_the_firmware() -> None:
    region, said = find(tree(good), protected=False)
    assert region is None
    assert "not in protected mode" in said[0]


def test_other_nodes_and_none_at_all_are_no_firmware() -> None:
    def other(node: fdt.Node) -> None:
        node.set_strings("compatible", "shared-dma-pool")

    assert find(tree(other)) == (None, [])
    assert find(fdt.build(fdt.Tree())) == (None, [])


def test_a_tree_that_cannot_be_read_is_said() -> None:
    region, said = find(b"garbage")
    assert region is None
    assert "cannot be read" in said[0]
