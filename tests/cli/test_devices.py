# SPDX-License-Identifier: GPL-2.0-or-later
"""The options of virtio devices: slots in the order of the command line, and clear refusals."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from pkvm.cli import devices
from pkvm.vmm.errors import LoadError
from pkvm.vmm.virtio.blk import F_RO, Block
from pkvm.vmm.virtio.disk import Disk


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    devices.add_options(parser)
    return parser.parse_args(words)


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


def test_bad_too_many() -> None:
    with pytest.raises(LoadError, match=r"slots \(32\)"):
        devices.Devices(parse(*["--rng"] * 33))
