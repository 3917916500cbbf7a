# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvm.arm64 import esr


@pytest.mark.parametrize(
    ("syndrome", "ec"),
    [
        (0x5A00_0000, esr.EC.HVC64),
        (0x9200_0047, esr.EC.DABT_LOW),
        (0x9600_0010, esr.EC.DABT_CUR),
        (0x93C0_8007, esr.EC.DABT_LOW),
        (0x8200_0006, esr.EC.IABT_LOW),
        (0x0600_0000, esr.EC.WFX),
    ],
)
def test_exception_classes(syndrome: int, ec: esr.EC) -> None:
    assert syndrome >> esr.EC_SHIFT == esr.ESR["EC"].get(syndrome) == ec
    assert syndrome & esr.IL


def test_the_syndrome_of_a_guests_doubleword_load() -> None:
    """X0 loaded, 64 bits, level 3 translation fault: as hardware gives it (facts §11.2)."""
    iss = 0x93C0_8007 & esr.ISS_MASK
    assert esr.ABORT_ISS.decode(iss) == {
        "ISV": 1, "SAS": 3, "SSE": 0, "SRT": 0, "SF": 1, "AR": 0, "FnV": 0, "EA": 0, "CM": 0,
        "S1PTW": 0, "WnR": 0, "FSC": esr.FSC_TRANSLATION + 3,
    }  # fmt: skip
    assert iss & esr.ISV
    assert iss >> esr.SAS_SHIFT & 3 == 3
    assert iss >> esr.SRT_SHIFT & esr.SRT_MASK >> esr.SRT_SHIFT == 0
    assert iss & esr.FSC_MASK == 0x07


def test_the_syndrome_of_a_hypervisors_request_for_a_page() -> None:
    """A write that stage 2 refuses at level 3, no valid ISS (facts §C6)."""
    assert esr.ABORT_ISS.describe(0x9200_0047 & esr.ISS_MASK) == "WnR=0x1 FSC=0x7"
    assert esr.ESR.describe(0x9200_0047) == "EC=DABT_LOW IL=0x1 ISS=0x47"
    assert esr.WNR == 1 << 6
    assert esr.S1PTW == 1 << 7


def test_fault_status_codes() -> None:
    assert [
        esr.FSC_ADDRESS_SIZE,
        esr.FSC_TRANSLATION,
        esr.FSC_ACCESS_FLAG,
        esr.FSC_PERMISSION,
        esr.FSC_EXTERNAL,
        esr.FSC_EXTERNAL_ON_WALK,
    ] == [0x00, 0x04, 0x08, 0x0C, 0x10, 0x14]


def test_hpfar_of_the_first_touch() -> None:
    """A fault at IPA 0x80001000 (facts §C1); bit 63, NS, is not part of the address."""
    assert esr.ipa_to_hpfar(0x8000_1008) == 0x80_0010
    assert esr.hpfar_to_ipa(0x8000_0000_0080_0010) == 0x8000_1000


@given(st.integers(0, (1 << 52) - 1))
def test_hpfar_keeps_the_page(ipa: int) -> None:
    assert esr.hpfar_to_ipa(esr.ipa_to_hpfar(ipa)) == ipa & ~0xFFF


def test_the_syndrome_of_a_trapped_register() -> None:
    iss = esr.SYS64_ISS.encode(op0=3, op1=0, CRn=0, CRm=4, op2=0, Rt=31, read=1)
    assert iss == 0x30_03E9
    assert iss >> esr.SYS64_RT_SHIFT & esr.SYS64_RT_MASK >> esr.SYS64_RT_SHIFT == 31
    assert iss & esr.SYS64_READ
