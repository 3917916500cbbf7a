# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm.open`: which back-end, with the standard library alone, and what is missing in one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pkvm
from fakes.fake_kernel import FakeKernel
from pkvm import opening

SRC = Path(pkvm.__file__).parents[1]


class Refuses(FakeKernel):
    """A kernel whose open(2) fails."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def open(self, path: str) -> int:
        raise OSError(self.number, os.strerror(self.number), path)


class Answers(FakeKernel):
    """A device that has another answer to KVM_GET_API_VERSION."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.answer = answer

    def ioctl(self, fd: int, request: int, arg: int | bytearray = 0) -> int:
        if self.answer < 0:
            raise OSError(-self.answer, os.strerror(-self.answer))
        return self.answer


@pytest.fixture
def arm64(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "aarch64")


def on(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    names = os.uname_result(("Linux", "host", "7.3", "#1", machine))
    monkeypatch.setattr(os, "uname", lambda: names)


def test_the_model_is_the_default() -> None:
    with pkvm.open(memory=64 << 20) as kvm:
        assert kvm.api_version() == 12


def test_another_name_is_no_back_end() -> None:
    with pytest.raises(ValueError, match=r"no back-end 'qemu'; use .*\"model\""):
        pkvm.open("qemu")


def test_options_of_the_model_mean_nothing_to_a_device() -> None:
    options: dict[str, Any] = {"dialect": "upstream", "memory": 1 << 20}
    with pytest.raises(ValueError, match=r"leave out dialect, memory$"):
        pkvm.open("/dev/kvm", **options)


def test_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "x86_64")
    with pytest.raises(OSError, match="this computer is x86_64, and protected VMs need arm64") as e:
        pkvm.open("/dev/kvm")
    assert (e.value.errno, e.value.filename) == (errno.ENODEV, "/dev/kvm")


@pytest.mark.usefixtures("arm64")
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOENT, r"CONFIG_KVM.*EL2.*dmesg"),
        (errno.EACCES, "not yours to open: become root"),
        (errno.ENODEV, "modprobe kvm"),
        (errno.EMFILE, "Too many open files"),
    ],
)
def test_what_is_missing(number: int, words: str) -> None:
    with pytest.raises(OSError, match=words) as caught:
        opening.open_device("/dev/null", Refuses(number))
    assert (caught.value.errno, caught.value.filename) == (number, "/dev/null")


@pytest.mark.usefixtures("arm64")
def test_whose_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "group", lambda self: "kvm")
    path = tmp_path / "kvm"
    path.touch()
    for mode, words in ((0o660, "join the group kvm and log in again"), (0o600, "become root")):
        path.chmod(mode)
        with pytest.raises(OSError, match=words):
            opening.open_device(str(path), Refuses(errno.EACCES))


@pytest.mark.usefixtures("arm64")
def test_the_file_itself() -> None:
    with pytest.raises(OSError, match="CONFIG_KVM"):
        pkvm.open("/dev/there-is-none")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="that is not KVM") as caught:
        pkvm.open("/dev/null")
    assert caught.value.errno == errno.ENOTTY
    del caught
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.usefixtures("arm64")
def test_the_api_version() -> None:
    kernel = Answers(13)
    with pytest.raises(OSError, match="version 13, and 12 is the only one"):
        opening.open_device("/dev/kvm", kernel)
    assert kernel.fds == {}
    kvm = opening.open_device("/dev/kvm", Answers(12))
    assert kvm.api_version() == 12
    kvm.close()


ALONE = """
import importlib.abc, os, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numpy", "unicorn", "elftools", "zstandard"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
names = os.uname_result(("Linux", "host", "7.3", "#1", "aarch64"))
os.uname = lambda: names
import pkvm
from pkvm import guests
from pkvm.guests import agent
from pkvm.vmm import vmm
try:
    pkvm.open("/dev/null")
except OSError as error:
    print(error)
try:
    pkvm.open()
except ModuleNotFoundError as error:
    print(error)
print(len(guests.image("agent")) > 0, "pkvm.system" in sys.modules, "pkvm.hyp" in sys.modules)
"""


def test_the_standard_library_is_enough() -> None:
    """-I -S: not even what is installed beside Python."""
    code = f"import sys; sys.path.insert(0, {str(SRC)!r})\n{ALONE}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    device, model, rest = done.stdout.splitlines()
    assert "that is not KVM" in device
    assert model == "No module named 'unicorn'" or model == "No module named 'numpy'"
    assert rest == "True False False"
