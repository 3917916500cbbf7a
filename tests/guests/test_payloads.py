# SPDX-License-Identifier: GPL-2.0-or-later
"""hello and sharing, entered as payloads are: X0 = device tree, nothing else."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest

from fakes.bare_board import PAYLOAD, BareBoard, calls, device_tree
from pkvm import fdt
from pkvm.arm64 import smccc
from pkvm.guests.protocol import MAILBOX_BASE, Event, Mailbox
from pkvm.kvm.exits import Mmio

PAGE = 4096


def start(
    board: BareBoard, program: str, device: Callable[[Mmio], int | None] | None = None
) -> str:
    """Enter a payload where the firmware would."""
    tree = fdt.build(device_tree(bootargs="one two=\x1b[31m"))
    board.enter(b"", payload=program, tree=tree, pc=0, sp=0)
    board.engine.pc = PAYLOAD
    return board.run_to_end(device)


def test_hello(board: BareBoard) -> None:
    assert start(board, "hello") == "shutdown"
    assert board.console == "hello from the guest\nhello: arguments: one two=?[31m\n"


def test_hello_without_device_tree(board: BareBoard) -> None:
    board.enter("hello", x={0: 0})
    assert board.run_to_end() == "shutdown"
    assert board.console == "hello from the guest\n"


class Vmm:
    """The VMM's side of the sharing demonstration."""

    def __init__(self, board: BareBoard, reply: bytes = b"hi, guest") -> None:
        self.board = board
        self.reply = reply
        self.registers: dict[int, int] = {}
        self.events: list[tuple[int, int]] = []

    def __call__(self, mmio: Mmio) -> int:
        assert mmio.size == 8
        offset = mmio.address - MAILBOX_BASE
        if offset != Mailbox.COMMAND:
            self.registers[offset] = mmio.data
            return 0
        page, length, crc, shared = (self.registers[Mailbox.ARG + 8 * n] for n in range(4))
        self.events.append((mmio.data, shared))
        if mmio.data == Event.SHARED:
            content = self.board.read(page, length)
            assert (page % PAGE, length) == (0, PAGE)
            assert zlib.crc32(content) == crc
            assert content.startswith(b"Hello, host.")
            assert content[PAGE // 2 :] == bytes(PAGE // 2)
            self.board.write(page + PAGE // 2, self.reply)
            self.page = page
        return 0


def memory_calls(board: BareBoard) -> list[tuple[int, ...]]:
    wanted = (smccc.Function.MEM_SHARE, smccc.Function.MEM_UNSHARE)
    return [call for call in board.hypercalls if call[0] in wanted]


def test_sharing(board: BareBoard) -> None:
    vmm = Vmm(board)
    assert start(board, "sharing", vmm) == "shutdown"
    assert vmm.events == [(Event.SHARED, 1), (Event.UNSHARED, 0)]
    assert memory_calls(board) == [
        (smccc.Function.MEM_SHARE, vmm.page, 0, 0),
        (smccc.Function.MEM_UNSHARE, vmm.page, 0, 0),
    ]
    assert board.console == (
        f"sharing: shared the page at {vmm.page:#x}\n"
        "sharing: the VMM says: hi, guest\n"
        "sharing: took the page back\n"
        "sharing: my private pages are as I left them\n"
    )


def test_sharing_where_it_is_not_offered(board: BareBoard) -> None:
    board.calls = calls(protected=False)
    vmm = Vmm(board)
    assert start(board, "sharing", vmm) == "shutdown"
    assert vmm.events == [(Event.SHARED, 0), (Event.UNSHARED, 0)]
    assert memory_calls(board) == []
    assert "not offered here, using the page as it is" in board.console


def test_sharing_does_not_print_a_hostile_reply(board: BareBoard) -> None:
    assert start(board, "sharing", Vmm(board, b"\x1b[2J" + b"A" * 2044)) == "shutdown"
    assert "\nsharing: the VMM says: ?[2J" + "A" * 124 + "\n" in board.console


@pytest.mark.parametrize(
    ("function", "word"),
    [(smccc.Function.MEM_SHARE, "MEM_SHARE"), (smccc.Function.MEM_UNSHARE, "MEM_UNSHARE")],
)
def test_sharing_refused(board: BareBoard, function: int, word: str) -> None:
    board.calls[function] = (smccc.INVALID_PARAMETER, 0, 0, 0)
    assert start(board, "sharing", Vmm(board)) == "reset"
    assert board.console.endswith(f"sharing: {word} failed: invalid parameter (-3); resetting\n")


@pytest.mark.parametrize("distance", [-PAGE, PAGE, -4 * PAGE, 5 * PAGE - 1])
def test_sharing_notices_a_changed_private_page(board: BareBoard, distance: int) -> None:
    vmm = Vmm(board)

    def tampering(mmio: Mmio) -> int:
        answer = vmm(mmio)
        if mmio.address == MAILBOX_BASE and mmio.data == Event.SHARED:
            spot = vmm.page + distance
            board.write(spot, bytes((board.read(spot, 1)[0] ^ 1,)))
        return answer

    assert start(board, "sharing", tampering) == "reset"
    assert board.console.endswith("sharing: my private pages were CHANGED; resetting\n")


def test_smp_without_device_tree(board: BareBoard) -> None:
    board.enter(b"", payload="smp", sp=0)
    board.engine.pc = PAYLOAD
    assert board.run_to_end() == "reset"
    assert board.console == "smp: no device tree there; resetting\n"
