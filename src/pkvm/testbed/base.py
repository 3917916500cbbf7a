# SPDX-License-Identifier: GPL-2.0-or-later
"""What every test bed offers, emulated or real: a machine whose kernel is the real one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

PACKAGE = Path(__file__).parent.parent
"""This package's own files."""

Progress = Callable[[str], None]
"""Is told in a few words what is being done."""

Listener = Callable[[bytes], None]
"""Is handed a command's output as it comes."""


class BedError(Exception):
    """There is no test bed, or no longer one; the text is one line, with what to do about it."""


class TimedOut(BedError):
    """A command did not end in its time. It was killed; the bed is of use still."""


def silent(words: str) -> None:
    """Progress that nobody sees."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended: its exit status, 128 and the number for a signal, and its output."""

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def ok(self) -> bool:
        """Whether the exit status is 0."""
        return self.status == 0


@dataclass(frozen=True, slots=True)
class Terminal:
    """A person's terminal, in raw mode.

    `read` is called when there is something at the file descriptor `fd`: what is to be sent, or
    None to leave. `write` shows bytes.
    """

    fd: int
    rows: int
    columns: int
    read: Callable[[], bytes | None]
    write: Listener


class Bed(ABC):
    """An arm64 machine with this package in it, for the length of a `with` block.

    A command finds `python3`, `pkvm` and a shell. Relative paths begin at the folder in which
    commands run.
    """

    def __enter__(self) -> Self:
        try:
            self.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def boot(self) -> None:
        """Get the machine to where it takes commands; nothing if it is there. Raises BedError."""

    @abstractmethod
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
        """Run a command to its end, and what it started with it.

        `timeout` is in seconds. Raises TimedOut, and BedError if the machine is gone.
        """

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Write a file, with the folders that lead to it. Raises BedError."""

    @abstractmethod
    def shell(self, terminal: Terminal) -> int:
        """A prompt at a terminal till the person leaves; the shell's exit status.

        Raises BedError.
        """

    @abstractmethod
    def close(self) -> None:
        """End the machine, or let go of it, with all that was put there. May be called again."""

    def get(self, path: str) -> bytes:
        """Read a file. Raises BedError."""
        result = self.run(("cat", "--", path))
        if not result.ok:
            said = result.stderr.decode(errors="replace").strip() or f"status {result.status}"
            raise BedError(f"{path} cannot be fetched from the test bed: {said}")
        return result.stdout


def package_files() -> dict[PurePosixPath, bytes]:
    """This package's files by their path from the folder that holds it. Raises OSError."""
    return {
        PurePosixPath(PACKAGE.name, path.relative_to(PACKAGE)): path.read_bytes()
        for path in sorted(PACKAGE.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
