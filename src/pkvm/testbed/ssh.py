# SPDX-License-Identifier: GPL-2.0-or-later
"""A real arm64 machine as a test bed, by way of ssh(1).

Nothing is installed there: this package goes into a temporary folder, which is also where commands
run, and which is removed at the end. The machine has Python 3.11 or later, tar, and /dev/kvm open
to the user, under a kernel booted with kvm-arm.mode=protected.
"""

from __future__ import annotations

import io
import os
import selectors
import shlex
import shutil
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence

from pkvm.testbed.base import (
    Bed,
    BedError,
    Listener,
    Progress,
    Result,
    Terminal,
    TimedOut,
    package_files,
    silent,
)
from pkvm.testbed.child import bound

SSH = ("ssh", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15")
LOST = 255
"""The status with which ssh says that there is no connection."""
SETUP_SECONDS = 120

_CHUNK = 1 << 16
_PROBE = """\
import ctypes, os, sys
if sys.version_info < (3, 11):
    sys.exit(f"its Python is {sys.version.split()[0]}, and 3.11 is the least")
try:
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
except OSError as error:
    sys.exit(f"/dev/kvm: {error.strerror}")
libc = ctypes.CDLL(None, use_errno=True)
if libc.ioctl(kvm, 0xAE01, ctypes.c_ulong(1 << 31)) < 0:  # KVM_CREATE_VM, protected
    sys.exit(f"its kernel makes no protected VM ({os.strerror(ctypes.get_errno())}): boot it with "
             "kvm-arm.mode=protected")
"""


class SshBed(Bed):
    """A machine that `ssh DESTINATION` reaches. `program` is ssh with its options."""

    def __init__(
        self,
        destination: str,
        *,
        program: Sequence[str] = SSH,
        progress: Progress = silent,
    ) -> None:
        self.destination = destination
        self.release = ""
        """What uname(2) calls its kernel; known after `boot`."""
        self._program = list(program)
        self._progress = progress
        self._folder = ""

    def boot(self) -> None:
        """Copy the package and see whether the kernel is right. Raises BedError."""
        if self._folder:
            return
        if self.destination.startswith("-"):
            raise BedError(f"{self.destination} is no machine: name it as ssh does, USER@HOST")
        if shutil.which(self._program[0]) is None:
            raise BedError(f"{self._program[0]} is missing: install the package openssh-client")
        self._progress(f"copying the package to {self.destination}")
        result = self._ssh(
            'folder=$(mktemp -d "${TMPDIR:-/tmp}/pkvm-bed.XXXXXX") && tar -x -C "$folder" -f - '
            '&& echo "$folder" && uname -mr',
            SETUP_SECONDS,
            _package(),
        )
        if not result.ok:
            raise BedError(f"{self.destination} takes no package: {_words(result)}")
        self._folder, machine = result.stdout.decode().splitlines()
        self.release, architecture = machine.split()
        if architecture != "aarch64":
            raise BedError(f"{self.destination} is {architecture}, and no arm64 machine")
        probe = self.run(("python3", "-c", _PROBE), timeout=SETUP_SECONDS)
        if not probe.ok:
            raise BedError(f"{self.destination} is no test bed: {_words(probe)}")

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float | None = None,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
        on_stdout: Listener | None = None,
        on_stderr: Listener | None = None,
    ) -> Result:
        """Run a command to its end."""
        # The machine ends the command if this one is killed before.
        limit = () if timeout is None else ("timeout", "-k", "5", f"{timeout + 5:g}")
        script = self._script((*limit, *argv), environment or {})
        result = self._ssh(script, timeout, stdin, on_stdout, on_stderr)
        if result.status == LOST:
            raise BedError(f"{self.destination} cannot be reached: {_words(result)}")
        return result

    def put(self, path: str, data: bytes) -> None:
        """Write a file, with the folders that lead to it."""
        script = 'mkdir -p "$(dirname "$1")" && cat >"$1"'
        result = self.run(("sh", "-c", script, "sh", path), stdin=data)
        if not result.ok:
            raise BedError(f"{path} cannot be written on {self.destination}: {_words(result)}")

    def shell(self, terminal: Terminal) -> int:
        """A prompt by way of ssh's own terminal."""
        script = self._script(("sh", "-i"), {})
        return subprocess.run(
            (*self._program, "-t", "--", self.destination, script), check=False
        ).returncode

    def close(self) -> None:
        """Remove what was copied."""
        if not self._folder:
            return
        folder, self._folder = self._folder, ""
        try:
            self._ssh(f"rm -rf {shlex.quote(folder)}", SETUP_SECONDS)
        except BedError:
            pass  # it cannot be reached any more

    def _script(self, argv: Sequence[str], environment: Mapping[str, str]) -> str:
        """A command as the shell there is to read it."""
        if not self._folder:
            raise BedError("the test bed was not started")
        folder = shlex.quote(self._folder)
        settings = "".join(f" {name}={shlex.quote(value)}" for name, value in environment.items())
        return (
            f'cd {folder} && PATH={folder}/bin:"$PATH" PYTHONPATH={folder} exec env'
            f"{settings} {shlex.join(argv)}"
        )

    def _ssh(
        self,
        script: str,
        timeout: float | None,
        stdin: bytes = b"",
        on_stdout: Listener | None = None,
        on_stderr: Listener | None = None,
    ) -> Result:
        """Run a script there; its status may be LOST. Raises TimedOut."""
        deadline = None if timeout is None else time.monotonic() + timeout
        command = [*self._program, "--", self.destination, script]
        try:
            process = subprocess.Popen(
                bound(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
            )
        except OSError as error:
            raise BedError(f"{command[0]} cannot be run: {error.strerror}") from error
        with process:
            try:
                streams = _exchange(process, stdin, deadline, on_stdout, on_stderr)
                if streams is not None:
                    return Result(process.wait(), *streams)
            finally:
                process.kill()
        raise TimedOut(f"the command took longer than {timeout:g} s on {self.destination}")


def _exchange(
    process: subprocess.Popen[bytes],
    stdin: bytes,
    deadline: float | None,
    on_stdout: Listener | None,
    on_stderr: Listener | None,
) -> tuple[bytes, bytes] | None:
    """What a process says till it closes its output, or None if the time is up before."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    gathered = {"stdout": bytearray(), "stderr": bytearray()}
    listeners = {"stdout": on_stdout, "stderr": on_stderr}
    unsent = memoryview(stdin)
    reading = len(gathered)
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, "stdout")
        selector.register(process.stderr, selectors.EVENT_READ, "stderr")
        selector.register(process.stdin, selectors.EVENT_WRITE, "stdin")
        while reading:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            for key, _ in selector.select(left):
                if key.data == "stdin":
                    try:
                        unsent = unsent[os.write(key.fd, unsent[:_CHUNK]) :]
                    except BrokenPipeError:
                        unsent = unsent[:0]  # whoever reads wants no more
                    if not unsent:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                elif data := os.read(key.fd, _CHUNK):
                    gathered[key.data] += data
                    if (listener := listeners[key.data]) is not None:
                        listener(data)
                else:
                    selector.unregister(key.fileobj)
                    reading -= 1
    return bytes(gathered["stdout"]), bytes(gathered["stderr"])


def _package() -> bytes:
    """This package, and a command `pkvm` in `bin`, as a tar archive."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for path, data in package_files().items():
            _add(tar, str(path), data, 0o644)
        _add(tar, "bin/pkvm", b'#!/bin/sh\nexec python3 -m pkvm "$@"\n', 0o755)
    return content.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    tar.addfile(member, io.BytesIO(data))


def _words(result: Result) -> str:
    """The last that a command said."""
    lines = result.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"status {result.status}"
