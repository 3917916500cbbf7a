# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's device tree says what the board is, and dtc finds no fault in it."""

from __future__ import annotations

import subprocess
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvm import fdt
from pkvm.vmm.board import IMAGE_BASE, Board
from pkvm.vmm.devicetree import build_device_tree
from pkvm.vmm.errors import LoadError
from pkvm.vmm.loader import Image, Segment

IMAGE = Image((Segment(IMAGE_BASE, b"x" * 100, 5000), Segment(0x4100_0000, b"", 8)), 0x4020_0040)
INITRD = Segment(0x4140_0000, b"i" * 4097, 4097)
FULL = Board(
    ram_bytes=64 << 20,
    cpus=8,
    command_line="console=ttyAMA0",
    gic=True,
    virtio_slots=(9, 0, 31),
    bounce_bytes=8 << 20,
    rng_seed=bytes(range(64)),
    kaslr_seed=0x0123_4567_89AB_CDEF,
)


def root_of(board: Board, initrd: Segment | None = None) -> fdt.Node:
    return fdt.parse(build_device_tree(board, IMAGE, initrd)).root


def node(root: fdt.Node, path: str) -> fdt.Node:
    found = root.find(path)
    assert found is not None, path
    return found


def test_the_tree_describes_the_board() -> None:
    board = Board(ram_bytes=32 << 20, cpus=3, command_line="console=ttyAMA0 quiet")
    root = root_of(board)
    assert node(root, "/memory").reg(root) == [(0x4000_0000, 32 << 20)]
    cpus = node(root, "/cpus").children
    assert [cpu.u32("reg") for cpu in cpus] == [0, 1, 2]
    assert all(cpu.string("enable-method") == "psci" for cpu in cpus)
    assert node(root, "/psci").string("method") == "hvc"
    assert node(root, "/psci").is_compatible("arm,psci-1.0")
    assert node(root, "/pl011").reg(root) == [(0x0900_0000, 0x1000)]
    assert node(root, "/mailbox").reg(root) == [(0x0B00_0000, 0x1000)]
    assert node(root, "/chosen").string("bootargs") == "console=ttyAMA0 quiet"
    assert root.find(node(root, "/chosen").string("stdout-path")) is node(root, "/pl011")
    config = node(root, "/config")
    assert config.u64("kernel-address") == IMAGE_BASE
    assert config.u64("kernel-size") == 0x4100_0008 - IMAGE_BASE
    assert config.u64("kernel-entry") == 0x4020_0040


def test_a_board_without_an_interrupt_controller_names_no_interrupt() -> None:
    for path, each in root_of(Board()).walk():
        names = set(each.properties)
        assert not names & {"interrupts", "interrupt-parent", "interrupt-controller"}, path
        assert not names & {"rng-seed", "kaslr-seed", "linux,initrd-start"}, path
    assert root_of(Board()).find("/timer") is None


def test_interrupts_are_those_of_qemus_virt() -> None:
    root = root_of(FULL)
    gic = node(root, "/intc@8000000")
    assert gic.is_compatible("arm,gic-v3")
    assert gic.reg(root) == [(0x0800_0000, 0x1_0000), (0x080A_0000, 8 * 0x2_0000)]
    assert gic.u32("#interrupt-cells") == 3
    assert "interrupt-controller" in gic
    assert root.u32("interrupt-parent") == gic.u32("phandle")
    timer = node(root, "/timer")
    assert timer.is_compatible("arm,armv8-timer")
    assert timer.cells("interrupts") == (1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4)
    assert node(root, "/pl011").cells("interrupts") == (0, 1, 4)
    assert node(root, "/pl031").cells("interrupts") == (0, 2, 4)
    assert node(root, "/pl031").reg(root) == [(0x0901_0000, 0x1000)]
    assert [path for path, each in root.walk() if "interrupt-map" in each] == []


def test_primecells_have_their_clocks() -> None:
    root = root_of(FULL)
    clock = node(root, "/apb-pclk").u32("phandle")
    assert node(root, "/pl011").cells("clocks") == (clock, clock)
    assert node(root, "/pl011").strings("clock-names") == ("uartclk", "apb_pclk")
    assert node(root, "/pl031").cells("clocks") == (clock,)


def test_virtio_slots_stand_in_order_and_use_the_pool() -> None:
    root = root_of(FULL)
    slots = [each for each in root.children if each.name.startswith("virtio_mmio")]
    assert [slot.reg(root) for slot in slots] == [
        [(0x0A00_0000 + 0x200 * n, 0x200)] for n in (0, 9, 31)
    ]
    assert [slot.cells("interrupts") for slot in slots] == [(0, 16 + n, 4) for n in (0, 9, 31)]
    pool = node(root, "/reserved-memory/restricted-dma")
    assert pool.is_compatible("restricted-dma-pool")
    assert pool.reg(node(root, "/reserved-memory")) == [(0x4380_0000, 8 << 20)]
    for slot in slots:
        assert slot.is_compatible("virtio,mmio")
        assert "dma-coherent" in slot
        assert slot.u32("memory-region") == pool.u32("phandle")


