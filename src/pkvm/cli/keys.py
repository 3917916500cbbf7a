# SPDX-License-Identifier: GPL-2.0-or-later
"""What is typed at a terminal, told apart: bytes for the guest, and commands for the VMM.

The escape key (Ctrl-] by default) begins a command, and the next key is it:
`q` quits, `i` inspects, `?` helps, the escape key once more sends itself. Any
other key ends the command without one, and helps.
"""

from __future__ import annotations

import argparse
from enum import Enum

DEFAULT_ESCAPE = 0x1D
NO_ESCAPE = -1
"""No key is the escape key: everything goes to the guest."""


class Command(Enum):
    """What the person at the terminal asks of the VMM."""

    QUIT = "q"
    INSPECT = "i"
    HELP = "?"


def escape_key(text: str) -> int:
    """The byte that a key's name stands for: "ctrl-]" or "^]" for a control character, one ASCII
    character for itself, "none" for NO_ESCAPE."""
    name = text.lower()
    if name == "none":
        return NO_ESCAPE
    for prefix in ("ctrl-", "^"):
        key = name.removeprefix(prefix).upper()
        if key != name.upper() and len(key) == 1 and "@" <= key <= "_":
            return ord(key) & 0x1F
    if len(text) == 1 and text.isascii():
        return ord(text)
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a key: choose one such as 'ctrl-]' or '~', or 'none'"
    )


def key_name(key: int) -> str:
    """The escape key `key` for people."""
    return f"Ctrl-{chr(key | 0x40)}" if key < 0x20 else chr(key)


class Keys:
    """Tells typed bytes apart. A command may be split over two reads."""

    def __init__(self, escape: int = DEFAULT_ESCAPE) -> None:
        self.escape = escape
        self._escaped = False

    def feed(self, data: bytes) -> list[bytes | Command]:
        """What `data` means, in order: runs of bytes for the guest, and commands."""
        meaning: list[bytes | Command] = []
        run = bytearray()
        for byte in data:
            if not self._escaped:
                if byte == self.escape:
                    self._escaped = True
                else:
                    run.append(byte)
                continue
            self._escaped = False
            if byte == self.escape:
                run.append(byte)
                continue
            if run:
                meaning.append(bytes(run))
                run.clear()
            meaning.append(_COMMANDS.get(chr(byte).lower(), Command.HELP))
        if run:
            meaning.append(bytes(run))
        return meaning


_COMMANDS = {command.value: command for command in Command}
