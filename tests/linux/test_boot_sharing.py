# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel of guests/linux with devices: a protected guest that shares what it must."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from fakes.linux_fixtures import Linux, Shell

pytestmark = [pytest.mark.linux, pytest.mark.timeout(1800)]  # it may have to be built first

MIB = 1 << 20


def test_it_knows_that_it_is_protected(linux: Linux) -> None:
    with linux.boot("sharing", "--rng") as console:
        shell = Shell(console)
        assert shell.run("dmesg | grep -c restricted") != "0\n"
        assert "restricted" in shell.run("ls /proc/device-tree/reserved-memory")
        shell.power_off()


def test_a_disk_is_read_and_written(linux: Linux, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    content = os.urandom(3 * MIB + 17)
    (tree / "from-host").write_bytes(content)
    disk = tmp_path / "disk.ext4"
    make = ("mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(disk), "32M")
    subprocess.run(make, check=True)
    with linux.boot("sharing", "--disk", str(disk)) as console:
        shell = Shell(console)
        shell.run("mkdir /mnt && mount /dev/vda /mnt")
        digest = shell.run("sha256sum </mnt/from-host").split()[0]
        assert digest == hashlib.sha256(content).hexdigest()
        shell.run("dd if=/dev/urandom of=/mnt/from-guest bs=1M count=2 && sync")
        written = shell.run("sha256sum </mnt/from-guest").split()[0]
        shell.run("umount /mnt")
        shell.power_off()
    subprocess.run(("e2fsck", "-fn", str(disk)), check=True, capture_output=True)
    dump = ("debugfs", "-R", "cat /from-guest", str(disk))
    found = subprocess.run(dump, check=True, capture_output=True).stdout
    assert len(found) == 2 * MIB
    assert hashlib.sha256(found).hexdigest() == written


def test_a_disk_whose_data_moves_by_dma(linux: Linux, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    content = os.urandom(2 * MIB)
    disk.write_bytes(content)
    with linux.boot("sharing", "--disk", f"{disk},dma") as console:
        shell = Shell(console)
        assert shell.run("sha256sum </dev/vda").split()[0] == hashlib.sha256(content).hexdigest()
        shell.run("dd if=/dev/vda of=/dev/vda bs=64k skip=1 count=4 2>/dev/null && sync")
        shell.power_off()
    moved = content[65536 : 5 * 65536]
    assert disk.read_bytes() == moved + content[len(moved) :]


def test_a_read_only_disk_stays_as_it_is(linux: Linux, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    content = os.urandom(MIB)
    disk.write_bytes(content)
    with linux.boot("sharing", "--disk", f"{disk},ro") as console:
        shell = Shell(console)
        assert shell.run("cat /sys/block/vda/ro") == "1\n"
        shell.run("dd if=/dev/zero of=/dev/vda bs=4k count=1 2>/dev/null", status=1)
        assert shell.run("sha256sum </dev/vda").split()[0] == hashlib.sha256(content).hexdigest()
        shell.power_off()
    assert disk.read_bytes() == content


def test_two_disks_keep_their_order(linux: Linux, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(name.encode().ljust(512, b"\n") + bytes(MIB - 512))
    options = [word for name in ("first", "second") for word in ("--disk", str(tmp_path / name))]
    with linux.boot("sharing", *options) as console:
        shell = Shell(console)
        assert shell.run("head -n 1 /dev/vda; head -n 1 /dev/vdb") == "first\nsecond\n"
        assert shell.run("cat /sys/block/vd?/serial").startswith("first")
        shell.power_off()


def test_entropy(linux: Linux) -> None:
    with linux.boot("sharing", "--rng") as console:
        shell = Shell(console)
        current = shell.run("cat /sys/class/misc/hw_random/rng_current")
        assert current.startswith("virtio_rng")
        blocks = {
            shell.run("dd if=/dev/hwrng bs=32 count=1 2>/dev/null | sha256sum") for _ in range(3)
        }
        assert len(blocks) == 3
        assert hashlib.sha256(b"").hexdigest() not in str(blocks)
        shell.power_off()


def test_a_kernel_that_cannot_share_is_named(linux: Linux, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    with linux.boot("6.12", "--disk", str(disk)) as console:
        shell = Shell(console)
        assert shell.run("ls /sys/block") == ""
        assert "share" in shell.power_off()
