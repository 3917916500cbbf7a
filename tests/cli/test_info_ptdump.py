# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm info` and `pkvm ptdump`, on the real machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pkvm
from fakes.code import POWER_OFF, RESET
from pkvm import guests
from pkvm.cli import status
from pkvm.cli.main import main


def test_info_tells_what_the_host_offers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == status.OK
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"] == pkvm.__version__
    assert facts["dialect"] == "rfc"
    assert facts["protected_mode"] is True
    assert facts["api_version"] == 12
    assert facts["firmware_size"] == -(-len(guests.image("firmware")) // 4096) * 4096
    assert facts["capabilities"]["ARM_PROTECTED_VM"] == 1
    assert facts["max_vcpus"] >= 8
    assert facts["ipa_bits"] == 40
    assert facts["engine"] == "Unicorn 2.1.4"
    assert {"MEM_SHARE", "MEM_UNSHARE", "HYP_MEMINFO", "SYSTEM_OFF"} <= set(facts["hypercalls"])
    assert facts["hyp_bytes"] < facts["ram"]["bytes"]


def test_info_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--cpu-model", "max"]) == status.OK
    text = capsys.readouterr().out
    assert "protected mode: yes" in text
    assert "ARM_PROTECTED_VM 1" in text
    assert "max on Unicorn 2.1.4" in text
    assert "dma-copy is stream 1, the SMMU's answer: translate" in text


def test_info_of_a_host_without_protected_mode(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json", "--kvm-mode", "nvhe"]) == status.OK
    facts = json.loads(capsys.readouterr().out)
    assert facts["protected_mode"] is False
    assert facts["capabilities"]["ARM_PROTECTED_VM"] == 0
    assert facts["firmware_size"] == 0
    assert facts["hypercalls"] == []


def test_ptdump_shows_all_tables_while_a_page_is_shared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ptdump"]) == status.OK
    captured = capsys.readouterr()
    assert captured.err == ""
    host, dma, guest, smmu = captured.out.split("\n\n")
    assert host.startswith("host: ")
    assert "annotated: owned by guest VM 0x1000" in host
    assert dma.startswith("dma: ")
    assert guest.startswith("guest 0x1000: ")
    assert "2 MiB block" in guest
    assert guest.count("SHARED_OWNED") == 1
    assert "stream 0x1 (dma-copy, registers at 0x10000000): translate by VMID 0" in smmu


def test_ptdump_of_the_smmu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ptdump", "--table", "smmu", "--json"]) == status.OK
    report = json.loads(capsys.readouterr().out)
    assert report["tables"] == {}
    copy, scatter = report["smmu"]
    assert (copy["device"], copy["stream"], copy["does"]) == ("dma-copy", 1, "translate")
    assert scatter["root"] == copy["root"], "the identity domain"
    assert main(["ptdump", "--table", "smmu", "--kvm-mode", "nvhe", "--unprotected"]) == status.OK
    assert "(dma-sg, registers at 0x10001000): bypass" in capsys.readouterr().out


def test_ptdump_of_one_table_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ptdump", "--table", "guest", "--at", "end"]) == status.OK
    text = capsys.readouterr().out
    assert text.startswith("guest 0x1000: ")
    assert "SHARED_OWNED" not in text
    assert text.count("VTTBR") == 1


def test_ptdump_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ptdump", "--json"]) == status.OK
    report = json.loads(capsys.readouterr().out)
    assert report["at"] == "shared"
    assert set(report["tables"]) == {"host", "dma", "guest 0x1000"}
    runs = report["tables"]["guest 0x1000"]["runs"]
    (shared,) = [run for run in runs if run["state"] == "SHARED_OWNED"]
    assert shared["size"] == 4096
    dma = report["tables"]["dma"]["runs"]
    assert any(run["pa"] <= shared["pa"] < run["pa"] + run["size"] for run in dma)
    private = [run for run in runs if run["state"] == "OWNED"]
    assert not any(
        run["pa"] < mapped["pa"] + mapped["size"] and mapped["pa"] < run["pa"] + run["size"]
        for run in private
        for mapped in dma
    )


def test_ptdump_of_a_guest_that_never_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "image"
    image.write_bytes(POWER_OFF)
    assert main(["ptdump", str(image), "--table", "dma"]) == status.OK
    captured = capsys.readouterr()
    assert captured.out.startswith("dma: ")
    assert "at its end" in captured.err


def test_ptdump_says_when_the_guest_did_not_power_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "image"
    image.write_bytes(RESET)
    assert main(["ptdump", str(image), "--json"]) == status.FAILED
    assert json.loads(capsys.readouterr().out)["outcome"] == "reset"


def test_features_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--features", "--cpu", "max"]) == status.OK
    text = capsys.readouterr().out
    hidden = text.split("It does not get:")[1].split("It gets")[0]
    assert "SVE" in hidden
    assert "AArch32 at EL0" in hidden
    assert "UNDEFINED" in hidden


def test_features_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--features", "--json"]) == status.OK
    facts = json.loads(capsys.readouterr().out)
    features = {feature["name"]: feature for feature in facts["features"]}
    assert not facts["ptrauth_on_request"]
    assert features["performance monitors (PMU)"]["given"] == "hidden"
    assert features["performance monitors (PMU)"]["why"]
    assert features["AES"]["given"] == "whole"
