# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU as the machine under a test bed: its command line, its process, and which QEMU is right."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pkvm.testbed.base import BedError
from pkvm.testbed.child import bound

PROGRAM = "qemu-system-aarch64"
PACKAGE = "qemu-system-arm"
APPEND = "console=ttyAMA0 kvm-arm.mode=protected panic=-1"

WITHOUT_VHE = ("cortex-a53", "cortex-a57", "cortex-a72")
"""CPU models of QEMU's that have EL2 and not FEAT_VHE."""
RIGHT_WITH_VHE = (11, 1)
"""The oldest QEMU known to be right with a VHE CPU model; 7.2 is known to be wrong."""

_LAST_LINES = 3


@dataclass(frozen=True, slots=True)
class Machine:
    """What is emulated: `cpu` by QEMU's name, `memory` in MiB."""

    program: str = PROGRAM
    cpu: str = "cortex-a72"
    cpus: int = 2
    memory: int = 1024

    def command(self) -> list[str]:
        """QEMU's command line as far as the machine goes: no kernel, no device, no network."""
        return [
            *(self.program, "-nodefaults", "-display", "none", "-no-reboot"),
            *("-M", "virt,virtualization=on,gic-version=3", "-accel", "tcg,thread=multi"),
            *("-cpu", self.cpu, "-smp", str(self.cpus), "-m", f"{self.memory}M"),
        ]


def find(program: str) -> str:
    """The path of `program`. Raises BedError."""
    if sys.platform != "linux":
        raise BedError("the emulated test bed needs Linux: elsewhere use --ssh USER@HOST")
    path = shutil.which(program)
    if path is not None:
        return path
    if program == PROGRAM:
        raise BedError(
            f"{PROGRAM} is missing: install the Debian package {PACKAGE}, name a QEMU with --qemu, "
            "or use a real arm64 machine with --ssh USER@HOST"
        )
    raise BedError(f"there is no program {program} to use as QEMU")


def version(program: str) -> tuple[int, int]:
    """The version of a QEMU. Raises BedError."""
    try:
        said = subprocess.run(
            (program, "--version"), check=False, capture_output=True, text=True, errors="replace"
        ).stdout
    except OSError as error:
        raise BedError(f"{program} cannot be run: {error.strerror}") from error
    found = re.search(r"QEMU emulator version (\d+)\.(\d+)", said)
    if found is None:
        raise BedError(f"{program} does not answer --version as QEMU does")
    return int(found[1]), int(found[2])


def doubt(machine: Machine) -> str | None:
    """Why this QEMU may mislead on this CPU model, or None. Raises BedError."""
    if machine.cpu.split(",")[0] in WITHOUT_VHE:
        return None
    major, minor = version(machine.program)
    if (major, minor) >= RIGHT_WITH_VHE:
        return None
    right = ".".join(str(part) for part in RIGHT_WITH_VHE)
    return (
        f"QEMU {major}.{minor} with the VHE CPU model {machine.cpu} may not wipe pages that the "
        f"host takes back (7.2 does not): use --cpu cortex-a72, or QEMU {right} or later"
    )


class Process:
    """A QEMU in a process group of its own, which ends with this process, however that ends.

    For each of `channels` this side has a socket of that name in `sockets`. `command` makes QEMU's
    command line from the file descriptors of the channels on its side; it has those of `files` too.
    The thread that makes this must outlive it: the kernel kills QEMU when that thread ends.
    Raises BedError.
    """

    def __init__(
        self,
        command: Callable[[Mapping[str, int]], list[str]],
        channels: Sequence[str],
        files: Sequence[int],
    ) -> None:
        self.sockets: dict[str, socket.socket] = {}
        theirs: dict[str, socket.socket] = {}
        try:
            for name in channels:
                self.sockets[name], theirs[name] = socket.socketpair()
                self.sockets[name].setblocking(False)
            numbers = {name: end.fileno() for name, end in theirs.items()}
            argv = command(numbers)
            self._process = subprocess.Popen(
                bound(argv),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(*numbers.values(), *files),
                start_new_session=True,
            )
        except OSError as error:
            self._close_sockets()
            raise BedError(f"QEMU cannot be run: {error.strerror}") from error
        finally:
            for end in theirs.values():
                end.close()

    @property
    def pid(self) -> int:
        """The process, also its group."""
        return self._process.pid

    def fate(self) -> str:
        """Wait for the process to end; how it did, in words."""
        assert self._process.stdout is not None
        said = self._process.stdout.read().decode(errors="replace").strip().splitlines()
        status = self._process.wait()
        how = f"status {status}" if status >= 0 else f"signal {-status}"
        return f"QEMU ended with {how}" + "".join(f": {line}" for line in said[-_LAST_LINES:])

    def kill(self) -> None:
        """End the process if it has not ended, and close the sockets."""
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._close_sockets()

    def _close_sockets(self) -> None:
        for end in self.sockets.values():
            end.close()
