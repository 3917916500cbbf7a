# SPDX-License-Identifier: GPL-2.0-or-later
"""JSON lines: the schema that docs/events.md describes, byte for byte the same each time."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import get_type_hints

import pytest

from pkvm.events import KINDS, SCHEMA_VERSION, Event, GuestHypercall, Message, Transition
from pkvm.trace.counting import CountingRecorder
from pkvm.trace.jsonl import JsonLinesRecorder

DOC = Path(__file__).parents[2] / "docs" / "events.md"


def example(kind: type[Event]) -> Event:
    values: dict[type, object] = {str: "a word", int: 7, bool: True}
    return kind._make(values[hint] for hint in get_type_hints(kind).values())


def test_lines_number_themselves_and_carry_the_time() -> None:
    file = io.StringIO()
    recorder = JsonLinesRecorder(file)
    recorder.record(Message("host", "before the machine"))
    recorder.now_ns = lambda: 1600
    recorder.record(Transition("host_donate_guest", 0x8000_0000, 512, 0x1000, 0x4000_0000))
    recorder.record(GuestHypercall(0x1000, 0, 0xC600_0003, 2**64 - 3))
    recorder.finish()
    assert file.getvalue() == (
        '{"v":1,"seq":0,"t":0,"kind":"header","schema":"pkvm-events"}\n'
        '{"v":1,"seq":1,"t":0,"kind":"message","source":"host","text":"before the machine"}\n'
        '{"v":1,"seq":2,"t":1600,"kind":"transition","op":"host_donate_guest","pa":2147483648,'
        '"npages":512,"vm":4096,"ipa":1073741824}\n'
        '{"v":1,"seq":3,"t":1600,"kind":"hypercall","vm":4096,"vcpu":0,"function":3321888771,'
        '"result":18446744073709551613}\n'
    )


def test_every_event_is_written_and_passed_on() -> None:
    file = io.StringIO()
    counting = CountingRecorder()
    recorder = JsonLinesRecorder(file, lambda: 1, tee=counting)
    for kind in KINDS:
        recorder.record(example(kind))
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [line["kind"] for line in lines] == ["header", *KINDS.values()]
    assert [line["seq"] for line in lines] == list(range(len(KINDS) + 1))
    for line, kind in zip(lines[1:], KINDS, strict=True):
        assert tuple(line)[4:] == kind._fields
    assert counting.totals() == dict.fromkeys(KINDS.values(), 1)


def test_the_document_describes_every_record_and_field() -> None:
    text = DOC.read_text()
    assert f"version of this schema: {SCHEMA_VERSION}" in text
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^### |\Z)", text, re.S | re.M))
    described = {
        kind: tuple(re.findall(r"^\| `(\w+)` \|", body, re.M)) for kind, body in sections.items()
    }
    assert described.pop("header") == ("schema",)
    assert described == {name: kind._fields for kind, name in KINDS.items()}


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        if self.tell() > 200:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_a_full_disk_is_told_at_the_end_and_not_before() -> None:
    recorder = JsonLinesRecorder(FullDisk())
    for _ in range(10):
        recorder.record(Message("host", "x" * 50))
    with pytest.raises(OSError, match="No space left"):
        recorder.finish()
