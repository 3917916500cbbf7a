# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of a command's output is found however it comes in pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pkvm.testbed.link import Output

MARKER = b"\x01ab\x01"


@given(st.binary(), st.lists(st.integers(1, 5)))
def test_output_ends_at_its_marker(data: bytes, sizes: list[int]) -> None:
    heard = bytearray()
    output = Output(MARKER, heard.extend)
    expected = data.partition(MARKER)[0]
    whole = data + MARKER
    for size in sizes:
        output.feed(whole[:size])
        whole = whole[size:]
        if output.ended:
            break
    if not output.ended:
        output.feed(whole)
    assert output.ended
    assert bytes(output.data) == bytes(heard) == expected


@given(st.lists(st.sampled_from([b"\x01", b"a", b"b", b"\x01ab", b"x"])))
def test_nothing_is_held_back_for_long(pieces: list[bytes]) -> None:
    output = Output(MARKER, None)
    sent = b""
    for piece in pieces:
        if MARKER in sent + piece:
            return
        output.feed(piece)
        sent += piece
        assert sent.startswith(output.data)
        assert len(sent) - len(output.data) < len(MARKER)
    assert not output.ended
