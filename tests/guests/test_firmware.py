# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest firmware: what it says of a good and of a bad hand-over, and of a hostile host."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.bare_board import PAYLOAD, RAM_BASE, RAM_BYTES, SLOT_BYTES, BareBoard, calls, device_tree
from fakes.kernels import program
from pkvm import fdt, guests
from pkvm.arm64 import psci, smccc
from pkvm.arm64 import registers as r
from pkvm.guests.agent import Agent
from pkvm.guests.protocol import Boot

HELLO = (PAYLOAD, len(guests.image("hello")), PAYLOAD)
TREE = fdt.build(device_tree(kernel=HELLO, bootargs="quiet"))
STACK_BYTES = 8192
HVC = struct.pack("<I", 0xD400_0002)


def start(board: BareBoard, **state: Any) -> str:
    """Enter the firmware with `hello` behind it; how that ends."""
    board.enter("firmware", **{"payload": "hello", "tree": TREE, **state})
    return board.run_to_end()


def last_line(board: BareBoard) -> str:
    return board.console.splitlines()[-1]


def test_good_hand_over(board: BareBoard) -> None:
    assert start(board) == "shutdown"
    assert "BAD" not in board.console
    assert "  KVM, protected VM, granule 4096: ok\n" in board.console
    assert "  rest of the slot zero: ok\n" in board.console
    assert "firmware: all as promised, starting the payload\nhello from" in board.console
    assert last_line(board) == "hello: arguments: quiet"


def test_good_non_protected(board: BareBoard) -> None:
    board.calls = calls(protected=False)
    tpidr = {r.TPIDR_EL1: 0x1DE7_EC7E_DBAD_C0DE}
    assert start(board, sysregs=tpidr) == "shutdown"
    assert "  KVM; not a protected VM\n" in board.console
    assert "BAD" not in board.console
    asked = {function for function, *_ in board.hypercalls}
    assert smccc.Function.HYP_MEMINFO not in asked


def test_good_without_kvm(board: BareBoard) -> None:
    del board.calls[smccc.Function.VENDOR_UID]
    assert start(board) == "shutdown"
    assert "  no KVM services; not a protected VM\n" in board.console


@pytest.mark.parametrize("base", [0x1000, 0x10_0000, 0x1F_0000])
def test_good_at_any_base(board: BareBoard, base: int) -> None:
    assert start(board, pc=base) == "shutdown"
    assert f"firmware: entered at {base:#x}\n" in board.console


def test_payload_gets_nothing_but_the_tree(board: BareBoard) -> None:
    tree = fdt.build(device_tree(kernel=(PAYLOAD, len(guests.image("agent")), PAYLOAD)))
    board.enter("firmware", payload="agent", tree=tree, x={3: 0x333, 14: 0xEEE})
    agent = Agent(board, on_mmio=board.serve)
    agent.start()
    state = agent.boot_state()
    assert state[Boot.X0] == RAM_BASE
    assert state[Boot.X0 + 1 : Boot.SP + 1] == (0,) * 31
    assert state[Boot.PC] == PAYLOAD
    assert state[Boot.SCTLR_EL1] == r.SCTLR_EL1_RESET
    assert state[Boot.DAIF] == 0x3C0
    assert (state[Boot.VBAR_EL1], state[Boot.TPIDR_EL1]) == (0, 0)
    assert board.read(SLOT_BYTES - STACK_BYTES, STACK_BYTES) == bytes(STACK_BYTES)


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ({"x": {15: 1}}, "X15, boot protocol version 0 is 0x1: BAD"),
        ({"x": {16: 1}}, "X16-X30 zero: BAD"),
        ({"x": {30: 1 << 63}}, "X16-X30 zero: BAD"),
        ({"sp": SLOT_BYTES - 8}, "SP at the slot's end, 0x1ffff8: BAD"),
        ({"sp": SLOT_BYTES - 16}, "SP at the slot's end, 0x1ffff0: BAD"),
        ({"sp": 0}, "SP at the slot's end, 0x0: BAD"),
        ({"sp": 0x3000}, "SP at the slot's end, 0x3000: BAD"),
        ({"sp": (1 << 64) - 4096}, "SP at the slot's end, 0xfffffffffffff000: BAD"),
        ({"pstate": 0x345}, "SP_EL1 in use, D, A, I, F masked, flags clear: BAD"),
        ({"pstate": 0x8000_03C5}, "SP_EL1 in use, D, A, I, F masked, flags clear: BAD"),
        ({"sysregs": {r.SCTLR_EL1: 0x00C5_0838}}, "SCTLR_EL1 at reset is 0xc50838: BAD"),
        ({"sysregs": {r.VBAR_EL1: 0x800}}, "CNTKCTL, CNTV_CTL zero: BAD"),
        ({"sysregs": {r.CPACR_EL1: 3 << 20}}, "CNTKCTL, CNTV_CTL zero: BAD"),
        ({"sysregs": {r.TPIDR_EL1: 1}}, "TPIDRs, TTBRs zero: BAD"),
        ({"sysregs": {r.TTBR1_EL1: 0x1000}}, "TPIDRs, TTBRs zero: BAD"),
    ],
)
def test_bad_state(board: BareBoard, state: dict[str, Any], line: str) -> None:
    assert start(board, **state) == "reset"
    assert f"{line}\n" in board.console
    assert board.console.count("BAD") == 1
    assert last_line(board) == "firmware: hand-over: not the state that was promised; resetting"


