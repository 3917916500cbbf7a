# SPDX-License-Identifier: GPL-2.0-or-later
"""The board as Linux finds it: kernel files as they are packed, the real-time clock, seeds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fakes.kernels import zboot, zstd
from fakes.linux_fixtures import Linux, Shell

pytestmark = pytest.mark.linux


def test_a_packed_kernel_and_its_clock(linux: Linux, tmp_path: Path) -> None:
    plain = linux.kernel("7.3").read_bytes()
    packed = tmp_path / "vmlinuz"
    packed.write_bytes(zboot(zstd(plain), b"zstd22", len(plain)))
    with linux.boot("7.3", "--kernel", str(packed)) as console:
        shell = Shell(console)
        log = shell.run("dmesg")
        assert "Machine model: pkvm" in log
        assert "KASLR enabled" in log
        assert "random: crng init done" in log
        assert "rtc-pl031 9010000.pl031: registered as rtc0" in log
        assert abs(int(shell.run("cat /sys/class/rtc/rtc0/since_epoch")) - time.time()) < 30
        alarms = "grep rtc-pl031 /proc/interrupts"
        assert shell.run(alarms).split()[1:4] == ["0", "GICv3", "34"]
        shell.run("echo +1 > /sys/class/rtc/rtc0/wakealarm")
        shell.run("sleep 3")
        assert shell.run(alarms).split()[1] == "1"
        said = shell.power_off()
    assert "How it ended: the guest powered off" in said
