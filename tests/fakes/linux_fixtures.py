# SPDX-License-Identifier: GPL-2.0-or-later
"""Real Linux for tests: Debian's kernels, the sharing kernel, an initramfs, and guests of them.

The first test that asks fetches packages from Debian's archive; they stay in the user's cache.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cached_property
from pathlib import Path

import pytest

from pkvm.check.attacks.linux import PROMPT, STATUS, answer, typed
from pkvm.testbed import debian, initramfs
from pkvm.testbed.console import Console

SECONDS = 120
"""No guest may take longer."""


class Shell:
    """The shell of a guest's /init, at its console. The kernel is told to keep quiet."""

    def __init__(self, console: Console) -> None:
        self.console = console
        console.expect(initramfs.MARKER)
        console.expect(PROMPT)
        self.run("dmesg -n 1")

    def run(self, command: str, status: int = 0) -> str:
        """What `command` prints; it must end with `status`."""
        start = len(self.console.text)
        self.console.send(typed(command))
        self.console.expect(STATUS)
        self.console.expect(PROMPT)
        said, ended = answer(self.console.text[start:])
        assert ended == status, f"{command!r} ended with status {ended}: {said}"
        return said

    def power_off(self) -> str:
        """End the guest; what the VMM says then."""
        start = len(self.console.text)
        self.console.send("poweroff -f\n")
        status = self.console.finish()
        said = self.console.text[start:]
        assert status == 0, f"the VMM ended with status {status}: {said}"
        return said


class Linux:
    """Kernels and an initramfs as files, and guests of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packages = debian.Packages()

    def kernel(self, name: str) -> Path:
        """The stock Debian kernel of a series, such as "7.3", or the "sharing" one."""
        return self.sharing if name == "sharing" else self.packages.kernel(name)

    @cached_property
    def sharing(self) -> Path:
        """The kernel of guests/linux, from the cache or built now."""
        guests = Path(__file__).parents[2] / "guests" / "linux"
        built = subprocess.run(
            ("make", "-s", "-C", str(guests), f"PYTHON={sys.executable}"),
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return Path(built.stdout.strip())

    @cached_property
    def initrd(self) -> Path:
        """A busybox root."""
        path = self.folder / "initrd.gz"
        path.write_bytes(initramfs.busybox_root(self.packages.busybox().read_bytes()).gzip())
        return path

    def boot(self, kernel: str, *options: str, run: str = "", limit: float = SECONDS) -> Console:
        """A protected guest with its UART as the console: /init runs `run`, else a shell."""
        append = "console=ttyAMA0 panic=-1" + (f' run="{run}"' if run else "")
        return Console(
            (
                *(sys.executable, "-m", "pkvm", "run", "--kernel", str(self.kernel(kernel))),
                *("--initrd", str(self.initrd), "--append", append, "--console", "pl011"),
                *options,
            ),
            limit=limit,
        )


@pytest.fixture(scope="session")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Linux:
    return Linux(tmp_path_factory.mktemp("linux"))