def test_bad_stack_pointer_selected(board: BareBoard) -> None:
    assert start(board, pstate=0x3C4) == "reset"
    assert "  SP_EL1 in use, D, A, I, F masked, flags clear: BAD\n" in board.console
    assert last_line(board) == "firmware: hand-over: not the state that was promised; resetting"


def test_bad_rest_of_slot(board: BareBoard) -> None:
    board.enter("firmware", payload="hello", tree=TREE)
    board.write(SLOT_BYTES // 2, b"\x01")
    assert board.run_to_end() == "reset"
    assert "rest of the slot zero: BAD\n" in board.console


@pytest.mark.parametrize(
    ("function", "x0", "line"),
    [
        (smccc.Function.SMCCC_VERSION, 0x1_0000, "SMCCC 1.0: BAD"),
        (smccc.Function.SMCCC_VERSION, smccc.NOT_SUPPORTED, "SMCCC 65535.65535: BAD"),
        (psci.Function.PSCI_VERSION, 2, "PSCI 0.2: BAD"),
        (smccc.Function.HYP_MEMINFO, 0x4000, "KVM, protected VM, granule 16384: BAD"),
    ],
)
def test_bad_hypervisor(board: BareBoard, function: int, x0: int, line: str) -> None:
    board.calls[function] = (x0, 0, 0, 0)
    assert start(board) == "reset"
    assert f"  {line}\n" in board.console


@pytest.mark.parametrize(
    ("x0", "reason"),
    [
        (0, "X0 is not an address in RAM"),
        (0x3000_0000, "X0 is not an address in RAM"),
        (1 << 40, "X0 is not an address in RAM"),
        (RAM_BASE + 4, "not aligned to 8 bytes"),
        (RAM_BASE + 8, "no device tree there"),
    ],
)
def test_bad_tree_address(board: BareBoard, x0: int, reason: str) -> None:
    assert start(board, x={0: x0}) == "reset"
    assert last_line(board) == f"firmware: device tree: {reason}; resetting"


def test_bad_tree_where_no_memory_is(board: BareBoard) -> None:
    """The host would gladly play a device there, and feed one tree now and another one later."""
    assert start(board, x={0: RAM_BASE + RAM_BYTES}) == "reset"
    assert last_line(board).startswith("exception: vector 0x200, ESR 0x96000010, at 0x")
    assert last_line(board).endswith(f"FAR {RAM_BASE + RAM_BYTES:#x}; resetting")


def changed(tree: fdt.Tree, path: str, name: str, value: bytes | None) -> bytes:
    node = tree.root.find(path)
    assert node is not None
    if value is None:
        del node.properties[name]
    else:
        node.properties[name] = value
    return fdt.build(tree)


def header(offset: int, value: int) -> bytes:
    """The good tree with one word of its header replaced."""
    return TREE[:offset] + struct.pack(">I", value) + TREE[offset + 4 :]


def ambiguous() -> bytes:
    tree = device_tree(kernel=HELLO)
    tree.root.add("config@1")
    return fdt.build(tree)


u64 = struct.Struct(">Q").pack


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (header(0, 0xD00DFEEE), "device tree: no device tree there"),
        (header(4, 48), "device tree: of an impossible size"),
        (header(4, (2 << 20) + 1), "device tree: of an impossible size"),
        (header(4, 0xFFFF_FFFF), "device tree: of an impossible size"),
        (header(8, 0xFFFF_FFFC), "device tree: its blocks do not fit in it"),
        (header(8, 0x3A), "device tree: its blocks do not fit in it"),
        (header(12, len(TREE)), "device tree: its blocks do not fit in it"),
        (header(16, 0x2C), "device tree: its blocks do not fit in it"),
        (header(20, 16), "device tree: not of version 17"),
        (header(24, 18), "device tree: not of version 17"),
        (header(32, 3), "device tree: malformed structure"),
        (header(36, 0), "device tree: malformed structure"),
        (header(36, 0xFFFF_FFFC), "device tree: its blocks do not fit in it"),
        (
            changed(device_tree(), "memory", "reg", None),
            "device tree: /memory: missing",
        ),
        (
            changed(device_tree(), "memory", "reg", u64(RAM_BASE)),
            "device tree: /memory: of a wrong form",
        ),
        (
            changed(device_tree(), "memory", "reg", u64(RAM_BASE) + u64(0)),
            "device tree: /memory: of a wrong form",
        ),
        (
            changed(device_tree(), "memory", "reg", u64(0) + u64(1 << 40)),
            "device tree: /memory: not at the board's RAM",
        ),
        (
            changed(device_tree(), "memory", "reg", u64(RAM_BASE) + u64((1 << 64) - RAM_BASE)),
            "device tree: /memory: of a wrong form",
        ),
        (
            changed(device_tree(), "memory", "reg", u64(RAM_BASE) + u64(1 << 40)),
            "device tree: /memory: not at the board's RAM",
        ),
        (
            changed(device_tree(), "memory", "reg", u64(RAM_BASE) + u64(64)),
            "device tree: not in /memory",
        ),
        (
            changed(device_tree(), "", "#address-cells", bytes(4)),
            "device tree: /memory: of a wrong form",
        ),
        (
            changed(device_tree(), "config", "kernel-size", None),
            "device tree: /config: missing",
        ),
        (
            changed(device_tree(), "config", "kernel-entry", b"\0" * 4),
            "device tree: /config: of a wrong form",
        ),
        (ambiguous(), "device tree: /config: there twice"),
        (
            fdt.build(device_tree(kernel=(PAYLOAD, 0, PAYLOAD))),
            "payload: not in /memory",
        ),
        (
            fdt.build(device_tree(kernel=(0, 4096, 0))),
            "payload: not in /memory",
        ),
        (
            fdt.build(device_tree(kernel=(PAYLOAD, RAM_BYTES, PAYLOAD))),
            "payload: not in /memory",
        ),
        (
            fdt.build(device_tree(kernel=(PAYLOAD, (1 << 64) - 1, PAYLOAD))),
            "payload: not in /memory",
        ),
        (
            fdt.build(device_tree(kernel=(RAM_BASE, 4096, RAM_BASE))),
            "payload: overlaps the device tree",
        ),
        (
            fdt.build(device_tree(kernel=(PAYLOAD, 4096, PAYLOAD + 4096))),
            "payload: entry outside of it or not aligned to 4 bytes",
        ),
        (
            fdt.build(device_tree(kernel=(PAYLOAD, 4096, PAYLOAD + 2))),
            "payload: entry outside of it or not aligned to 4 bytes",
        ),
        (
            fdt.build(device_tree(kernel=(PAYLOAD, 4096, PAYLOAD - 4))),
            "payload: entry outside of it or not aligned to 4 bytes",
        ),
    ],
)
def test_bad_tree(board: BareBoard, tree: bytes, reason: str) -> None:
    assert start(board, tree=tree) == "reset"
    assert last_line(board) == f"firmware: {reason}; resetting"


