# SPDX-License-Identifier: GPL-2.0-or-later
"""Every test and benchmark that SPECIFICATION.md names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SPECIFICATION.md").read_text()


def test_the_tests_it_names_exist() -> None:
    names = re.findall(r"`((?:tests|check)/[\w/]+(?:\.py)?|test_\w+\.py)`", TEXT)
    assert len(names) > 15
    files = {path.name for path in ROOT.glob("tests/**/*.py")}
    for name in names:
        path = ROOT / ("src/pkvm" if name.startswith("check/") else "") / name
        assert path.exists() or Path(name).name in files, name


def test_the_benchmarks_it_names_exist() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    names = re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)+)`", TEXT)
    assert len(names) >= 7
    for name in names:
        assert f'"{name}"' in sources, name


def test_the_programs_it_names_exist() -> None:
    names = re.findall(r"`(benchmarks/\w+\.py)", TEXT)
    assert names
    for name in names:
        assert (ROOT / name).exists(), name


def test_the_numbers_run_from_1_up() -> None:
    numbers = re.findall(r"^(?:\| )?(\d+)(?:\.| \|) ", TEXT, re.MULTILINE)
    assert list(map(int, numbers)) == list(range(1, len(numbers) + 1))
