# SPDX-License-Identifier: GPL-2.0-or-later
"""The native hooks: the AArch64 ones run in an emulated CPU, so that any host checks them."""

from __future__ import annotations

import mmap
import struct
import sys

import pytest

from fakes.cpu_guest import CODE, Guest, add, hvc, movz
from pkvm.machine.cpu import thunks
from pkvm.machine.cpu.engine import StopReason

HOOKS = 0x1_0000
STUBS = 0x1_2000
CELLS = 0x1_4000
STACK = 0x1_8000
CALLED = ("DO_INTERRUPT", "EMU_STOP", "VECTOR", "SLOW", "EMU_START")
CELL = {
    name: CELLS + 64 * index
    for index, name in enumerate(
        (
            "PC",
            "COUNTERS",
            "REQUESTS",
            "PENDING",
            "NO_EXIT",
            "TARGET_EL",
            "AARCH64",
            "SYNDROME",
            "ESR_EL2",
            "VADDRESS",
            "FAR_EL2",
        )
    )
}
RET = 0xD65F03C0
MOV_X21_X0 = 0xAA0003F5
MOV_X0_X22 = 0xAA1603E0


class Aarch64Host:
    """A guest that runs the AArch64 hooks; the functions they call add their number to X20."""

    def __init__(self) -> None:
        self.guest = Guest()
        pool = {"UC": 0xAAAA, "CPU": 0xCCCC, **CELL}
        for number, name in enumerate(CALLED, 1):
            pool[name] = STUBS + 16 * number
            self.guest.write(pool[name], add(20, 20, number), MOV_X21_X0, MOV_X0_X22, RET)
        self.guest.write_bytes(HOOKS, thunks.image(thunks.AARCH64, pool))
        self.guest.write(CODE, hvc(0))
        self.set(NO_EXIT=1, AARCH64=1, TARGET_EL=2, SYNDROME=0x5A00_0001, VADDRESS=0x7000)
        self.counters(0, thunks.NO_LIMIT, 0, 99)

    def set(self, **cells: int) -> None:
        for name, value in cells.items():
            self.guest.write_bytes(CELL[name], struct.pack("<Q", value))

    def get(self, name: str) -> int:
        return self.guest.read(CELL[name])

    def counters(self, *words: int) -> tuple[int, ...]:
        if words:
            self.guest.write_bytes(CELL["COUNTERS"], struct.pack("<4Q", *words))
        return tuple(self.guest.read(CELL["COUNTERS"] + 8 * index) for index in range(4))

    def call(self, entry: int, number: int = 0, result: int = 0) -> tuple[int, int]:
        """Sum of the numbers of the functions called, which all return `result`, and the last
        one's first argument."""
        engine = self.guest.engine
        engine.x[0], engine.x[1], engine.x[20], engine.x[30] = 0xAAAA, number, 0, CODE
        engine.x[22] = result
        engine.set_sp(1, STACK)
        engine.pc = HOOKS + entry
        engine.vector = lambda: False
        assert engine.run() is StopReason.VECTOR
        assert (engine.esr_el2, engine.pc, engine.sp(1)) == (0x5A00_0000, CODE + 4, STACK)
        return engine.x[20], engine.x[21]

    def exception(self, number: int) -> tuple[int, int]:
        return self.call(thunks.AARCH64.exception, number)


DO_INTERRUPT, EMU_STOP, VECTOR, SLOW, EMU_START = range(1, 6)


def test_aarch64_hypercall_goes_to_the_vector() -> None:
    host = Aarch64Host()
    assert host.exception(11)[0] == VECTOR
    assert (host.get("ESR_EL2"), host.get("FAR_EL2")) == (0x5A00_0001, 0)


def test_aarch64_vector_may_stop_emulation() -> None:
    host = Aarch64Host()
    assert host.call(thunks.AARCH64.exception, 11, result=1) == (VECTOR + EMU_STOP, 0xAAAA)