def boot(
    board: BareBoard,
    kernel: bytes,
    *,
    at: int = PAYLOAD,
    entry: int | None = None,
    initrd: tuple[bytes | None, bytes | None] = (None, None),
) -> str:
    """Enter the firmware with a kernel at `at`; how that ends."""
    tree = device_tree(kernel=(at, len(kernel), at if entry is None else entry))
    chosen = tree.root.find("chosen")
    assert chosen is not None
    for name, value in zip(("start", "end"), initrd, strict=True):
        if value is not None:
            chosen.properties[f"linux,initrd-{name}"] = value
    board.enter("firmware", payload=bytes(at - PAYLOAD) + kernel, tree=fdt.build(tree))
    return board.run_to_end()


@pytest.mark.parametrize("text_offset", [0, 0x8_0000])
@pytest.mark.parametrize("page", [0, 1])
def test_good_kernel(board: BareBoard, text_offset: int, page: int) -> None:
    kernel = program("hello", text_offset=text_offset, flags=8 | page << 1)
    assert boot(board, kernel, at=PAYLOAD + text_offset) == "shutdown"
    assert "  it is a kernel Image\n" in board.console
    assert "hello from" in board.console


def test_a_kernel_of_old_says_nothing_of_where_it_stands(board: BareBoard) -> None:
    kernel = program("hello", text_offset=0x1234, image_size=0)
    assert boot(board, kernel, at=PAYLOAD + 0x8_0000) == "shutdown"


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ({"text_offset": 4096}, "that is not text_offset above a multiple of 2 MiB"),
        ({"text_offset": 2**64 - 4096}, "that is not text_offset above a multiple of 2 MiB"),
        ({"image_size": 1 << 20}, "that needs more memory than /config says"),
        ({"image_size": 2**64 - 1}, "that needs more memory than /config says"),
        ({"flags": 1}, "big-endian"),
        ({"flags": 2 << 1}, "with pages of a size that this CPU does not have"),
    ],
)
def test_bad_kernel(board: BareBoard, numbers: dict[str, int], reason: str) -> None:
    assert boot(board, program("hello", **numbers)) == "reset"
    assert reason in last_line(board)
    assert last_line(board).startswith("firmware: payload: a ")


