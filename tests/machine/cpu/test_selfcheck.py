# SPDX-License-Identifier: GPL-2.0-or-later
"""A libunicorn other than the 2.1.4 wheel's is refused, and never crashes the process."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from ctypes.util import find_library
from pathlib import Path

import pytest

from pkvm.machine.cpu import selfcheck, unicorn_engine
from pkvm.machine.cpu.engine import CpuEngine
from pkvm.machine.cpu.errors import EngineError
from pkvm.machine.cpu.library import Library
from pkvm.machine.cpu.unicorn_engine import UnicornEngine
from pkvm.machine.cpu.unicorn_layout import LAYOUT, UnicornLayout
from pkvm.machine.memory import PhysicalMemory

ADVICE = r"pip install unicorn==2\.1\.4"


@pytest.fixture
def memory() -> PhysicalMemory:
    return PhysicalMemory(0x8000_0000, 1 << 20)


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unicorn_engine, "_proven", set())


@pytest.mark.parametrize("version", [(2, 1, 3), (2, 0, 1), (2, 2, 0)])
def test_other_version(
    memory: PhysicalMemory, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(Library, "version", lambda _: version)
    with pytest.raises(EngineError, match=ADVICE) as caught:
        UnicornEngine(memory)
    assert ".".join(map(str, version)) in str(caught.value)


@pytest.mark.parametrize(
    "layout",
    [
        dataclasses.replace(LAYOUT, uc_cpu=448),
        dataclasses.replace(LAYOUT, uc_cpu=0),
        dataclasses.replace(LAYOUT, uc_cpu=1024),
        dataclasses.replace(LAYOUT, cpu_env_pointer=0),
        dataclasses.replace(LAYOUT, cpu_env=41808 + 4096),
        dataclasses.replace(LAYOUT, env_uc=0),
        dataclasses.replace(LAYOUT, env_uc=1 << 40),
    ],
)
def test_other_structures(
    memory: PhysicalMemory, monkeypatch: pytest.MonkeyPatch, layout: UnicornLayout
) -> None:
    monkeypatch.setattr(unicorn_engine, "LAYOUT", layout)
    with pytest.raises(EngineError, match=ADVICE) as caught:
        UnicornEngine(memory)
    assert "laid out" in str(caught.value)


def test_structures_are_found_behind_a_jump_buffer_of_another_size(
    memory: PhysicalMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other offsets move along, as on AArch64 hosts."""
    right = selfcheck.find_cpu
    moved = dataclasses.replace(
        LAYOUT,
        cpu_env_pointer=LAYOUT.cpu_env_pointer - 112,
        cpu_env=LAYOUT.cpu_env - 112,
        cpu_exception_index=LAYOUT.cpu_exception_index - 112,
    )
    engine = UnicornEngine(memory)
    found = right(engine._library, moved, engine._addresses.uc)
    assert found == engine._addresses
    engine.close()


@pytest.mark.parametrize("name", ["_AFTER_HVC", "_AFTER_ABORT"])
@pytest.mark.usefixtures("unproven")
def test_guest_that_behaves_otherwise(
    memory: PhysicalMemory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expected = list(getattr(selfcheck, name))
    expected[2] ^= 1
    monkeypatch.setattr(selfcheck, name, tuple(expected))
    with pytest.raises(EngineError, match=ADVICE) as caught:
        UnicornEngine(memory)
    assert "0x93800047" in str(caught.value)
    with pytest.raises(EngineError, match="self-test"):
        UnicornEngine(memory)


@pytest.mark.usefixtures("unproven")
def test_proof_is_done_once(memory: PhysicalMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    proofs = []
    right = selfcheck.prove

    def prove(library: Library, make: Callable[[PhysicalMemory], CpuEngine]) -> None:
        proofs.append(library.path)
        right(library, make)

    monkeypatch.setattr(selfcheck, "prove", prove)
    for _ in range(3):
        UnicornEngine(memory).close()
    assert len(proofs) == 1


def test_library_without_the_internal_functions() -> None:
    with pytest.raises(EngineError, match="does not export uc_version"):
        Library(find_library("c"))


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_peek_refuses_bad_addresses() -> None:
    text = ctypes.create_string_buffer(b"sesame")
    assert selfcheck._peek(ctypes.addressof(text), 6) == b"sesame"
    before = open_files()
    for address in (0, 8, 1 << 60):
        assert selfcheck._peek(address, 8) is None
    assert open_files() == before
