# SPDX-License-Identifier: GPL-2.0-or-later
"""README names every verb and every page of the documentation, each page once;
the examples of the pages run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pkvm.cli.main import VERBS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_every_page_is_listed_once() -> None:
    listed = re.findall(r"^- \[docs/(\w[\w-]*\.md)\]\(docs/\1\): ", TEXT, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_every_verb_is_shown() -> None:
    shown = re.findall(r"^pkvm (\w+)", TEXT, re.MULTILINE)
    assert set(shown) == set(VERBS)


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("page", ["events.md", "firmware-doors.md"])
def test_the_examples_run_as_they_stand(page: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        subprocess.run((sys.executable, "-c", example), cwd=tmp_path, check=True, timeout=60)
