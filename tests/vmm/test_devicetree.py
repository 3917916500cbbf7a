# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's device tree says what the board is, and dtc finds no fault in it."""

from __future__ import annotations

import subprocess

import pytest

from pkvm import fdt
from pkvm.vmm.board import IMAGE_BASE, Board
from pkvm.vmm.devicetree import build_device_tree
from pkvm.vmm.loader import Image, Segment

IMAGE = Image((Segment(IMAGE_BASE, b"x" * 100, 5000), Segment(0x4100_0000, b"", 8)), 0x4020_0040)


def test_the_tree_describes_the_board() -> None:
    board = Board(ram_bytes=32 << 20, cpus=3, command_line="console=ttyAMA0 quiet")
    root = fdt.parse(build_device_tree(board, IMAGE)).root

    def node(path: str) -> fdt.Node:
        found = root.find(path)
        assert found is not None, path
        return found

    assert node("/memory").reg(root) == [(0x4000_0000, 32 << 20)]
    assert [cpu.u32("reg") for cpu in node("/cpus").children] == [0, 1, 2]
    assert all(cpu.string("enable-method") == "psci" for cpu in node("/cpus").children)
    assert node("/psci").string("method") == "hvc"
    assert node("/psci").is_compatible("arm,psci-1.0")
    assert node("/pl011").reg(root) == [(0x0900_0000, 0x1000)]
    assert node("/mailbox").reg(root) == [(0x0B00_0000, 0x1000)]
    assert node("/chosen").string("bootargs") == "console=ttyAMA0 quiet"
    assert root.find(node("/chosen").string("stdout-path")) is node("/pl011")
    config = node("/config")
    assert config.u64("kernel-address") == IMAGE_BASE
    assert config.u64("kernel-size") == 0x4100_0008 - IMAGE_BASE
    assert config.u64("kernel-entry") == 0x4020_0040


@pytest.mark.parametrize("cpus", [1, 8])
def test_dtc_finds_no_fault(cpus: int) -> None:
    blob = build_device_tree(Board(cpus=cpus, command_line="a b"), IMAGE)
    done = subprocess.run(
        ["dtc", "-I", "dtb", "-O", "dts", "-"], input=blob, capture_output=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == b""
