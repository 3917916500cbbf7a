# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/rfc-review.md names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/rfc-review.md").read_text())


def test_every_question_names_tests() -> None:
    parts = (ROOT / "docs/rfc-review.md").read_text().split("\n## ")[1:]
    assert len(parts) == 7
    assert all("::test_" in part for part in parts)


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_named_test_exists(file: str, name: str) -> None:
    text = (ROOT / file).read_text()
    assert re.search(rf"^(def {name}\(|{name} = )", text, re.MULTILINE)
