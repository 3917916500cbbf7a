# SPDX-License-Identifier: GPL-2.0-or-later
"""The person, or the pipe, at the guest's console while it runs.

One thread reads stdin and keeps what was typed until the console device takes
it. On a terminal it is in raw mode: every key goes to the guest but the escape
key (`pkvm.cli.keys`). A pipe's bytes all go to the guest, and its end is not
the end of the run.

Raw mode ends with the session, however it ends: in order, by an exception, by
SIGTERM or SIGHUP. Those two become SystemExit in the main thread, so that
everything else is closed in order as well.

A pipe is not read faster than the guest takes its bytes. Keys cannot wait,
since the escape key may be among them: what a guest does not take is lost
beyond INPUT_LIMIT, as on a serial line.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

from pkvm.cli import terminal
from pkvm.cli.keys import DEFAULT_ESCAPE, NO_ESCAPE, Command, Keys, escape_key, key_name

if TYPE_CHECKING:
    from pkvm.vmm.virtio.console import Console as VirtioConsole

CONSOLES = ("pl011", "virtio")
"""Devices that can be the console that stdin talks to."""
INPUT_LIMIT = 4096
"""Bytes kept for a guest that has not taken them yet."""

_WAKE_SIZE, _WAKE_DRAINED, _WAKE_END = b"\x81", b"\x82", b"\x83"
"""What wakes the reader, beside signals: those come as their numbers."""
_IFLAG = (
    termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR
    | termios.IGNCR | termios.ICRNL | termios.IXON
)  # fmt: skip
_LFLAG = termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN


class RawMode:
    """A terminal in raw mode: keys come one by one and unchanged; output goes unchanged as well if
    `output` says so, else as before. Raises OSError if `fd` is no terminal."""

    def __init__(self, fd: int, *, output: bool) -> None:
        self._fd = fd
        self._output = output
        try:
            self._before = termios.tcgetattr(fd)
        except termios.error as error:
            raise OSError(*error.args) from None
        self.enter()

    def enter(self) -> None:
        """Change the mode, also once more after the shell changed it back."""
        attributes = termios.tcgetattr(self._fd)
        attributes[0] &= ~_IFLAG
        if self._output:
            attributes[1] &= ~termios.OPOST
        attributes[2] = attributes[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        attributes[3] &= ~_LFLAG
        attributes[6][termios.VMIN], attributes[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._fd, termios.TCSANOW, attributes)

    def leave(self) -> None:
        """Put back what was. Idempotent; a terminal that is gone needs nothing."""
        try:
            termios.tcsetattr(self._fd, termios.TCSANOW, self._before)
        except termios.error:
            return


class LineEnds:
    """For a raw terminal: gives a line feed the carriage return that it lacks, until the guest
    sends a pair of its own. From then on it is taken for a system whose console does what it
    means, and nothing is changed."""

    def __init__(self) -> None:
        self._last = b""
        self._as_it_is = False

    def __call__(self, data: bytes) -> bytes:
        """What to write for the guest's next bytes."""
        if self._as_it_is:
            return data
        whole = self._last + data
        self._last = data[-1:]
        if b"\r\n" in whole:
            self._as_it_is = True
            return data
        return data.replace(b"\n", b"\r\n")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a guest's console."""
    group = parser.add_argument_group("console")
    group.add_argument(
        "--console",
        choices=CONSOLES,
        help="the device that stdin talks to: the UART, or virtio-console (hvc0); with one named, "
        "or a kernel, a terminal becomes raw (default: pl011)",
    )
    group.add_argument(
        "--escape",
        type=escape_key,
        default=DEFAULT_ESCAPE,
        metavar="KEY",
        help="the key that begins a command at the console (default ctrl-]), or none",
    )


def virtio_console(
    args: argparse.Namespace, console: terminal.Console, session: Session
) -> VirtioConsole | None:
    """The virtio-console that talks to stdin and stdout, if `--console virtio` asks for one."""
    if args.console != "virtio":
        return None
    # Imported here: few runs have one.
    from pkvm.vmm.virtio.console import Console

    return Console(console, session.take)


def nothing() -> None:
    """A callback of somebody who does not care."""