def test_aarch64_start_is_at_pc_without_end_or_limits() -> None:
    host = Aarch64Host()
    host.set(PC=0x4000_0000)
    engine = host.guest.engine
    for number in (2, 3, 4):
        engine.x[number] = 0x77
    assert host.call(thunks.AARCH64.start, result=5) == (EMU_START, 0xAAAA)
    assert [engine.x[number] for number in range(5)] == [5, 0x4000_0000, 0, 0, 0]


@pytest.mark.parametrize("number", [3, 4])
def test_aarch64_abort_fills_far_and_stops(number: int) -> None:
    host = Aarch64Host()
    assert host.exception(number) == (EMU_STOP, 0xAAAA)
    assert (host.get("FAR_EL2"), host.get("PENDING")) == (0x7000, 1)
    assert host.call(thunks.AARCH64.start, result=5)[0] == EMU_START
    assert host.guest.engine.x[0] == thunks.ABORT & 0xFFFF_FFFF
    assert host.get("PENDING") == 0


@pytest.mark.parametrize("lines", [0x40, 0x200])
def test_aarch64_abort_with_a_pending_interrupt_goes_to_the_vector(lines: int) -> None:
    host = Aarch64Host()
    host.set(REQUESTS=lines)
    assert host.exception(4)[0] == VECTOR
    assert (host.get("FAR_EL2"), host.get("PENDING")) == (0x7000, 0)


@pytest.mark.parametrize(
    ("number", "cells"),
    [
        (11, {"NO_EXIT": 0}),
        (11, {"AARCH64": 0}),
        (14, {}),
        (16, {"TARGET_EL": 1}),
        (2, {"TARGET_EL": 3}),
        (2, {"TARGET_EL": 1, "NO_EXIT": 0}),
    ],
)
def test_aarch64_doubtful_cases_go_to_python(number: int, cells: dict[str, int]) -> None:
    host = Aarch64Host()
    host.set(**cells)
    assert host.exception(number) == (SLOW, 0xAAAA)
    assert host.get("ESR_EL2") == 0


def test_aarch64_delivery_to_el1_counts_only_storms() -> None:
    host = Aarch64Host()
    host.set(TARGET_EL=1)
    host.counters(10, 12, 0, 7)
    assert host.exception(2) == (DO_INTERRUPT, 0xCCCC)
    assert host.counters() == (10, 12, 0, 10)
    assert host.exception(2)[0] == DO_INTERRUPT
    assert host.counters() == (11, 12, 0, 11)
    assert host.exception(2)[0] == DO_INTERRUPT
    assert host.counters() == (12, 12, 0, 12)
    assert host.exception(2) == (DO_INTERRUPT + EMU_STOP, 0xAAAA)
    assert host.counters() == (12, 12, 1, 12)


def test_aarch64_block_counts_up_to_the_limit() -> None:
    host = Aarch64Host()
    host.counters(5, 6, 0, 0)
    assert host.call(thunks.AARCH64.block)[0] == 0
    assert host.counters() == (6, 6, 0, 0)
    assert host.call(thunks.AARCH64.block) == (EMU_STOP, 0xAAAA)
    assert host.counters() == (6, 6, 1, 0)


@pytest.mark.parametrize("code", [thunks.X86_64, thunks.AARCH64])
def test_code_leaves_room_for_its_pool(code: thunks.NativeCode) -> None:
    assert len(code.text) <= thunks.POOL_OFFSET
    image = thunks.image(code, {name: index for index, name in enumerate(thunks.POOL)})
    assert image[: len(code.text)] == code.text
    assert struct.unpack_from("<18Q", image, thunks.POOL_OFFSET) == tuple(range(18))


def test_hosts_without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert thunks.host_code() is None


def test_host_that_forbids_executable_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert thunks.build({}) is None


def test_engine_says_the_same_without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thunks, "build", lambda pool: None)
    guest = Guest()
    found = guest.run(movz(0, 7), hvc(3))
    assert (found.esr, guest.engine.x[0]) == (0x5A00_0003, 7)
    guest.engine.close()
