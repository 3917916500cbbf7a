# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm attack` before there is a guest: its catalogue, and what it cannot use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pkvm.check import attacks
from pkvm.check.attacks import NAMES, attack
from pkvm.check.attacks.witness import comes_from_el2
from pkvm.cli.main import main
from pkvm.hyp.errors import Refused
from pkvm.hyp.ownership import leaf_level


def test_the_catalogue(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", "--list"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES)
    assert len(set(NAMES)) == len(NAMES) >= 30
    assert len({attack(name).TRIES for name in NAMES}) == len(NAMES)


def test_the_catalogue_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", "--list", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert [row["name"] for row in rows] == list(NAMES)
    assert all(row["tries"] for row in rows)


def test_every_module_is_in_the_catalogue() -> None:
    folder = Path(attacks.__file__).parent
    modules = {path.stem for path in folder.glob("*.py") if "\nTRIES = " in path.read_text()}
    assert modules == set(NAMES)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["read_minds"], 2, "there is no attack 'read_minds'; --list lists them"),
        (["--kernel", "/nowhere", "--initrd", "/nowhere"], 2, "/nowhere: No such file"),
        (["--kernel", "/bin/sh", "--initrd", "/bin/sh", "read_by_cpu"], 2, "not an arm64 kernel"),
        (["--kernel", __file__, "--initrd", __file__], 2, "not an arm64 kernel"),
    ],
)
def test_what_it_cannot_use(
    arguments: list[str], status: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["attack", *arguments]) == status
    error = capfd.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_an_error_of_an_attack_is_not_el2s_end() -> None:
    with pytest.raises(ValueError, match="no list") as theirs:
        raise ValueError("no list")
    assert not comes_from_el2(theirs.value)
    with pytest.raises(Refused) as el2s:
        leaf_level(3, 0)
    assert comes_from_el2(el2s.value)