class Session:
    """Stdin, and the terminal behind it, for one run. The device takes input with `take` at any
    time; the rest begins with `start`, and ends with `close`.

    With `interactive`, and if stdin is a terminal and this process is in its foreground, that
    terminal is raw, and `escape` is the escape key.
    """

    def __init__(
        self, console: terminal.Console, *, interactive: bool, escape: int = DEFAULT_ESCAPE
    ) -> None:
        self._console = console
        self._interactive = interactive
        self._escape = escape
        self._stdin = _descriptor(sys.stdin)
        stdout = _descriptor(sys.stdout)
        self._screen = stdout if stdout is not None and os.isatty(stdout) else None
        self._raw: RawMode | None = None
        self._keys: Keys | None = None
        self._lock = threading.Lock()
        self._input = bytearray()
        self._waiting = False
        """The reader waits for room."""
        self._wake_out = self._wake_in = -1
        self._arrived: Callable[[], object] = nothing
        self._resized: Callable[[int, int], object] | None = None
        self._quit: Callable[[], object] = nothing
        self._inspect: Callable[[], str] = str
        self._handlers: dict[int, signal.Handlers | Callable[..., object] | int | None] = {}
        self._thread: threading.Thread | None = None

    @property
    def raw(self) -> bool:
        """Whether the terminal is in raw mode."""
        return self._raw is not None

    def start(
        self,
        *,
        arrived: Callable[[], object] = nothing,
        resized: Callable[[int, int], object] | None = None,
        on_quit: Callable[[], object] = nothing,
        on_inspect: Callable[[], str] = str,
    ) -> None:
        """Begin: in the main thread, since it handles signals. Raises OSError.

        From the reader's thread are called: `arrived` when there is something to `take`, `resized`
        with the terminal's columns and rows (once at first, then at every change), `on_quit` and
        `on_inspect` for the commands; the latter returns a paragraph.
        """
        self._arrived, self._quit, self._inspect = arrived, on_quit, on_inspect
        self._resized = resized
        self._wake_out, self._wake_in = os.pipe()
        os.set_blocking(self._wake_in, False)
        try:
            self._handle(signal.SIGTERM, self._terminate)
            self._handle(signal.SIGHUP, self._terminate)
            self._handle(signal.SIGWINCH, _leave_to_the_reader)
            self._handle(signal.SIGCONT, _leave_to_the_reader)
            if self._handlers:
                # Not in the main thread: a signal that another thread took does not wake it.
                signal.set_wakeup_fd(self._wake_in, warn_on_full_buffer=False)
            if self._interactive and self._stdin is not None and _in_foreground(self._stdin):
                self._enter_raw_mode(self._stdin)
            self._wake(_WAKE_SIZE)
            self._thread = threading.Thread(target=self._read, name="stdin", daemon=True)
            self._thread.start()
        except BaseException:
            self.close()
            raise

    def take(self, limit: int = INPUT_LIMIT) -> bytes:
        """Up to `limit` bytes of input; b"" if there is none now. Any thread may."""
        with self._lock:
            data = bytes(self._input[:limit])
            del self._input[:limit]
            if data and self._waiting:
                self._waiting = False
                self._wake(_WAKE_DRAINED)
            return data

    def close(self) -> None:
        """End the reader, restore terminal and signals. Idempotent; main thread."""
        try:
            if self._thread is not None:
                self._wake(_WAKE_END)
                self._thread.join()
                self._thread = None
            if self._handlers:
                signal.set_wakeup_fd(-1)
            while self._handlers:
                number, handler = self._handlers.popitem()
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            if self._wake_in >= 0:
                os.close(self._wake_in)
                os.close(self._wake_out)
                self._wake_out = self._wake_in = -1
        finally:
            self._restore()

    def _enter_raw_mode(self, fd: int) -> None:
        self._raw = RawMode(fd, output=self._screen is not None)
        if self._screen is not None:
            self._console.translate = LineEnds()
        if self._escape != NO_ESCAPE:
            self._keys = Keys(self._escape)
            self._say(f"{key_name(self._escape)} then ? for help, then q to quit")

    def _restore(self) -> None:
        if self._raw is not None:
            self._raw.leave()
            self._console.translate = None

    # The reader's thread.

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._wake_out, select.POLLIN)
        reading = False
        stdin = self._stdin
        while True:
            wanted = stdin is not None and not self._waiting
            if stdin is not None and wanted != reading:
                if wanted:
                    poll.register(stdin, select.POLLIN)
                else:
                    poll.unregister(stdin)
                reading = wanted
            ready = {fd for fd, _ in poll.poll()}
            if self._wake_out in ready:
                wakes = os.read(self._wake_out, 64)
                if _WAKE_END in wakes:
                    return
                if signal.SIGCONT in wakes:
                    self._continue()
                if _WAKE_SIZE in wakes or signal.SIGWINCH in wakes:
                    self._tell_size()
            if stdin is not None and stdin in ready and not self._read_some(stdin):
                poll.unregister(stdin)
                stdin, reading = None, False

    def _read_some(self, stdin: int) -> bool:
        """Read once; False at the end of the input."""
        with self._lock:
            room = INPUT_LIMIT - len(self._input)
        try:
            data = os.read(stdin, INPUT_LIMIT if self._raw is not None else room)
        except OSError:
            return False
        if not data:
            return False
        for part in [data] if self._keys is None else self._keys.feed(data):
            if isinstance(part, Command):
                self._do(part)
            else:
                self._put(part)
        return True

    def _put(self, data: bytes) -> None:
        with self._lock:
            self._input += data[: INPUT_LIMIT - len(self._input)]
            self._waiting = self._raw is None and len(self._input) == INPUT_LIMIT
        self._arrived()

    def _do(self, command: Command) -> None:
        if command is Command.QUIT:
            self._quit()
        elif command is Command.INSPECT:
            self._say(self._inspect())
        else:
            key = key_name(self._escape)
            self._say(f"{key} q quits, {key} i inspects, {key} {key} sends {key} to the guest")

    def _tell_size(self) -> None:
        if self._screen is None or self._resized is None:
            return
        try:
            size = os.get_terminal_size(self._screen)
        except OSError:
            return
        self._resized(size.columns, size.lines)

    def _continue(self) -> None:
        """The process goes on after a stop: the shell has put the terminal into its own mode."""
        if self._raw is not None and self._stdin is not None and _in_foreground(self._stdin):
            self._raw.enter()
            self._tell_size()

    def _say(self, text: str) -> None:
        """A paragraph of the VMM's own, on lines of its own."""
        lines = [f"[pkvm] {line}" for line in text.splitlines()]
        if self._screen is not None:
            start = "" if self._console.at_line_start else "\r\n"
            # Where the screen is gone, the guest's next byte tells the run.
            with suppress(terminal.OutputError):
                self._console.flush()
                terminal.write((start + "".join(f"{line}\r\n" for line in lines)).encode())
        else:
            print("\n".join(lines), file=sys.stderr, flush=True)

    def _wake(self, what: bytes) -> None:
        try:
            os.write(self._wake_in, what)
        except BlockingIOError:
            return  # The pipe is full: the reader wakes up anyway.

    # Signals, in the main thread.

    def _handle(self, number: int, handler: Callable[[int, FrameType | None], object]) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(number)
        # What was ignored when the process started stays so (nohup).
        if before is not signal.SIG_IGN:
            self._handlers[number] = before
            signal.signal(number, handler)

    def _terminate(self, number: int, _frame: FrameType | None) -> None:
        self._restore()
        signal.signal(number, signal.SIG_DFL)  # A second one ends the process at once.
        raise SystemExit(128 + number)


def _leave_to_the_reader(_number: int, _frame: FrameType | None) -> None:
    """The handler of a signal that the reader's thread acts upon."""


def _descriptor(stream: object) -> int | None:
    """The file descriptor of a standard stream, if it has one."""
    fileno = getattr(stream, "fileno", None)
    try:
        return None if fileno is None else int(fileno())
    except (OSError, ValueError):
        return None


def _in_foreground(fd: int) -> bool:
    """Whether `fd` is a terminal and this process may use it: a background job must not."""
    try:
        return os.isatty(fd) and os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False
