# SPDX-License-Identifier: GPL-2.0-or-later
"""`--dialect` and `--memlock` of `pkvm run` and `pkvm info`."""

from __future__ import annotations

import json

import pytest

from pkvm.cli import status
from pkvm.cli.main import main
from pkvm.uapi.dialects import DIALECTS, ROWS


@pytest.mark.parametrize("name", DIALECTS)
def test_the_demonstration_in_each_dialect(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--dialect", name, "--json"]) == status.OK
    result = json.loads(capsys.readouterr().out)
    assert result["dialect"] == name
    assert result["protected"] is True
    assert "took the page back" in result["console"]
    probes = result["host_probes"]
    assert probes["tried"] == probes["refused"] > 0
    assert probes["shared"]["equal"] is True
    assert (probes["untouched_pages"] > 0) == (name != "rfc")
    assert ("firmware: entered" in result["console"]) == (name == "rfc")


@pytest.mark.parametrize("name", DIALECTS)
def test_the_same_without_protection(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "--dialect", name, "--unprotected", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["outcome"] == "powered-off"
    assert result["protected"] is False


def test_a_limit_of_locked_memory_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    ended = main(["run", "--dialect", "upstream", "--memlock", "8K", "--json"])
    assert ended == status.FAILED
    result = json.loads(capsys.readouterr().out)
    assert result["outcome"] == "kernel-error"
    assert "ulimit -l" in result["detail"]
    assert "Errno" not in result["detail"]


@pytest.mark.parametrize("name", ["android", "upstream"])
def test_a_host_not_in_protected_mode(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--dialect", name, "--kvm-mode", "nvhe"]) not in (status.OK, None)
    assert "protected mode" in capsys.readouterr().err


@pytest.mark.parametrize("name", DIALECTS)
def test_info_tells_the_dialects_rules(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--dialect", name]) == status.OK
    text = capsys.readouterr().out
    assert f"dialect {name}" in text
    for row in ROWS:
        assert f"  {row.topic}: {row.answer(DIALECTS[name])}" in text
    assert ("guest firmware: none" in text) == (name == "upstream")
    assert ("MEM_RELINQUISH" in text.partition("hypercalls:")[2].partition("\n")[0]) == (
        name == "android"
    )
