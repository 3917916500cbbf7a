# SPDX-License-Identifier: GPL-2.0-or-later
"""The filter before the host's SMCs."""

from __future__ import annotations

import pytest

from fakes.doors import Doors
from pkvm.arm64 import ffa, psci, smccc
from pkvm.arm64.registers import hcr
from pkvm.check.mutants import weakened
from pkvm.events import HostSmc
from pkvm.machine.firmware import SIP_ECHO

NO = smccc.NOT_SUPPORTED


@pytest.fixture(scope="module")
def doors() -> Doors:
    return Doors()


@pytest.mark.parametrize("function", [psci.Function.PSCI_VERSION, ffa.Function.FFA_ID_GET, 0x777])
@pytest.mark.parametrize("junk", [1 << 32, 1 << 63, 0xFFFF_FFFF << 32])
def test_a_function_id_has_32_bits(doors: Doors, function: int, junk: int) -> None:
    doors.seen.clear()
    assert doors.smc(junk | function, 1, 2, 3) == (NO, 1, 2, 3, *(0,) * 14)
    assert doors.seen == []


@pytest.mark.parametrize("immediate", [1, 0xFFFF])
def test_the_immediate_is_zero(doors: Doors, immediate: int) -> None:
    doors.seen.clear()
    assert doors.smc(SIP_ECHO, 1, immediate=immediate)[0] == NO
    assert doors.seen == []


@pytest.mark.parametrize("bit", range(17, 24))
@pytest.mark.parametrize("function", [psci.Function.CPU_ON_64, ffa.Function.FFA_MEM_SHARE_32])
def test_bits_that_should_be_zero(doors: Doors, bit: int, function: int) -> None:
    doors.seen.clear()
    assert doors.smc(function | 1 << bit, 1, 2, 3)[0] == NO
    assert doors.seen == []


def test_the_hint_makes_no_other_function(doors: Doors) -> None:
    hint = smccc.SVE_HINT
    assert doors.smc(psci.Function.PSCI_VERSION | hint)[0] == psci.VERSION_1_1
    answer = doors.smc(ffa.Function.FFA_MEM_DONATE_64 | hint)
    assert ffa.status_of(answer) is not None
    assert doors.smc(psci.Function.MEM_PROTECT | hint, 1)[0] == psci.NOT_SUPPORTED


def test_everything_else_passes_unchanged(doors: Doors) -> None:
    doors.seen.clear()
    numbers = (SIP_ECHO | smccc.SVE_HINT, *(at << 60 | at for at in range(1, 18)))
    assert doors.smc(*numbers) == (0, numbers[1] + 1, *numbers[2:])
    assert doors.seen == [numbers]
    assert doors.smc(smccc.Function.SMCCC_VERSION)[0] == smccc.VERSION_1_2
    assert doors.smc(0xC300_1234)[0] == NO


def test_every_smc_is_announced() -> None:
    doors = Doors()
    doors.smc(SIP_ECHO, 1)
    doors.smc(1 << 40, cpu=0)
    assert doors.events(HostSmc) == [
        HostSmc(0, SIP_ECHO, 0, forwarded=True),
        HostSmc(0, 1 << 40, NO, forwarded=False),
    ]


def test_the_hosts_smcs_trap() -> None:
    doors = Doors()
    assert doors.machine.host_cpus.boot.hcr_el2 & hcr("TSC", "VM") == hcr("TSC", "VM")
    doors.sound()
    with weakened("the host's SMCs trap"):
        open_doors = Doors()
        junk = 1 << 32 | psci.Function.PSCI_VERSION
        assert open_doors.smc(junk)[0] == psci.VERSION_1_1
        assert open_doors.problems()[0].startswith("P15")


def test_without_protected_mode_nothing_is_filtered() -> None:
    doors = Doors(protected=False)
    assert doors.smc(1 << 32 | psci.Function.PSCI_VERSION)[0] == psci.VERSION_1_1
    assert doors.events(HostSmc) == []
