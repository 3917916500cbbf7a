# SPDX-License-Identifier: GPL-2.0-or-later
"""The attacker's tour on real Linux: nothing gets through, and without its guard each does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pkvm
from fakes.linux_fixtures import Linux
from pkvm.check.attacks import NAMES, attack
from pkvm.check.attacks.tour import End, Material, staged, tour, weakened_twin
from pkvm.check.mutants import MUTANTS
from pkvm.cli.main import main

pytestmark = [pytest.mark.linux, pytest.mark.timeout(1800)]  # a kernel may have to be built


@pytest.fixture(scope="module")
def material(linux: Linux) -> Material:
    return Material(linux.kernel("sharing").read_bytes(), linux.initrd.read_bytes())


def test_no_attack_gets_through(material: Material) -> None:
    started: list[str] = []
    verdicts = list(tour(NAMES, material, started.append))
    assert started == list(NAMES)
    assert len(verdicts) >= 30
    assert [one.name for one in verdicts if one.end is not End.REFUSED] == []
    for verdict in verdicts:
        assert verdict.whole in (True, None), verdict
        assert verdict.places, f"{verdict.name}: nobody says where it stopped"
        for place in verdict.places:
            source = Path(pkvm.__file__).parent / place.file
            assert 0 < place.line <= len(source.read_text().splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_without_its_guard_each_does(name: str, material: Material) -> None:
    assert attack(name).GUARD in MUTANTS
    verdict = weakened_twin(name, material)
    assert verdict.end in (End.THROUGH, End.HARM), verdict.words


def test_the_command_tells_in_json(linux: Linux, capfd: pytest.CaptureFixture[str]) -> None:
    files = ("--kernel", str(linux.kernel("sharing")), "--initrd", str(linux.initrd))
    assert main(["attack", *files, "--json", "read_by_cpu", "read_after_kill"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["holds"] is True
    assert [one["name"] for one in told["attacks"]] == ["read_by_cpu", "read_after_kill"]
    assert told["attacks"][0]["places"][0]["check"] == "host_stage2"
    assert told["attacks"][0]["whole"] is True
    assert told["attacks"][1]["whole"] is None
    assert main(["attack", *files, "--weakened", "read_by_cpu"]) == 0
    said = capfd.readouterr().out
    assert "it read: the guest's secret" in said
    assert "1 of 1 attacks got through without their guards" in said


def test_the_stock_kernel_has_memory_to_spare(linux: Linux) -> None:
    material = Material(linux.kernel("7.3").read_bytes(), linux.initrd.read_bytes())
    with staged(material, ()) as scene:
        free = scene.guest.shell("grep MemFree /proc/meminfo").split()
    assert free[2] == "kB"
    assert int(free[1]) >= 32 << 10
