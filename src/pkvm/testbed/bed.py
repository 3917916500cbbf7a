# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulated test bed: a stock Debian kernel in protected mode under QEMU, with this package.

The root file system is an initramfs, and so is what is added at each start: this package, its
bytecode, files of the caller's. Commands go over three virtio ports: a shell reads its script from
`control` and says there what became of it; a command's output comes by `output` and `error`, each
ended by a marker of its own. The serial console has the kernel's log.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import PurePosixPath

from pkvm.testbed import qemu, root
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
from pkvm.testbed.link import CONSOLE, CONTROL, Link, Output
from pkvm.testbed.qemu import Machine
from pkvm.testbed.store import KERNEL, Store, digest, overlay

BOOT_SECONDS = 180
COMPILE_SECONDS = 1200
PULSE_SECONDS = 5
"""How often the machine is asked whether it lives while a command runs."""
DEAD_SECONDS = 90
"""A machine that does not answer for so long hangs."""
KILL_SECONDS = 30
"""A command that was killed must have ended by then."""

SERIAL = "ttyAMA0"
"""The serial console's device."""

DISK_BYTES = 16 << 20
"""No page of it is there before it is written."""

_PROTECTED = re.compile(r"kvm .*Protected .*VHE mode initialized successfully")
"""What KVM says at boot (arch/arm64/kvm/arm.c)."""
_STDIN = "/run/stdin"
_PID = "/run/pid"
_PUT = "/run/put"


