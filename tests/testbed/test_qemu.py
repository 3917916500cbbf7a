# SPDX-License-Identifier: GPL-2.0-or-later
"""Which QEMU is right, told from scripts that answer for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkvm.testbed import qemu
from pkvm.testbed.base import BedError
from pkvm.testbed.qemu import Machine


def program(folder: Path, says: str) -> str:
    path = folder / "qemu"
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


def test_the_version_is_asked(tmp_path: Path) -> None:
    said = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"
    assert qemu.version(program(tmp_path, said)) == (7, 2)


def test_a_program_that_is_no_qemu(tmp_path: Path) -> None:
    with pytest.raises(BedError, match="does not answer --version as QEMU does"):
        qemu.version(program(tmp_path, "GNU coreutils 9"))
    with pytest.raises(BedError, match=r"cannot be run: Permission denied"):
        qemu.version(str(tmp_path))


@pytest.mark.parametrize("cpu", ["max", "neoverse-n1", "max,sve=off"])
def test_an_old_qemu_is_doubted_with_a_vhe_cpu(tmp_path: Path, cpu: str) -> None:
    old = program(tmp_path, "QEMU emulator version 7.2.22")
    doubt = qemu.doubt(Machine(old, cpu))
    assert doubt is not None
    assert doubt.startswith(f"QEMU 7.2 with the VHE CPU model {cpu} may not wipe pages")
    new = program(tmp_path, "QEMU emulator version 11.1.3")
    assert qemu.doubt(Machine(new, cpu)) is None


def test_without_vhe_every_qemu_is_right() -> None:
    assert qemu.doubt(Machine("/nonexistent", "cortex-a72,pmu=off")) is None


def test_no_qemu_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        BedError, match=r"install the Debian package qemu-system-arm, .*--qemu.*--ssh"
    ):
        qemu.find(qemu.PROGRAM)
    with pytest.raises(BedError, match="there is no program other to use as QEMU"):
        qemu.find("other")


def test_another_system_than_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(BedError, match="needs Linux: elsewhere use --ssh"):
        qemu.find(qemu.PROGRAM)


def test_the_machine_is_what_was_asked_for() -> None:
    command = Machine("q", "max", 3, 256).command()
    assert command[0] == "q"
    for option, value in (("-cpu", "max"), ("-smp", "3"), ("-m", "256M")):
        assert command[command.index(option) + 1] == value
    assert "virtualization=on" in command[command.index("-M") + 1]
