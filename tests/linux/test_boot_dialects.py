# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's own kernel as a protected guest in each dialect. It has no driver for pKVM: it needs
neither guest firmware nor anything that another dialect lacks.
"""

from __future__ import annotations

import pytest

from fakes.linux_fixtures import Linux, Shell
from pkvm.uapi.dialects import DIALECTS

pytestmark = pytest.mark.linux


@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_to_a_shell_and_off(linux: Linux, dialect: str, cpus: int) -> None:
    with linux.boot("7.3", "--dialect", dialect, "--cpus", str(cpus)) as console:
        shell = Shell(console)
        assert shell.run("echo $((6 * 7)) $(nproc)") == f"42 {cpus}\n"
        psci = {"rfc": "1.1", "android": "1.1", "upstream": "1.3"}[dialect]
        assert f"psci: PSCIv{psci} detected in firmware" in shell.run("dmesg")
        said = shell.power_off()
    assert f"dialect {dialect})" in said
    assert "every attempt was refused" in said
    touched = "the guest never touched them" in said
    assert touched == (dialect != "rfc")


def test_a_limit_of_locked_memory_is_told(linux: Linux) -> None:
    with linux.boot("7.3", "--dialect", "upstream", "--memlock", "16M") as console:
        assert console.finish() != 0
        said = console.text
    assert "RLIMIT_MEMLOCK is 16777216 bytes" in said
    assert "ulimit -l" in said