def test_bad_entry_of_a_kernel(board: BareBoard) -> None:
    assert boot(board, program("hello"), entry=PAYLOAD + 4096) == "reset"
    assert "payload: a kernel that is not entered at its first byte" in last_line(board)


u32 = struct.Struct(">I").pack
INITRD = PAYLOAD + 0x10_0000


@pytest.mark.parametrize("pack", [u32, u64])
def test_good_initramfs(board: BareBoard, pack: Any) -> None:
    assert boot(board, program("hello"), initrd=(pack(INITRD), pack(INITRD + 4097))) == "shutdown"
    assert f"  initramfs {INITRD:#x}, 4097 bytes\n" in board.console


@pytest.mark.parametrize(
    ("start_and_end", "reason"),
    [
        ((u64(INITRD), None), "missing"),
        ((None, u64(INITRD)), "missing"),
        ((u64(INITRD), b"123"), "of a wrong form"),
        ((u64(INITRD), u64(INITRD)), "not in /memory"),
        ((u64(INITRD), u64(INITRD - 1)), "not in /memory"),
        ((u64(0), u64(4096)), "not in /memory"),
        ((u64(INITRD), u64(RAM_BASE + RAM_BYTES + 1)), "not in /memory"),
        ((u64(2**64 - 4096), u64(2**64 - 1)), "not in /memory"),
        ((u64(RAM_BASE + 64), u64(RAM_BASE + 128)), "overlaps the payload or the device tree"),
        ((u64(PAYLOAD + 4096), u64(INITRD)), "overlaps the payload or the device tree"),
    ],
)
def test_bad_initramfs(
    board: BareBoard, start_and_end: tuple[bytes | None, bytes | None], reason: str
) -> None:
    assert boot(board, program("hello"), initrd=start_and_end) == "reset"
    assert last_line(board) == (f"firmware: device tree: /chosen: initramfs: {reason}; resetting")


def test_bad_memory_that_is_not_there(board: BareBoard) -> None:
    """/memory may claim what the host never gave; the payload's pages are touched."""
    tree = device_tree(
        kernel=(RAM_BASE + RAM_BYTES, 4096, RAM_BASE + RAM_BYTES),
        memory=(RAM_BASE, 2 * RAM_BYTES),
    )
    assert start(board, tree=fdt.build(tree)) == "reset"
    assert last_line(board).startswith("exception: ")


@given(
    edits=st.lists(st.tuples(st.integers(0, len(TREE) - 1), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, len(TREE)) | st.just(len(TREE)),
    tail=st.binary(max_size=64),
)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_rubbish_tree(
    shared_board: BareBoard, edits: list[tuple[int, int]], cut: int, tail: bytes
) -> None:
    """Whatever the tree: the payload is entered inside of RAM, or a reason is given."""
    board = shared_board
    board.calls = calls()
    tree = bytearray(TREE)
    for offset, value in edits:
        tree[offset] = value
    # Every word of RAM asks for the end with X0 as the function: the tree's address.
    board.ends[RAM_BASE] = "entered"
    rubbish = (bytes(tree[:cut]) + tail + bytes(3))[: (cut + len(tail) + 3) & ~3]
    room = (PAYLOAD - RAM_BASE - len(rubbish)) // 4
    board.enter("firmware", payload=HVC * (3 << 19), tree=rubbish + HVC * room)
    ended = board.run_to_end()
    del board.ends[RAM_BASE]
    if ended == "entered":
        assert last_line(board) == "firmware: all as promised, starting the payload"
        assert RAM_BASE < board.engine.pc < RAM_BASE + RAM_BYTES
    else:
        assert ended == "reset"
        assert last_line(board).startswith(("firmware: device tree: ", "firmware: payload: "))
