# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm compare` with the recorded run of the stock kernel, and with records that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pkvm.check import recorded
from pkvm.check.scenarios import TOPICS, record
from pkvm.cli.main import main


def compare(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["compare", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_model_agrees_with_the_stock_kernel_but_for_what_is_explained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, _ = compare(capsys, "--json")
    facts = json.loads(out)
    assert facts["unexplained"] == []
    assert facts["stale"] == []
    assert status == 0
    assert facts["observations"] >= 3200
    assert len(facts["explained"]) <= 0.05 * facts["observations"]
    assert list(facts["topics"]) == list(TOPICS)
    assert min(sum(counts.values()) for counts in facts["topics"].values()) >= 10
    assert all(row["reason"] for row in facts["explained"])


def test_one_topic_against_the_record(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture, kept = tmp_path / "table.svg", tmp_path / "kept.json"
    status, out, _ = compare(
        capsys, "--topic", "vm_types", "--json", "--svg", str(picture), "--record", str(kept)
    )
    facts = json.loads(out)
    assert facts["machine"]["kernel"].startswith("7.3")
    assert facts["observations"] == sum(facts["topics"]["vm_types"].values())
    assert (status == 0) == facts["holds"]
    assert picture.read_text().startswith("<svg ")
    rows = [row for row in recorded.load().observations if row.topic == "vm_types"]
    assert record.load(kept).observations == tuple(rows)


def test_a_difference_is_told_in_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    whole = recorded.load()
    rows = [row for row in whole.observations if row.topic == "vm_types"]
    rows[3] = rows[3]._replace(result="a surprise")
    path = tmp_path / "other.json"
    path.write_text(record.to_json(whole.machine, rows))
    status, out, _ = compare(capsys, "--recorded", str(path), "--topic", "vm_types")
    assert status == 1
    assert f"vm_types, {rows[3].scenario}: {rows[3].call} {rows[3].arguments}" in out
    assert "  the kernel: a surprise\n  the model:  fd" in out


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is not JSON"), ('{"format": 9}', "format 1"),
     ("[" * 100_000, "is not JSON"),
     ('{"format": 1, "machine": {}, "topics": {}}', "has nothing on vm_types")],
)  # fmt: skip
def test_a_record_that_is_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    status, out, err = compare(capsys, "--recorded", str(path), "--topic", "vm_types")
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = compare(capsys, "--topic", "nothing")
    assert status == 2
    assert f"there is no topic 'nothing'; there are {', '.join(TOPICS)}" in err
    status, _, err = compare(capsys, "--recorded", "/nowhere/at/all.json")
    assert status == 2
    assert "/nowhere/at/all.json: No such file" in err
    status, _, err = compare(capsys, "--backend", "/nowhere/kvm")
    assert status != 0
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "kvm"], "'kvm' is not a device such as /dev/kvm"),
        (["--backend", "model"], "'model' is not a device such as /dev/kvm"),
        (
            ["--cpu", "max", "--smp", "4"],
            "without --testbed there is no emulated machine for --cpu",
        ),
        (["--testbed", "--smp", "0"], "choose --smp 1 or more"),
        (["--testbed", "--memory", "1"], "choose 256M or more"),
    ],
)
def test_bad_options_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    ended: int | str | None
    try:
        ended = main(["compare", *arguments])
    except SystemExit as exit_:
        ended = exit_.code
    out, err = capsys.readouterr()
    assert (ended, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", ["--svg", "--record"])
def test_a_file_that_takes_nothing_is_named(
    capsys: pytest.CaptureFixture[str], option: str
) -> None:
    status, _, err = compare(capsys, "--topic", "psci", option, "/dev/full")
    assert status == 2
    assert "/dev/full: No space left on device" in err
