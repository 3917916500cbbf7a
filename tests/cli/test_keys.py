# SPDX-License-Identifier: GPL-2.0-or-later
"""Typed bytes: which go to the guest, and which are commands."""

from __future__ import annotations

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvm.cli.keys import NO_ESCAPE, Command, Keys, escape_key, key_name


@pytest.mark.parametrize(
    ("typed", "meaning"),
    [
        (b"ls\r", [b"ls\r"]),
        (b"\x03\x1a\x00\xff", [b"\x03\x1a\x00\xff"]),
        (b"a\x1dqb", [b"a", Command.QUIT, b"b"]),
        (b"\x1dI\x1d?", [Command.INSPECT, Command.HELP]),
        (b"a\x1d\x1db", [b"a\x1db"]),
        (b"\x1d\x03", [Command.HELP]),
        (b"\x1d", []),
        (b"", []),
    ],
)
def test_what_is_typed(typed: bytes, meaning: list[object]) -> None:
    assert Keys().feed(typed) == meaning


@given(st.binary(max_size=40), st.integers(0, 40))
def test_a_command_may_be_split(typed: bytes, at: int) -> None:
    typed = typed.replace(b"\x01", b"\x1d").replace(b"\x02", b"q")

    def joined(meaning: list[bytes | Command]) -> list[bytes | Command]:
        out: list[bytes | Command] = []
        for part in meaning:
            last = out[-1] if out else None
            if isinstance(part, bytes) and isinstance(last, bytes):
                out[-1] = last + part
            else:
                out.append(part)
        return out

    keys = Keys()
    assert joined(keys.feed(typed[:at]) + keys.feed(typed[at:])) == joined(Keys().feed(typed))


def test_another_escape_key() -> None:
    assert Keys(ord("~")).feed(b"\x1d~q~~") == [b"\x1d", Command.QUIT, b"~"]
    assert Keys(NO_ESCAPE).feed(bytes(range(256))) == [bytes(range(256))]


@pytest.mark.parametrize(
    ("text", "key"),
    [("ctrl-]", 0x1D), ("Ctrl-A", 1), ("^a", 1), ("^@", 0), ("~", 0x7E), ("^", 0x5E), ("none", -1)],
)
def test_names_of_keys(text: str, key: int) -> None:
    assert escape_key(text) == key


@pytest.mark.parametrize("text", ["", "ctrl-", "ctrl-1", "^?", "F1", "é", "ctrl-]]"])
def test_what_is_no_key(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a key"):
        escape_key(text)


@pytest.mark.parametrize("key", [0x1D, 1, 0, 0x7E])
def test_a_key_is_named_as_it_is_chosen(key: int) -> None:
    assert escape_key(key_name(key)) == key
