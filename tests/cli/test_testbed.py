# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm testbed`: what a person gets, and one line for whatever is missing."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from pkvm.cli import status
from pkvm.cli.main import main
from pkvm.testbed import cache
from pkvm.testbed.base import silent
from pkvm.testbed.store import KERNEL, Store

PKVM = (sys.executable, "-m", "pkvm", "testbed")
SECONDS = 200


def pkvm(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*PKVM, *arguments),
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        input=stdin,
        env={**os.environ, **environment},
    )


def fails(*arguments: str, **environment: str) -> str:
    """The one line with which the command ends."""
    done = pkvm("--quiet", *arguments, **environment)
    assert (done.returncode, done.stdout) == (status.FAILED, ""), done.stderr
    assert done.stderr.startswith("pkvm: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["run"], "say which command to run"),
        (["--memory", "much"], "'much' is not a size"),
        (["run", "--timeout", "0", "true"], "not a number of seconds above 0"),
        (["run", "--put", "/nonexistent/file", "true"], "/nonexistent/file: No such file"),
        (["make", "--ssh", "me@there"], "make is for emulated machines: leave --ssh out"),
    ],
)
def test_bad_usage(arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(["testbed", *arguments]))
    assert ended.value.code == status.USAGE
    assert what in capsys.readouterr().err


def test_no_qemu(tmp_path: Path) -> None:
    assert "install the Debian package qemu-system-arm" in fails(PATH=str(tmp_path))
    assert "there is no program nope" in fails("--qemu", "nope")


@pytest.mark.linux
def test_a_doubtful_qemu_is_warned_of(tmp_path: Path) -> None:
    """It only answers for its version: then it ends."""
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\necho QEMU emulator version 7.2.22\n")
    qemu.chmod(0o755)
    done = pkvm("--quiet", "--cpu", "max", "--qemu", str(qemu))
    warning, error = done.stderr.splitlines()
    assert warning.startswith("pkvm: warning: QEMU 7.2 with the VHE CPU model max may not wipe")
    assert error.startswith("pkvm: error: the emulated machine is gone: QEMU ended with status 0")
    assert done.returncode == status.FAILED


def test_no_network(tmp_path: Path) -> None:
    mirror = "http://127.0.0.1:9/debian"
    said = fails("make", PKVM_CACHE=str(tmp_path), PKVM_DEBIAN_MIRROR=mirror)
    assert f"(the archive is {mirror}; PKVM_DEBIAN_MIRROR=http://HOST/debian" in said
    assert "Could not connect" in said
    left = files(tmp_path)
    assert not [name for name in left if "partial" in name or cache.PARTIAL in name]
    assert not [name for name in left if "kernel" in name or "root" in name]


@pytest.mark.parametrize("step", ["lists", "kernel", "root", "bytecode"])
@pytest.mark.linux
def test_a_full_disk(tmp_path: Path, step: str) -> None:
    """At each step; with Debian's packages there already, but for the first."""
    packages = cache.root() / "debian"
    kernel = Store().kernel(KERNEL, silent).stat().st_size
    root = Store().root(silent).archive.stat().st_size
    size = {
        "lists": 40 << 20,
        "kernel": kernel // 2,
        "root": kernel + root // 2,
        "bytecode": kernel + root + (1 << 20),
    }[step]
    script = (
        f"mount -t tmpfs -o size={size} tmpfs {tmp_path} && cd {tmp_path} && "
        + ("" if step == "lists" else f"ln -s {packages} debian && ")
        + f"PKVM_CACHE={tmp_path} {' '.join(PKVM)} --quiet make; echo $? >&2; "
        "find . ! -type l ! -type d"
    )
    done = subprocess.run(
        ("unshare", "--map-root-user", "--mount", "sh", "-c", script),
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    line, number = done.stderr.splitlines()
    assert number == str(status.FAILED)
    assert line.startswith("pkvm: error: the cache ")
    assert "No space left on device" in line
    left = done.stdout.split()
    assert not [name for name in left if cache.PARTIAL in name or "partial" in name]
    assert not [name for name in left if name.endswith("/library")]
    wholes = {name.split("/")[2].split("-")[0] for name in left if name.count("/") > 2}
    assert (
        wholes - {"arm64"}
        == {
            "lists": set(),
            "kernel": set(),
            "root": {"kernel"},
            "bytecode": {"kernel", "root", "compiled"},
        }[step]
    )


def test_a_file_that_is_no_kernel(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(100))
    assert "boots an arm64 Image" in fails("--kernel", str(file))
    assert "No such file" in fails("--kernel", str(tmp_path / "nothing"))


@pytest.mark.linux
def test_a_command_and_files(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("sent")
    back = tmp_path / "back"
    done = pkvm(
        *("run", "--put", f"{tmp_path}/here:/tmp/there", "--get", f"made:{back}", "--stdin"),
        *("sh", "-c", "cat /tmp/there - >made; echo said; echo wrong >&2; exit 5"),
        stdin=" and typed",
    )
    assert (done.returncode, done.stdout) == (5, "said\n")
    assert done.stderr.endswith("is up in protected mode\nwrong\n")
    assert back.read_text() == "sent and typed"


@pytest.mark.linux
def test_a_report() -> None:
    done = pkvm("--json", "--quiet", "--smp", "1")
    assert done.stderr == ""
    facts = json.loads(done.stdout)
    assert facts["kernel"].startswith("7.3.")
    assert (facts["protected_mode"], facts["cpus"]) == (True, 1)
    assert facts["python"].startswith("3.")


@pytest.mark.linux
def test_json_of_a_command_that_takes_too_long() -> None:
    done = pkvm("run", "--json", "--quiet", "--timeout", "0.5", "sleep", "1000")
    assert (done.returncode, done.stdout) == (status.TIMEOUT, "")
    assert done.stderr == "pkvm: error: the command took longer than 0.5 s\n"


def test_a_shell_needs_a_terminal() -> None:
    done = pkvm("shell")
    assert (done.returncode, done.stdout) == (status.USAGE, "")
    assert done.stderr.startswith("pkvm: error: a shell needs a terminal")


@pytest.mark.linux
@pytest.mark.parametrize("leave", [b"exit 3\r", b"\x1dq"], ids=["exit", "escape key"])
def test_a_shell(leave: bytes) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        (*PKVM, "shell"), stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL
    ) as process:
        os.close(theirs)
        seen = b""
        while b"# " not in seen:
            seen += os.read(ours, 4096)
        os.write(ours, b"echo $((6 * 7)); tty\r")
        while b"42\r\n/dev/ttyAMA0\r\n" not in seen:
            seen += os.read(ours, 4096)
        os.write(ours, b"\x1d?")
        while seen.count(b"Ctrl-] then q ends the test bed") < 2:
            seen += os.read(ours, 4096)
        os.write(ours, leave)
        assert process.wait(SECONDS) == (3 if b"exit" in leave else 0)
    os.close(ours)


def test_the_cache_is_cleaned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PKVM_CACHE", str(tmp_path))
    for name in ("testbed/root-1/root.cpio", "testbed/kernel-7.3/Image", "debian/other"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert main(["testbed", "clean"]) == status.OK
    assert files(tmp_path) == ["debian/other", "testbed/.lock"]
