# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm run`, on the real machine: the demonstration, other guests, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fakes.code import POWER_OFF, RESET, SPIN, words
from fakes.elf import Elf, Phdr
from pkvm import fdt, guests
from pkvm.cli import status
from pkvm.cli.main import main
from pkvm.vmm.board import IMAGE_BASE, RAM_BASE

Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run_json(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        code = main(["run", "--json", "--timeout", "60", *map(str, arguments)])
        captured = capsys.readouterr()
        assert captured.err == ""
        assert captured.out.count("\n") == 1
        return code, json.loads(captured.out)

    return run


@pytest.fixture
def payload(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        path = tmp_path / "payload"
        path.write_bytes(data)
        return path

    return write


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["run", *map(str, arguments)]) == status.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_demonstration_powers_off_and_no_attempt_gets_through(run_json: Run) -> None:
    code, report = run_json()
    assert code == status.OK
    assert report["outcome"] == "powered-off"
    assert (report["backend"], report["dialect"]) == ("model", "rfc")
    assert "firmware: all as promised" in report["console"]
    assert "the VMM read 54 bytes" in report["console"]
    assert "my private pages are as I left them" in report["console"]
    probes = report["host_probes"]
    assert probes["tried"] == probes["refused"] > 600
    assert {kind["tried"] for kind in probes["by_kind"].values()} == {probes["tried"] // 6}
    assert probes["shared"] == {"tried": 6, "allowed": 6, "equal": True, "trouble": []}
    assert probes["not_tried"] is None
    assert report["exits"]["dabt_mmio"] > 100
    assert report["hypercalls"]["MEM_SHARE"] == report["hypercalls"]["MEM_UNSHARE"] == 1
    guest = {moment: pages["guest"] for moment, pages in report["pages_by_moment"].items()}
    all_pages = (16 + 2) * 256
    assert guest["shared"] == {"owned": all_pages - 1, "shared_with_host": 1}
    assert guest["unshared"] == guest["end"] == {"owned": all_pages, "shared_with_host": 0}
    assert report["pages"]["guest"] == guest["end"]
    assert 0 < report["seconds"] < 60


def test_the_report_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == status.OK
    text = capsys.readouterr().out
    console, report = text.split("\n\n", 1)
    assert console.endswith("my private pages are as I left them")
    for line in (
        "the guest powered off (PSCI SYSTEM_OFF)",
        "(protected VM, back-end model, dialect rfc)",
        "protected guest, shared with host            1           0           0",
        "private pages: every attempt was refused",
        "shared pages: every attempt was allowed, with equal content",
        "MEM_SHARE 1",
        "x host_access: the page belongs to VM 0x1000",
    ):
        assert line in report
    assert "\x1b" not in text


def test_unprotected_the_same_guest_runs_and_every_attempt_succeeds(run_json: Run) -> None:
    code, report = run_json("--unprotected")
    assert code == status.GOT_THROUGH
    assert report["outcome"] == "powered-off"
    assert report["protected"] is False
    assert "not a protected VM" in report["console"]
    assert "my private pages are as I left them" in report["console"]
    probes = report["host_probes"]
    assert probes["tried"] > 600
    assert probes["refused"] == 0
    assert len(probes["got_through"]) == 8
    assert probes["shared"]["equal"] is True


def test_unprotected_the_report_says_that_nothing_protects(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", "--unprotected"]) == status.GOT_THROUGH
    assert "got through to pages, as nothing protects them" in capsys.readouterr().out


def test_every_page_can_be_tried(run_json: Run) -> None:
    code, report = run_json("--probe-all", "--memory", "4M")
    assert code == status.OK
    probes = report["host_probes"]
    pages = (4 + 2) * 256
    assert probes["tried"] == probes["refused"] == 6 * (2 * pages - 1 + 1)
    assert probes["pages"] == 2 * pages + 1


@pytest.mark.parametrize("guest", ["hello", "sharing", "smp"])
def test_the_programs_that_ship_run_as_payloads(guest: str, run_json: Run, payload: Any) -> None:
    code, report = run_json(payload(guests.image(guest)), "--cpus", "2")
    assert (code, report["outcome"]) == (status.OK, "powered-off")


def test_an_elf_file_runs(run_json: Run, payload: Any) -> None:
    elf = Elf(
        entry=0x4030_0000,
        phdrs=[Phdr(0x4040_0000, b"data", flags=6), Phdr(0x4030_0000, POWER_OFF, flags=5)],
    )
    code, report = run_json(payload(elf.build()))
    assert (code, report["outcome"]) == (status.OK, "powered-off")
    assert "entry 0x40300000" in report["console"]


def test_a_guest_that_resets_did_not_power_off(run_json: Run, payload: Any) -> None:
    code, report = run_json(payload(RESET), "--no-reboot")
    assert (code, report["outcome"]) == (status.FAILED, "reset")
    assert report["restarts"] == 0
    assert report["host_probes"]["tried"] == report["host_probes"]["refused"]


@pytest.mark.parametrize("mode", [(), ("--unprotected",), ("--virtual-clock",)])
def test_a_guest_that_loops_for_ever_is_stopped(
    mode: tuple[str, ...], payload: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(payload(SPIN)), "--timeout", "0.4", *mode]) == status.TIMEOUT
    assert "still ran after 0.4 seconds" in capsys.readouterr().out


@pytest.mark.parametrize(
    "code",
    [
        words(0x0000_0000),  # udf
        words(0xF940_0000, 0x1400_0000),  # ldr x0, [x0]: the device tree
        words(0xD2C0_0200, 0xD61F_0000),  # x0 = 16 << 32; br x0: no memory there
        words(0xD2C0_0200, 0xF900_0000, 0x17FF_FFFE),  # stores there for ever
        words(0xD400_0003, 0x17FF_FFFF),  # smc for ever
    ],
)
@pytest.mark.parametrize("mode", [(), ("--unprotected",)])
def test_a_guest_that_runs_into_nothing_ends_somehow_and_nothing_leaks(
    code: bytes, mode: tuple[str, ...], payload: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(payload(code))
    ended = main(["run", "--json", image, "--timeout", "0.3", *mode])
    report = json.loads(capsys.readouterr().out)
    assert ended in (status.TIMEOUT, status.FAILED)
    probes = report["host_probes"]
    assert probes["refused"] == (0 if mode else probes["tried"])


def test_the_command_line_and_memory_reach_the_guest(run_json: Run) -> None:
    code, report = run_json("--memory", "8M", "--append", "hello=1")
    assert code == status.OK
    assert "RAM 0x40000000, 8 MiB" in report["console"]


def test_a_trace_has_every_event(run_json: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    code, report = run_json("--trace", path)
    assert code == status.OK
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"v": 1, "seq": 0, "t": 0, "kind": "header", "schema": "pkvm-events"}
    assert [line["seq"] for line in lines] == list(range(len(lines)))
    times = [line["t"] for line in lines]
    assert times == sorted(times)
    kinds = [line["kind"] for line in lines]
    for kind, count in report["events"].items():
        assert kinds.count(kind) >= count > 0
    refusals = [line for line in lines if line["kind"] == "refusal"]
    assert all(line["why"] and line["check"] for line in refusals)


def test_with_the_virtual_clock_two_traces_are_equal(run_json: Run, tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        code, _ = run_json("--virtual-clock", "--seed", "7", "--trace", path)
        assert code == status.OK
    assert paths[0].read_bytes() == paths[1].read_bytes()
    run_json("--virtual-clock", "--seed", "8", "--trace", paths[1])
    assert paths[0].read_bytes() != paths[1].read_bytes()


def test_a_trace_on_a_full_disk_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    assert main(["run", "--json", "--trace", "/dev/full"]) == status.FAILED
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "pkvm: error: /dev/full: the trace is not whole: No space left on device\n"
    )


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["/nonexistent/image"], "/nonexistent/image: No such file"),
        (["/"], "/: Is a directory"),
        (["--memory", "1M"], "between 4M and 1023G"),
        (["--memory", "4097K"], "between|multiple of 4K"),
        (["--memory", "6145"], "between 4M"),
        (["--cpus", "9"], "choose 1 to 8"),
        (["--cpus", "-1"], "choose 1 to 8"),
        (["--append", "x" * 5000], "command line"),
        (["--trace", "/nonexistent/trace"], "/nonexistent/trace: No such file"),
        (["--firmware", "/nonexistent/fw"], "/nonexistent/fw: No such file"),
        (["--host-dtb", "/nonexistent/dtb"], "/nonexistent/dtb: No such file"),
        (["--firmware", "/dev/null"], "empty"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *arguments)
    assert any(part in line for part in what.split("|"))


GOOD_ELF = Elf(phdrs=[Phdr(IMAGE_BASE, POWER_OFF)]).build()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "empty"),
        (bytes(20 << 20), "--memory"),
        (GOOD_ELF[:60], "ELF"),
        (GOOD_ELF[:-8], "truncated"),
        (Elf(kind=3).build(), "position-independent"),
        (Elf(phdrs=[Phdr(RAM_BASE, POWER_OFF)]).build(), "device tree"),
        (b"\x7fELF" + bytes(100), "cannot be read"),
    ],
)
def test_bad_images_are_refused_in_one_line(
    data: bytes, what: str, payload: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = payload(data)
    line = refused(capsys, path)
    assert str(path) in line
    assert what in line


def test_bad_firmware_is_refused(payload: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert "2 MiB" in refused(capsys, "--firmware", payload(bytes((2 << 20) + 1)))
    assert "ELF" in refused(capsys, "--firmware", payload(GOOD_ELF))


def test_other_firmware_runs(run_json: Run, payload: Any) -> None:
    code, report = run_json("--firmware", payload(POWER_OFF))
    assert (code, report["console"]) == (status.OK, "")


@pytest.mark.parametrize("data", [b"", b"not a device tree", bytes(100)])
def test_a_malformed_host_device_tree(
    data: bytes, payload: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = payload(data)
    assert main(["run", "--host-dtb", str(path)]) == status.USAGE
    assert capsys.readouterr().err.count("\n") == 1


def test_a_host_device_tree_without_firmware(
    payload: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "--host-dtb", payload(fdt.build(fdt.Tree())))
    assert "no guest firmware" in line


def test_a_host_without_protected_mode(run_json: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no protected VMs" in refused(capsys, "--kvm-mode", "nvhe")
    code, report = run_json("--kvm-mode", "nvhe", "--unprotected")
    assert code == status.GOT_THROUGH
    assert report["outcome"] == "powered-off"
