# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm run --backend /dev/kvm`: the same guests, and a report of what a kernel tells.

An arm64 host with protected KVM is stood in for by the model's `upstream` host, put where the
system calls of a real kernel are made; `tests/linux` has the real one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkvm import guests
from pkvm.cli import backends, status
from pkvm.cli.main import main
from pkvm.kvm import dev_kernel
from pkvm.system import System

ROOT = Path(backends.__file__).parents[2]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    """An arm64 computer whose kernel protects VMs."""
    names = os.uname_result(("Linux", "host", "7.3", "#1", "aarch64"))
    with System(64 << 20, dialect="upstream") as system:
        monkeypatch.setattr(os, "uname", lambda: names)
        monkeypatch.setattr(dev_kernel, "DevKernel", lambda: system.kernel)
        yield system


@pytest.mark.usefixtures("host")
def test_the_demonstration(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["run", "--backend", "/dev/kvm", "--json"])
    captured = capsys.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    assert code == status.OK
    assert (report["outcome"], report["backend"]) == ("powered-off", "/dev/kvm")
    assert (report["dialect"], report["protected"]) == ("upstream", True)
    assert "the VMM read 54 bytes" in report["console"]
    assert "my private pages are as I left them" in report["console"]
    # What only the built-in machine knows is not made up.
    for name in ("exits", "traps", "hypercalls", "refusals", "messages", "events", "checked"):
        assert report[name] is None, name
    assert report["pages"] == report["pages_by_moment"] == {}
    assert list(report["pinned_by_moment"]) == ["shared", "unshared", "end"]
    probes = report["host_probes"]
    assert probes["tried"] == probes["refused"] >= 3 * 6
    assert probes["shared"] == {"tried": 6, "allowed": 6, "equal": True, "trouble": []}
    assert probes["untouched_pages"] > 100


@pytest.mark.usefixtures("host")
def test_the_report_names_the_back_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--backend", "/dev/kvm"]) == status.OK
    text = capsys.readouterr().out
    assert "(protected VM, back-end /dev/kvm, dialect upstream)" in text
    assert "Memory that the kernel keeps for the guest: shared 0 KiB, unshared 0 KiB" in text
    assert "private pages: every attempt was refused" in text
    assert "pages are the host's: they hold what was loaded, so the guest never touched" in text
    for unknown in ("Pages by owner", "Exits to the host", "Hypercalls", "Refusals"):
        assert unknown not in text


@pytest.mark.usefixtures("host")
def test_other_guests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "smp.bin"
    image.write_bytes(guests.image("smp"))
    assert main(["run", "--backend", "/dev/kvm", "--cpus", "2", str(image)]) == status.OK
    assert "CPU 0x1 is up" in capsys.readouterr().out


