# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvm.arm64.bits import MASK64, Field, Layout

WORD = Layout(
    "WORD",
    Field("low", 3, 0, {1: "one"}),
    Field("middle", 19, 4),
    Field("top", 63, 60),
)


def test_a_field_knows_its_place() -> None:
    field = Field("middle", 19, 4)
    assert field.width == 16
    assert field.mask == 0xF_FFF0
    assert field.get(0x1234_5678) == 0x4567
    assert field.put(0xABCD) == 0xA_BCD0


@pytest.mark.parametrize("value", [-1, 1 << 16])
def test_a_value_that_does_not_fit_is_refused_and_named(value: int) -> None:
    with pytest.raises(ValueError, match=f"middle is 16 bits wide and cannot hold {value:#x}"):
        WORD.encode(middle=value)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(KeyError):
        WORD.encode(bottom=1)


def test_fields_must_not_overlap() -> None:
    with pytest.raises(ValueError, match=r"WORD\.b overlaps"):
        Layout("WORD", Field("a", 3, 0), Field("b", 7, 3))


def test_a_word_in_words() -> None:
    assert WORD.describe(WORD.encode(low=1, top=0xF)) == "low=one top=0xf"
    assert WORD.describe(WORD.encode(low=2)) == "low=0x2"
    assert WORD.describe(0) == "0"
    assert WORD["top"].mask == 0xF << 60


@given(st.integers(0, 15), st.integers(0, 0xFFFF), st.integers(0, 15))
def test_what_is_encoded_is_decoded(low: int, middle: int, top: int) -> None:
    word = WORD.encode(low=low, middle=middle, top=top)
    assert word & ~MASK64 == 0
    assert WORD.decode(word) == {"low": low, "middle": middle, "top": top}
