# SPDX-License-Identifier: GPL-2.0-or-later
"""A Linux guest in a protected VM of this process, with a shell at its console."""

from __future__ import annotations

import threading
import time

from pkvm.kvm import Kvm
from pkvm.testbed.initramfs import MARKER
from pkvm.vmm.board import Board
from pkvm.vmm.initrd import place_initrd
from pkvm.vmm.loader import load_image
from pkvm.vmm.vmm import Outcome, Vmm

RAM_BYTES = 128 << 20
COMMAND_LINE = "console=ttyAMA0 panic=-1 cma=8M"
"""Debian's kernel would keep half of the RAM for contiguous buffers, where its own objects may not
lie: it then runs out of memory in one boot of five."""
PROMPT = "/ # "
STATUS = "=status="
SHELL_SECONDS = 10.0
"""The longest that a guest may take for an answer; one that was hurt gives none."""


class GuestError(Exception):
    """The guest did not do what it was told; the text ends with the last that it said."""


def typed(command: str) -> str:
    """What to type so that the shell runs `command` and tells its status.

    The terminal echoes what is typed: not quite the words that are waited for.
    """
    return f"{command}; echo =sta''tus=$?=\n"


def answer(text: str) -> tuple[str, int]:
    """What a command printed, and its status, from all that the console said since it was typed up
    to the next prompt."""
    said, _, rest = text.replace("\r", "").rpartition(STATUS)
    return said.partition("=$?=\n")[2], int(rest.partition("=")[0])


class LinuxGuest:
    """Linux with `kernel` and `initrd` as files have them (see `testbed.initramfs`).

    Runs in a thread of its own from `start` to `stop`, and boots within `limit` seconds. Raises
    LoadError, OSError.
    """

    def __init__(
        self, kvm: Kvm, kernel: bytes, initrd: bytes, *, cpus: int = 1, limit: float = 120
    ) -> None:
        board = Board(RAM_BYTES, cpus, COMMAND_LINE, gic=True)
        image = load_image(kernel, board)
        self._said = bytearray()
        self._seen = 0
        self._typed = bytearray()
        self._news = threading.Condition()
        self._deadline = time.monotonic() + limit
        self._failure: Exception | None = None
        self.outcome: Outcome | None = None
        """How the guest ended."""
        self.vmm = Vmm(
            kvm,
            board,
            image,
            initrd=place_initrd(initrd, image, board),
            console=self._hear,
            source=self._take,
        )
        self._thread = threading.Thread(target=self._run, args=(limit,), name="guest")

    def start(self) -> None:
        """Let it run."""
        self._thread.start()

    def stop(self) -> None:
        """Stop it, if it has not ended; what it has stays."""
        self.vmm.stop()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._thread.is_alive()

    def boot(self) -> None:
        """Wait for the shell. Raises GuestError if it does not come."""
        self._expect(MARKER.encode())
        self._expect(PROMPT.encode())
        self.shell("dmesg -n 1")

    def shell(self, command: str, limit: float = SHELL_SECONDS) -> str:
        """What `command` prints. Raises GuestError if it fails, or has not ended after `limit`
        seconds."""
        self._deadline = time.monotonic() + limit
        start = len(self._said)
        with self._news:
            self._typed += typed(command).encode()
        self.vmm.uart.arrived()
        self._expect(STATUS.encode())
        self._expect(PROMPT.encode())
        told, status = answer(self._said[start:].decode("utf-8", "replace"))
        if status:
            raise self._error(f"{command!r} ended with status {status}")
        return told

    def _run(self, limit: float) -> None:
        try:
            self.outcome = self.vmm.run(limit)
        except Exception as error:
            # The thread's boundary: who waits for the guest hears of it.
            self._failure = error
        with self._news:
            self._news.notify_all()

    def _hear(self, data: bytes) -> None:
        with self._news:
            self._said += data
            self._news.notify_all()

    def _take(self, room: int) -> bytes:
        with self._news:
            taken = bytes(self._typed[:room])
            del self._typed[:room]
        return taken

    def _expect(self, words: bytes) -> None:
        with self._news:
            while (at := self._said.find(words, self._seen)) < 0:
                left = self._deadline - time.monotonic()
                if left <= 0 or not self.alive:
                    raise self._error(f"the guest never said {words.decode()!r}")
                self._news.wait(min(left, 1))
            self._seen = at + len(words)

    def _error(self, what: str) -> GuestError:
        last = self._said.decode("utf-8", "replace").replace("\r", "")[-600:]
        how = self._failure or (self.outcome.detail if self.outcome else "it still runs")
        return GuestError(f"{what} ({how}); it said last:\n{last}")
