# SPDX-License-Identifier: GPL-2.0-or-later
"""Descriptors, annotations and geometry: the worked values of facts §4.1 and §4.2."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvm.arm64 import stage2 as s

SHARED_OWNED = s.PageState.SHARED_OWNED << s.SW_STATE_SHIFT
SHARED_BORROWED = s.PageState.SHARED_BORROWED << s.SW_STATE_SHIFT


class TestDescriptor:
    def test_an_owned_page(self) -> None:
        page = 0x8000_1000 | s.ATTR_NORMAL_RWX | s.TABLE_OR_PAGE
        assert page == 0x8000_17FF
        fields = s.DESCRIPTOR.decode(page)
        assert fields == {
            "valid": 1, "table_or_page": 1, "MemAttr": 0xF, "S2AP_R": 1, "S2AP_W": 1, "SH": 3,
            "AF": 1, "OA": 0x8_0001, "DBM": 0, "XN": 0, "SW": 0,
        }  # fmt: skip

    def test_page_states(self) -> None:
        assert SHARED_OWNED == 0x0080_0000_0000_0000
        assert SHARED_BORROWED == 0x0100_0000_0000_0000
        assert s.SW_STATE_MASK == SHARED_OWNED | SHARED_BORROWED
        assert s.DESCRIPTOR["SW"].get(SHARED_BORROWED) == s.PageState.SHARED_BORROWED

    def test_a_host_mmio_page_cannot_be_executed(self) -> None:
        assert s.XN_NONE == 0x0040_0000_0000_0000
        page = s.DESCRIPTOR.decode(0x900_0000 | s.ATTR_DEVICE_RW | s.TABLE_OR_PAGE)
        assert (page["XN"], page["MemAttr"], page["AF"]) == (2, 1, 1)
        assert page["S2AP_R"] == page["S2AP_W"] == 1

    def test_a_block_is_a_page_without_bit_1(self) -> None:
        assert s.ATTR_NORMAL_RWX == 0x7FD

    @pytest.mark.parametrize(
        ("entry", "level", "table", "leaf"),
        [
            (3, 0, True, False),
            (3, 1, True, False),
            (3, 2, True, False),
            (3, 3, False, True),
            (1, 0, False, False),
            (1, 1, False, True),
            (1, 2, False, True),
            (1, 3, False, False),
            (2, 1, False, False),
            (2, 3, False, False),
            (0, 3, False, False),
        ],
    )
    def test_what_an_entry_is(self, entry: int, level: int, table: bool, leaf: bool) -> None:
        for rest in (0, 0x8000_0000, 0xFFFF_FFFF_FFFF_FFFC):
            assert s.is_table(entry | rest, level) is table
            assert s.is_leaf(entry | rest, level) is leaf

    def test_levels(self) -> None:
        assert [s.level_size(level) for level in range(4)] == [1 << 39, 1 << 30, 1 << 21, 1 << 12]
        assert (s.level_size(1), s.level_size(2)) == (s.BLOCK_1G, s.BLOCK_2M)


class TestAnnotation:
    def test_owned_by_hyp(self) -> None:
        assert s.ANNOTATION_HYP == 0x2000_0000_0000_0002

    def test_owned_by_a_guest(self) -> None:
        assert s.guest_annotation(0x1000, 0x8_0000) == 0x2000_0080_0001_0004

    def test_poison_and_the_lock_of_break_before_make(self) -> None:
        assert s.ANNOTATION.encode(type=s.InvalidType.POISONED) == 0x3000_0000_0000_0000
        assert s.ANNOTATION.encode(type=s.InvalidType.LOCKED) == 0x1000_0000_0000_0000

    @pytest.mark.parametrize(("handle", "gfn"), [(1 << 16, 0), (0x1000, 1 << 40), (-1, 0)])
    def test_numbers_that_do_not_fit_are_refused(self, handle: int, gfn: int) -> None:
        with pytest.raises(ValueError, match="cannot hold"):
            s.guest_annotation(handle, gfn)

    @given(st.integers(0, 0xFFFF), st.integers(0, (1 << 40) - 1))
    def test_an_annotation_is_never_valid_and_reads_back(self, handle: int, gfn: int) -> None:
        word = s.guest_annotation(handle, gfn)
        assert word & s.VALID == 0
        fields = s.ANNOTATION.decode(word)
        assert (fields["vm"], fields["gfn"]) == (handle, gfn)
        assert (fields["type"], fields["owner"]) == (s.InvalidType.DONATION, s.Owner.GUEST)

    @given(st.integers(0, 0xFFFF), st.integers(0, (1 << 40) - 2))
    def test_the_next_page_of_a_range_is_one_step_further(self, handle: int, gfn: int) -> None:
        step = s.guest_annotation(handle, gfn + 1) - s.guest_annotation(handle, gfn)
        assert step == 1 << s.ANNOTATION_GFN_SHIFT


class TestGeometry:
    @pytest.mark.parametrize(
        ("ipa_bits", "start_level", "root_tables"),
        [
            (32, 2, 4),
            (36, 1, 1),
            (39, 1, 1),
            (40, 1, 2),
            (43, 1, 16),
            (44, 0, 1),
            (48, 0, 1),
        ],
    )
    def test_the_table_of_geometries(
        self, ipa_bits: int, start_level: int, root_tables: int
    ) -> None:
        shape = s.Geometry(ipa_bits)
        assert (shape.start_level, shape.root_tables) == (start_level, root_tables)
        assert shape.levels == 4 - start_level
        assert shape.root_bytes == root_tables * 4096

    def test_the_worked_vtcr(self) -> None:
        assert s.Geometry(40).vtcr(2) == 0x8002_3558
        assert s.VTCR["HA"].mask | s.Geometry(40).vtcr(2) == 0x8022_3558

    @pytest.mark.parametrize("ipa_bits", [0, 31, 49])
    def test_sizes_outside_the_architecture_are_refused(self, ipa_bits: int) -> None:
        with pytest.raises(ValueError, match="32 to 48 bits"):
            s.Geometry(ipa_bits)

    @given(st.integers(32, 48))
    def test_the_root_covers_the_space_and_vtcr_reads_back(self, ipa_bits: int) -> None:
        shape = s.Geometry(ipa_bits)
        root_entries = shape.root_tables * 512
        assert 1 <= shape.root_tables <= 16
        assert s.level_size(shape.start_level) * root_entries >= 1 << ipa_bits
        assert s.geometry_of_vtcr(shape.vtcr(5)) == shape

    def test_vttbr(self) -> None:
        word = s.vttbr(0x8040_0000, 0x12)
        assert word == 0x0012_0000_8040_0000
        assert word & s.VTTBR_BADDR_MASK == 0x8040_0000
