# SPDX-License-Identifier: GPL-2.0-or-later
"""A run of the scenarios as one JSON file: on what it was made, and what was seen.

One line an observation, so that two records can be compared with diff, and no date. What the
machine was comes from the machine: its kernel's release and command line, its CPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pkvm.check.scenarios.observation import Observation

FORMAT = 1
_IDENTIFICATION = Path("/sys/devices/system/cpu/cpu0/regs/identification/midr_el1")
_COMMAND_LINE = Path("/proc/cmdline")


class RecordError(Exception):
    """A record cannot be read; the text says why."""


class Record(NamedTuple):
    """A run."""

    machine: Mapping[str, str]
    """What it was made on: "kernel", "cpu", "command_line", "qemu" and the like, in words."""
    observations: tuple[Observation, ...]


def machine() -> dict[str, str]:
    """The machine that this process runs on, as far as it tells."""
    facts = {"kernel": os.uname().release, "architecture": os.uname().machine}
    for name, path in (("midr", _IDENTIFICATION), ("command_line", _COMMAND_LINE)):
        try:
            facts[name] = path.read_text(encoding="utf-8").strip()
        except OSError:
            continue  # another architecture, or a kernel that does not say
    return facts


def to_json(facts: Mapping[str, str], observations: Iterable[Observation]) -> str:
    """The text of a record."""
    topics: dict[str, dict[str, list[str]]] = {}
    for row in observations:
        line = json.dumps([row.call, row.arguments, *row.outcome()])
        topics.setdefault(row.topic, {}).setdefault(row.scenario, []).append(line)
    parts = []
    for topic, scenarios in topics.items():
        inner = ",\n".join(
            f"   {json.dumps(name)}: [\n    " + ",\n    ".join(lines) + "\n   ]"
            for name, lines in scenarios.items()
        )
        parts.append(f"  {json.dumps(topic)}: {{\n{inner}\n  }}")
    return (
        f'{{\n "format": {FORMAT},\n "machine": {json.dumps(dict(facts))},\n "topics": {{\n'
        + ",\n".join(parts)
        + "\n }\n}\n"
    )


def from_json(text: str, name: str = "the record") -> Record:
    """Read a record's text. Raises RecordError, with `name` in its words."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{name} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise RecordError(f"{name} is not a record of format {FORMAT}; make one with --record")
    try:
        rows = [
            Observation(topic, scenario, index, *_six(row))
            for topic, scenarios in data["topics"].items()
            for scenario, lines in scenarios.items()
            for index, row in enumerate(lines)
        ]
        facts = {str(key): str(value) for key, value in data["machine"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{name} is damaged: {type(error).__name__} {error}") from error
    return Record(facts, tuple(rows))


def load(path: Path) -> Record:
    """Read a record. Raises RecordError, OSError."""
    try:
        return from_json(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is not JSON: {error}") from error


def _six(row: Any) -> tuple[str, str, str, str, str, str]:
    """The fields of a line. Raises ValueError, TypeError."""
    call, arguments, result, errno, guest, host = row
    fields = (call, arguments, result, errno, guest, host)
    if not all(isinstance(field, str) for field in fields):
        raise TypeError(f"a field of {row!r} is not text")
    return fields