def test_without_a_pool_nothing_is_reserved() -> None:
    root = root_of(Board(gic=True, virtio_slots=(3,)))
    assert root.find("/reserved-memory") is None
    assert "memory-region" not in node(root, "/virtio_mmio@a000600")


def test_the_kernel_learns_of_its_initramfs_and_seeds() -> None:
    chosen = node(root_of(FULL, INITRD), "/chosen")
    assert chosen.u64("linux,initrd-start") == INITRD.ipa
    assert chosen.u64("linux,initrd-end") == INITRD.ipa + 4097
    assert chosen.raw("rng-seed") == bytes(range(64))
    assert chosen.u64("kaslr-seed") == 0x0123_4567_89AB_CDEF


def test_phandles_are_unique_and_lead_somewhere() -> None:
    root = root_of(FULL, INITRD)
    phandles = [each.u32("phandle") for _, each in root.walk() if "phandle" in each]
    assert len(set(phandles)) == len(phandles) == 3


def test_devices_and_memory_do_not_overlap() -> None:
    board = Board(
        ram_bytes=64 << 20, cpus=8, gic=True, virtio_slots=tuple(range(32)), bounce_bytes=1 << 20
    )
    root = root_of(board)
    ranges = [(0, 2 << 20)]
    for each in root.children:
        if "reg" in each:
            ranges += each.reg(root)
    for (one, one_bytes), (other, other_bytes) in combinations(ranges, 2):
        assert one + one_bytes <= other or other + other_bytes <= one


def dtc(blob: bytes) -> str:
    done = subprocess.run(
        ["dtc", "-I", "dtb", "-O", "dts", "-"], input=blob, capture_output=True, check=False
    )
    assert done.returncode == 0
    return done.stderr.decode()


@pytest.mark.parametrize("cpus", [1, 8])
@pytest.mark.parametrize("gic", [False, True])
@pytest.mark.parametrize("initrd", [None, INITRD])
def test_dtc_finds_no_fault(cpus: int, gic: bool, initrd: Segment | None) -> None:
    board = Board(cpus=cpus, command_line="a b", gic=gic)
    assert dtc(build_device_tree(board, IMAGE, initrd)) == ""


@pytest.mark.parametrize("slots", [(0,), tuple(range(32))])
@pytest.mark.parametrize("bounce", [0, 4 << 20])
def test_dtc_finds_no_fault_with_devices(slots: tuple[int, ...], bounce: int) -> None:
    board = Board(
        gic=True, virtio_slots=slots, bounce_bytes=bounce, rng_seed=b"x" * 64, kaslr_seed=1
    )
    assert dtc(build_device_tree(board, IMAGE, INITRD)) == ""


@given(
    st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=100),
    st.integers(1, 8),
    st.sets(st.integers(0, 31)),
    st.binary(max_size=256),
    st.integers(0, 2**64 - 1),
)
def test_every_board_has_a_tree(
    line: str, cpus: int, slots: set[int], seed: bytes, kaslr: int
) -> None:
    board = Board(
        cpus=cpus,
        command_line=line,
        gic=True,
        virtio_slots=tuple(slots),
        rng_seed=seed,
        kaslr_seed=kaslr,
    )
    chosen = node(root_of(board), "/chosen")
    assert chosen.strings("bootargs") == (line,)
    assert chosen.properties.get("rng-seed", b"") == seed
    assert chosen.u64("kaslr-seed") == kaslr


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"virtio_slots": (0,)}, "need the board's interrupt controller"),
        ({"gic": True, "virtio_slots": (0, 0)}, "32 virtio slots, for one device each"),
        ({"gic": True, "virtio_slots": (32,)}, "32 virtio slots"),
        ({"gic": True, "virtio_slots": (-1,)}, "32 virtio slots"),
        ({"bounce_bytes": 4096}, "multiple of 4K from 1M up"),
        ({"bounce_bytes": (1 << 20) + 1}, "multiple of 4K"),
        ({"bounce_bytes": 16 << 20}, "less than the guest's memory"),
        ({"bounce_bytes": -4096}, "bounce pool"),
        ({"rng_seed": bytes(257)}, "rng-seed"),
        ({"command_line": "\udc80"}, "not text in UTF-8"),
    ],
)
def test_a_board_that_cannot_be_is_refused(options: dict[str, object], what: str) -> None:
    with pytest.raises(LoadError, match=what):
        Board(**options)  # type: ignore[arg-type]