class TestBed(Bed):
    """An emulated arm64 machine.

    `kernel` is a Debian series such as "7.3" or an Image's path; `files` are put in before the
    start, which is the quickest way for large ones. `append` is added to the
    kernel's command line. `on_console` sees the kernel's log as it comes. The thread that boots it
    must outlive it.
    """

    __test__ = False  # pytest takes the name for a test's

    def __init__(
        self,
        machine: Machine | None = None,
        *,
        kernel: str = KERNEL,
        append: str = "",
        files: Mapping[str, bytes] | None = None,
        progress: Progress = silent,
        on_console: Listener | None = None,
        boot_seconds: float = BOOT_SECONDS,
    ) -> None:
        self.machine = machine or Machine()
        self.release = ""
        """What uname(2) calls the kernel; known after `boot`."""
        self._kernel = kernel
        self._append = append
        self._files = dict(files or {})
        self._progress = progress
        self._on_console = on_console
        self._boot_seconds = boot_seconds
        self._store = Store()
        self._process: qemu.Process | None = None
        self._link: Link | None = None
        self._token = secrets.token_hex(8)
        self._count = 0
        self._idle = False
        """Commands were run, and the last one came to its end."""
        self._sources: dict[str, str] = {}
        self._python = ""

    def boot(self) -> None:
        """Make what is not in the cache, and start the machine. Raises BedError."""
        if self._process is not None:
            return
        self.machine = replace(self.machine, program=qemu.find(self.machine.program))
        if warning := qemu.doubt(self.machine):
            self._progress(f"warning: {warning}")
        kernel = self._store.kernel(self._kernel, self._progress)
        initrd, disk = self._initrd(), _blank_disk()
        try:
            self._start(str(kernel), initrd, disk)
        finally:
            os.close(initrd)
            os.close(disk)
        self._wait_for_boot()
        if not self._store.is_compiled(self._python):
            self._compile_library()

    @property
    def log(self) -> str:
        """The last of the serial console: the kernel's log."""
        return self._linked().log

    @property
    def pid(self) -> int | None:
        """The QEMU process, if it runs."""
        return None if self._process is None else self._process.pid

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
        """Run a command to its end, and what it started with it."""
        if stdin:
            self.put(_STDIN, stdin)
        settings = [f"{name}={value}" for name, value in (environment or {}).items()]
        command = shlex.join(["env", *settings, *argv] if settings else argv)
        return self._command(
            f"rm -f {_PID}; setsid sh -c 'echo $$ >{_PID}; exec \"$@\"' sh {command} "
            f"<{_STDIN if stdin else '/dev/null'} >&4 2>&5 3>&- 4>&- 5>&-; status=$?; "
            "kill -9 -1; (exit $status)",
            timeout,
            on_stdout,
            on_stderr,
        )

    def put(self, path: str, data: bytes) -> None:
        """Write a file, with the folders that lead to it."""
        name = shlex.quote(path)
        self._linked().send("output", data)
        result = self._command(
            f"{{ head -c {len(data)} <&4 >{_PUT} && "
            f'mkdir -p "$(dirname {name})" && mv -f {_PUT} {name}; }} 2>&5',
            None,
        )
        if not result.ok:
            raise BedError(
                f"{path} cannot be written in the test bed: "
                + result.stderr.decode(errors="replace").strip()
            )

    def shell(self, terminal: Terminal) -> int:
        """A prompt on the serial console, which has the kernel's messages too."""
        link = self._linked()
        link.outputs = {}
        link.on_console = terminal.write

        left = False

        def typed() -> None:
            nonlocal left
            data = terminal.read()
            left = data is None
            link.send(CONSOLE, data or b"")

        self._count += 1
        self._idle = False
        size = f"stty rows {terminal.rows} columns {terminal.columns}"
        link.send(
            CONTROL,
            f"{{ {size}; setsid -c env PS1='testbed:\\w# ' sh; "
            f'echo "done {self._count} $?" >&3; }} <>/dev/{SERIAL} >&0 2>&0\n'.encode(),
        )
        link.watch(terminal.fd, typed)
        link.wait(lambda: left or self._is_done(), inf)
        link.unwatch(terminal.fd)
        link.on_console = self._on_console
        if left:
            self.close()  # the shell still has the machine
            return 0
        self._idle = True
        return self._status()

    def close(self) -> None:
        """End the machine. What Python compiled in it is kept for the next."""
        if self._process is None:
            return
        process, self._process = self._process, None
        try:
            if self._idle:
                self._harvest()
        except BedError:
            pass  # the machine is gone: the next one compiles again
        finally:
            if self._link is not None:
                self._link.close()
            process.kill()

    def _initrd(self) -> int:
        """The root and what is added to it, as a file without a name. Raises BedError."""
        base = self._store.root(self._progress)
        files = {f"{root.SITE}/{path}": data for path, data in package_files().items()}
        self._python = base.python
        self._sources = base.sources | {
            path: digest(path, data) for path, data in files.items() if path.endswith(".py")
        }
        files |= self._store.compiled(self._sources, base.python)
        given = {str(PurePosixPath(root.HOME, path)): data for path, data in self._files.items()}
        number = os.memfd_create("initrd")
        try:
            with open(number, "wb", closefd=False) as file:
                file.write(base.archive.read_bytes())
                file.write(overlay(files | given))
        except OSError as error:
            os.close(number)
            raise BedError(f"the initramfs cannot be written: {error.strerror}") from error
        return number

    def _start(self, kernel: str, initrd: int, disk: int) -> None:
        def command(numbers: Mapping[str, int]) -> list[str]:
            argv = [
                *self.machine.command(),
                *("-kernel", kernel, "-initrd", f"/proc/self/fd/{initrd}"),
                *("-append", f"{qemu.APPEND} {self._append}".strip()),
                *("-drive", f"file=/proc/self/fd/{disk},if=none,id=disk,format=raw"),
                *("-device", "nvme,serial=disk,drive=disk"),
                *("-chardev", f"socket,id={CONSOLE},fd={numbers[CONSOLE]}"),
                *("-serial", f"chardev:{CONSOLE}", "-device", "virtio-serial-pci"),
            ]
            for number, name in enumerate(root.PORTS, 1):
                argv += ["-chardev", f"socket,id={name},fd={numbers[name]}"]
                argv += ["-device", f"virtserialport,chardev={name},nr={number},name={name}"]
            return argv

        self._progress("starting QEMU")
        self._process = qemu.Process(command, (CONSOLE, *root.PORTS), (initrd, disk))
        self._link = Link(self._process, self._on_console)

    def _wait_for_boot(self) -> None:
        link = self._linked()
        self._progress("booting the kernel")
        if not link.wait(lambda: bool(link.lines), time.monotonic() + self._boot_seconds):
            raise BedError(
                f"the emulated machine did not boot in {self._boot_seconds:g} s{link.reason()}"
            )
        self.release = link.lines.pop(0).split()[1]
        # The console has it, unless the kernel was told to be quiet.
        if not (_PROTECTED.search(link.log) or self._has_logged_protection()):
            raise BedError(
                f"the kernel {self.release} has no protected mode on this machine: it needs "
                "CONFIG_KVM, kvm-arm.mode=protected and a CPU with EL2"
            )
        self._progress(f"Linux {self.release} is up in protected mode")

    def _has_logged_protection(self) -> bool:
        """Whether the kernel's own log tells of protected mode."""
        log = self.run(("dmesg",), timeout=KILL_SECONDS).stdout
        return _PROTECTED.search(log.decode(errors="replace")) is not None

    def _compile_library(self) -> None:
        """Have Python compile its library, once."""
        self._progress("compiling Python's library, once")
        command = ("python3", "-m", "compileall", "-q", f"/usr/lib/{self._python}")
        result = self.run(command, timeout=COMPILE_SECONDS)
        if not result.ok:
            said = (result.stdout + result.stderr).decode(errors="replace").split("\n")
            raise BedError(f"Python cannot compile its library in the test bed: {said[0]}")
        self._harvest()
        self._store.mark_compiled(self._python)

    def _harvest(self) -> None:
        """Keep what Python compiled since the start."""
        result = self._command(
            f"find /usr/lib -name '*.pyc' -newer {root.BOOTED} >/run/new; "
            "[ -s /run/new ] && tar -c -f - $(cat /run/new) >&4 2>/run/tar.log",
            60,
        )
        if result.ok:
            self._store.keep(result.stdout, self._sources, self._python)

    def _command(
        self,
        script: str,
        timeout: float | None,
        on_stdout: Listener | None = None,
        on_stderr: Listener | None = None,
    ) -> Result:
        """Have the machine's shell run a line of script to its end."""
        link = self._linked()
        self._count += 1
        self._idle = False
        words = f"{self._token} {self._count}"
        marker = f"\x01{words}\x01".encode()
        link.outputs = {"output": Output(marker, on_stdout), "error": Output(marker, on_stderr)}
        link.send(
            CONTROL,
            f"{{ {script}; status=$?; "
            f"printf '\\001{words}\\001' >&4; printf '\\001{words}\\001' >&5; "
            f'echo "done {self._count} $status" >&3; }} </dev/null >/dev/console 2>&1 &\n'.encode(),
        )
        deadline = time.monotonic() + timeout if timeout else None
        if not self._wait_for_end(deadline):
            self._kill_command()
            self._idle = True
            raise TimedOut(f"the command took longer than {timeout:g} s")
        self._idle = True
        return Result(self._status(), *(bytes(output.data) for output in link.outputs.values()))

    def _kill_command(self) -> None:
        """End the command that runs. Raises BedError."""
        link = self._linked()
        limit = time.monotonic() + KILL_SECONDS
        while time.monotonic() < limit:
            # It may be too young to have said its number.
            link.send(CONTROL, f"kill -9 -$(cat {_PID})\n".encode())
            if self._wait_for_end(time.monotonic() + 1):
                return
        raise BedError("the emulated machine hangs: a command cannot be ended")

    def _wait_for_end(self, deadline: float | None) -> bool:
        """Wait for a command to end; False if the time is up before. Raises BedError."""
        link = self._linked()

        def ended() -> bool:
            return self._is_done() and all(output.ended for output in link.outputs.values())

        while True:
            pulse = time.monotonic() + PULSE_SECONDS
            if link.wait(ended, pulse if deadline is None else min(pulse, deadline)):
                return True
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return False
            if now - link.heard > DEAD_SECONDS:
                raise BedError(
                    f"the emulated machine hangs: no answer for {DEAD_SECONDS} s{link.reason()}"
                )
            link.send(CONTROL, b"echo alive >&3\n")

    def _is_done(self) -> bool:
        """Whether the machine said that the last command ended: then that is the next line."""
        lines = self._linked().lines
        while lines and not lines[0].startswith(f"done {self._count} "):
            del lines[0]
        return bool(lines)

    def _status(self) -> int:
        """The exit status in that line, which is taken."""
        return int(self._linked().lines.pop(0).split()[2])

    def _linked(self) -> Link:
        if self._link is None:
            raise BedError("the test bed was not started")
        return self._link


def _blank_disk() -> int:
    """A file without a name that is the machine's disk; `root.WITH_MEMORY` makes a file system on
    it."""
    number = os.memfd_create("disk")
    os.ftruncate(number, DISK_BYTES)
    return number
