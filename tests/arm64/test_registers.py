# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvm.arm64 import registers as r

encodings = st.builds(
    r.SysReg,
    st.integers(0, 3),
    st.integers(0, 7),
    st.integers(0, 15),
    st.integers(0, 15),
    st.integers(0, 7),
)


def test_a_trapped_access_names_its_register() -> None:
    # MRS X5, ID_AA64DFR0_EL1: op0 3, op2 0, op1 0, CRn 0, Rt 5, CRm 5, read
    assert r.SysReg.from_iss(3 << 20 | 5 << 5 | 5 << 1 | 1) == r.ID_AA64DFR0_EL1
    # MSR PMCR_EL0, X0
    assert r.SysReg.from_iss(3 << 20 | 3 << 14 | 9 << 10 | 12 << 1) == r.PMCR_EL0


@pytest.mark.parametrize(
    ("register", "index"),
    [
        (r.MIDR_EL1, 0xC000),
        (r.MPIDR_EL1, 0xC005),
        (r.SCTLR_EL1, 0xC080),
        (r.TTBR1_EL1, 0xC101),
        (r.VBAR_EL1, 0xC600),
        (r.TPIDR_EL0, 0xDE82),
        (r.MDSCR_EL1, 0x8012),
    ],
)
def test_one_reg_indices(register: r.SysReg, index: int) -> None:
    """op0[15:14] op1[13:11] CRn[10:7] CRm[6:3] op2[2:0], as KVM's ARM64_SYS_REG packs them."""
    assert register.one_reg == index


@given(encodings)
def test_encodings_read_back(register: r.SysReg) -> None:
    assert r.SysReg.from_iss(register.iss) == register
    assert r.SysReg.from_iss(register.iss | 0x3FF & 0x3E1) == register
    assert 0 <= register.one_reg < 1 << 16


@given(encodings, encodings)
def test_one_reg_indices_are_distinct(one: r.SysReg, other: r.SysReg) -> None:
    assert (one.one_reg == other.one_reg) == (one == other)


def test_names() -> None:
    assert r.VBAR_EL1.name == "VBAR_EL1"
    assert r.BY_NAME["CNTVOFF_EL2"] == (3, 4, 14, 0, 3)
    assert r.SysReg(3, 0, 11, 2, 1).name == "S3_0_C11_C2_1"


def test_no_two_names_share_an_encoding() -> None:
    named = [value for value in vars(r).values() if isinstance(value, r.SysReg)]
    assert len(set(named)) == len(named) == len(r.BY_NAME)


def test_hcr_bits() -> None:
    """Bit numbers of facts §A."""
    bits = {
        "VM": 0, "SWIO": 1, "FMO": 3, "IMO": 4, "AMO": 5, "VI": 7, "VSE": 8, "FB": 9, "DC": 12,
        "TWI": 13, "TWE": 14, "TID3": 18, "TSC": 19, "TIDCP": 20, "TACR": 21, "TSW": 22,
        "TVM": 26, "TGE": 27, "RW": 31, "E2H": 34, "TLOR": 35, "TERR": 36, "TEA": 37, "APK": 40,
        "API": 41, "FWB": 46, "FIEN": 47, "TID4": 49, "AMVOFFEN": 51, "ATA": 56, "TID5": 58,
    }  # fmt: skip
    for name, bit in bits.items():
        assert r.hcr(name) == 1 << bit
    assert r.hcr("VM", "RW", "TSC") == 0x8008_0001
    assert r.hcr() == 0
    with pytest.raises(KeyError):
        r.hcr("VMX")


@pytest.mark.parametrize(
    ("vcpu_id", "mpidr"),
    [(0, 0x8000_0000), (1, 0x8000_0001), (16, 0x8000_0100), (0xF_FFFF, 0x80FF_FF0F)],
)
def test_mpidr_of_a_vcpu(vcpu_id: int, mpidr: int) -> None:
    assert r.mpidr_of_vcpu_id(vcpu_id) == mpidr


def test_reset_values() -> None:
    assert r.PSTATE_RESET == r.PSTATE_EL1H | r.PSTATE_DAIF == 0x3C5
    assert r.SCTLR_EL1_RESET == 0x00C5_0078
    assert r.SCTLR_EL1_RESET & (r.SCTLR_EE | r.SCTLR_E0E | 1) == 0
