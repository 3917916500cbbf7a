# SPDX-License-Identifier: GPL-2.0-or-later
"""The options of virtio devices: slots in the order of the command line, and clear refusals."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from fakes.code import POWER_OFF
from fakes.virtio_driver import Driver, Rig
from pkvm.cli import devices, options, run, status
from pkvm.cli.main import main
from pkvm.vmm.errors import LoadError
from pkvm.vmm.virtio.blk import F_RO, Block
from pkvm.vmm.virtio.disk import Disk


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.configure(parser)
    args = parser.parse_args(words)
    options.settle(args)
    return args


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(8192))
    return str(path)


def test_nothing_asked_for_is_nothing_made() -> None:
    assert devices.Devices(parse()).by_slot == {}
    assert devices.Devices(parse()).traffic() == []


def test_slots_follow_the_command_line(image: str) -> None:
    args = parse("--rng", "--disk", f"{image},ro", "--disk", f"{image},ro")
    opened = devices.Devices(args)
    made = opened.by_slot
    assert [device.device_id for device in made.values()] == [4, 2, 2]
    assert list(made) == [0, 1, 2]
    assert made[1].device_features & F_RO
    opened.close()
    opened.close()


@pytest.mark.parametrize(
    ("flags", "read_only", "by_dma"),
    [("", False, False), (",dma", False, True), (",ro,dma", True, True), (",dma,ro", True, True)],
)
def test_a_disks_flags(image: str, flags: str, read_only: bool, by_dma: bool) -> None:
    opened = devices.Devices(parse("--disk", image + flags))
    device = opened.by_slot[0]
    assert isinstance(device, Block)
    assert (device.disk.read_only, device.by_dma) == (read_only, by_dma)
    opened.close()


def test_a_disk_is_writable_unless_it_is_not(image: str) -> None:
    opened = devices.Devices(parse("--disk", image))
    (device,) = opened.by_slot.values()
    assert isinstance(device, Block)
    assert not device.disk.read_only
    opened.close()


def test_when_one_cannot_be_made_the_others_are_closed(image: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        devices.Devices(parse("--disk", image, "--disk", str(tmp_path / "none")))
    Disk(image).close()  # is not in use


@pytest.mark.parametrize(
    ("options", "repeats"), [((), False), (("--seed", "7"), True), (("--clock", "virtual"), True)]
)
def test_entropy_repeats_where_the_run_does(options: tuple[str, ...], repeats: bool) -> None:
    drawn = {
        Driver(Rig(devices.Devices(parse("--rng", *options)).by_slot[0])).request(writable=[32])
        for _ in range(2)
    }
    assert (len(drawn) == 1) == repeats


def test_bad_too_many() -> None:
    with pytest.raises(LoadError, match=r"slots \(32\)"):
        devices.Devices(parse(*["--rng"] * 33))


def test_the_report_has_a_row_for_each(
    image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    payload = tmp_path / "payload"
    payload.write_bytes(POWER_OFF)
    options = ["--timeout", "60", "--rng", "--disk", image, str(payload)]
    assert main(["run", "--json", *options]) == status.OK
    report = json.loads(capsys.readouterr().out)
    assert [row["device"] for row in report["devices"]] == [
        "virtio-rng (slot 0)",
        f"virtio-blk {image} (slot 1)",
    ]
    assert all(row["bounced"] and not row["buffers"] for row in report["devices"])
    assert report["device_faults"] == []
    assert main(["run", "--unprotected", *options]) != status.USAGE
    assert "Virtio devices:\n  virtio-rng (slot 0): 0 buffers" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["odd", "none", "folder"])
def test_bad_disk_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    (tmp_path / "odd").write_bytes(bytes(100))
    (tmp_path / "folder").mkdir()
    assert main(["run", "--disk", str(tmp_path / what)]) == status.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert str(tmp_path / what) in captured.err


@pytest.mark.parametrize("value", ["", ",dma", ",ro,dma"])
def test_bad_disk_without_a_name(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--disk", value]) == status.USAGE
    assert "name a file first" in capsys.readouterr().err
