# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's own kernels as protected guests: to a shell, through what it shows, to power-off."""

from __future__ import annotations

import re

import pytest

from fakes.linux_fixtures import Linux, Shell

pytestmark = pytest.mark.linux


def counts(interrupts: str, name: str) -> list[int]:
    """How often each CPU took an interrupt, by /proc/interrupts."""
    found = re.search(rf"^ *\w+: +((?:\d+ +)+){name}", interrupts, re.M)
    assert found is not None
    return [int(count) for count in found[1].split()]


@pytest.mark.parametrize("cpus", [1, 4])
@pytest.mark.parametrize("kernel", ["7.3", "6.12"])
def test_to_a_shell_and_off(linux: Linux, kernel: str, cpus: int) -> None:
    with linux.boot(kernel, "--cpus", str(cpus), "--memory", "256M") as console:
        shell = Shell(console)
        assert shell.run("uname -r").startswith(kernel + ".")
        assert shell.run("echo $((6 * 7)) $(nproc)") == f"42 {cpus}\n"
        assert shell.run("false", status=1) == ""
        processors = shell.run("cat /proc/cpuinfo")
        assert processors.count("processor\t:") == cpus
        assert "0xd08" in processors  # Cortex-A72
        interrupts = shell.run("cat /proc/interrupts")
        assert all(counts(interrupts, r"GICv3 +27 Level +arch_timer"))
        assert any(counts(interrupts, r"Function call interrupts")) == (cpus > 1)
        assert "powered off" in shell.power_off()


def test_a_reboot_starts_the_guest_anew(linux: Linux) -> None:
    with linux.boot("7.3") as console:
        shell = Shell(console)
        shell.run("echo left behind >/tmp/file")
        console.send("reboot -f\n")
        shell = Shell(console)
        shell.run("test -e /tmp/file", status=1)
        shell.power_off()


def test_a_cpu_goes_and_comes_back(linux: Linux) -> None:
    with linux.boot("6.12", "--cpus", "2") as console:
        shell = Shell(console)
        online = "/sys/devices/system/cpu/cpu1/online"
        shell.run(f"echo 0 >{online}")
        assert shell.run("nproc") == "1\n"
        shell.run(f"echo 1 >{online}")
        assert shell.run("nproc; taskset 2 echo here") == "2\nhere\n"


def test_time_goes_by_as_outside(linux: Linux) -> None:
    with linux.boot("6.12") as console:
        shell = Shell(console)
        before = float(shell.run("cut -d ' ' -f 1 /proc/uptime"))
        shell.run("sleep 1")
        slept = float(shell.run("cut -d ' ' -f 1 /proc/uptime")) - before
        assert 1 <= slept < 30
        year = int(shell.run("date +%Y"))
        assert year >= 2026