@pytest.mark.usefixtures("host")
def test_without_protection_the_firmware_is_the_vmms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    firmware = tmp_path / "firmware.bin"
    firmware.write_bytes(guests.image("firmware"))
    arguments = ["run", "--backend", "/dev/kvm", "--unprotected"]
    for more in ([], ["--firmware", str(firmware)]):
        assert main([*arguments, *more]) == status.GOT_THROUGH
        text = capsys.readouterr().out
        assert "not a protected VM" in text
        assert "got through to pages, as nothing protects them" in text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--dialect", "rfc"], "--dialect"),
        (["--virtual-clock"], "--clock"),
        (["--clock", "real"], "--clock"),
        (["--memlock", "1G", "--host-dtb", "x"], "--memlock, --host-dtb"),
        (["--firmware", "x.bin"], "--firmware"),
        (["--kvm-mode", "protected", "--cpu", "max"], "--kvm-mode, --cpu-model"),
        (["--check"], "--check"),
        (["--trace", "x.jsonl"], "--trace"),
    ],
)
def test_options_of_the_built_in_machine_are_refused(
    options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where they say what is so anyway: nothing is ignored in silence."""
    assert main(["run", "--backend", "/dev/kvm", *options]) == status.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"{named} of the built-in machine: leave one or the other out" in captured.err


@pytest.mark.usefixtures("host")
def test_a_kernel_without_protected_mode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with System(64 << 20, dialect="upstream", protected=False) as system:
        monkeypatch.setattr(dev_kernel, "DevKernel", lambda: system.kernel)
        assert main(["run", "--backend", "/dev/kvm"]) == status.USAGE
        error = capsys.readouterr().err
        assert "kvm-arm.mode=protected" in error
        assert error.count("\n") == 1
        assert main(["run", "--backend", "/dev/kvm", "--unprotected"]) == status.GOT_THROUGH


def test_what_is_missing_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if os.uname().machine in ("aarch64", "arm64"):
        path, words = "/dev/there-is-none", "there is no such file"
    else:
        path, words = "/dev/kvm", "protected VMs need arm64"
    assert main(["run", "--backend", path]) == status.USAGE
    error = capsys.readouterr().err
    assert error.startswith(f"pkvm: error: {path}: ")
    assert words in error
    assert error.count("\n") == 1


def test_ptdump_looks_into_the_machine_and_needs_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ptdump", "--backend", "/dev/kvm"]) == status.USAGE
    assert "looks into the built-in machine, and /dev/kvm is none" in capsys.readouterr().err


@pytest.mark.usefixtures("host")
def test_info_asks_the_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--backend", "/dev/kvm", "--json"]) == status.OK
    facts = json.loads(capsys.readouterr().out)
    assert (facts["backend"], facts["dialect"]) == ("/dev/kvm", "upstream")
    assert (facts["protected_mode"], facts["api_version"], facts["kernel"]) == (
        True,
        12,
        "Linux 7.3",
    )
    assert facts["capabilities"]["ONE_REG"] == 1
    assert "READONLY_MEM" in facts["not_for_protected"]
    for unknown in ("ram", "hyp_bytes", "cpu_model", "engine", "clock", "hypercalls"):
        assert unknown not in facts
    assert main(["info", "--backend", "/dev/kvm"]) == status.OK
    text = capsys.readouterr().out
    assert "kernel:         Linux 7.3, " in text
    assert "protected mode: yes" in text
    assert main(["info", "--backend", "/dev/kvm", "--features"]) == status.USAGE
    assert "--features of the built-in machine" in capsys.readouterr().err


@pytest.mark.usefixtures("host")
def test_info_of_a_kernel_without_protected_mode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with System(64 << 20, dialect="upstream", protected=False) as system:
        monkeypatch.setattr(dev_kernel, "DevKernel", lambda: system.kernel)
        assert main(["info", "--backend", "/dev/kvm"]) == status.OK
    assert "protected mode: no: every VM is open to the host" in capsys.readouterr().out


ALONE = """
import importlib.abc, os, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numpy", "unicorn", "elftools", "zstandard"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
names = os.uname_result(("Linux", "host", "7.3", "#1", "aarch64"))
os.uname = lambda: names
from pkvm.cli.main import main
sys.exit(main(["run", "--backend", "/dev/null", "--cpus", "2", "--gic", "--rng"]))
"""


def test_it_runs_with_the_standard_library_alone() -> None:
    """As far as it goes where there is no such kernel: to the question whether this is KVM."""
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{ALONE}",
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("", status.USAGE)
    assert done.stderr.startswith("pkvm: error: /dev/null: that is not KVM")


def test_pinned_memory_is_what_the_kernel_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert backends.pinned_bytes() >= 0
    file = tmp_path / "status"
    file.write_text("Name:\tpython\nVmLck:\t      52 kB\nVmPin:\t       0 kB\n")
    monkeypatch.setattr(backends, "STATUS", file)
    assert backends.pinned_bytes() == 52 << 10
    file.write_text("Name:\tpython\n")
    assert backends.pinned_bytes() == 0
