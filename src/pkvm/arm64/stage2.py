# SPDX-License-Identifier: GPL-2.0-or-later
"""VMSAv8-64 stage-2 descriptors and geometry, 4 KiB granule, up to 48 bits (Arm ARM D8.3, D8.2.4).

The descriptor's bits are architecture; which values pKVM puts there (memory
type, software bits, annotations of invalid leaves) is declared here too, since
EL2 writes them and the dumper, the checkers and the tests read them (facts §4.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from pkvm.arm64.bits import Field, Layout

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_MASK = PAGE_SIZE - 1
TABLE_ENTRIES = 512
LAST_LEVEL = 3
BLOCK_LEVELS = (1, 2)
"""Levels that may hold a block with the 4 KiB granule: 1 GiB and 2 MiB."""
BLOCK_2M = 1 << 21
BLOCK_1G = 1 << 30

DESCRIPTOR = Layout(
    "stage-2 leaf descriptor",
    Field("valid", 0, 0),
    Field("table_or_page", 1, 1),
    Field("MemAttr", 5, 2, {0xF: "Normal-WB", 0x5: "Normal-NC", 0x1: "Device-nGnRE"}),
    Field("S2AP_R", 6, 6),
    Field("S2AP_W", 7, 7),
    Field("SH", 9, 8, {3: "inner"}),
    Field("AF", 10, 10),
    Field("OA", 47, 12),
    Field("DBM", 51, 51),
    Field("XN", 54, 53, {1: "EL0-only", 2: "none", 3: "EL1-only"}),
    Field("SW", 58, 55),
)
VALID = 1
TABLE_OR_PAGE = 2
"""Bit 1: at levels 0-2 a table (else a block), at level 3 it must be set for a page."""
MEMATTR_NORMAL = 0xF << 2
MEMATTR_DEVICE = 0x1 << 2
S2AP_R = 1 << 6
S2AP_W = 1 << 7
S2AP_RW = S2AP_R | S2AP_W
SH_INNER = 3 << 8
AF = 1 << 10
XN_NONE = 2 << 53
"""XN = 0b10: no execution at EL1 or EL0 (with or without FEAT_XNX)."""
XN_MASK = 3 << 53
ADDRESS_MASK = 0x0000_FFFF_FFFF_F000
SW_STATE_SHIFT = 55
SW_STATE_MASK = 3 << SW_STATE_SHIFT
"""pKVM's page state, SW1:SW0 of a valid guest leaf (facts §3.1)."""

ATTR_NORMAL_RWX = VALID | MEMATTR_NORMAL | S2AP_RW | SH_INNER | AF
"""A block's low bits; a page adds TABLE_OR_PAGE (0x7FF)."""
ATTR_DEVICE_RW = VALID | MEMATTR_DEVICE | S2AP_RW | SH_INNER | AF | XN_NONE
PERMISSION_MASK = S2AP_RW | XN_MASK


class PageState(IntEnum):
    """pKVM's page states (facts §3.1); the first two bits are what a descriptor stores."""

    OWNED = 0
    SHARED_OWNED = 1
    SHARED_BORROWED = 2
    NOPAGE = 3
    POISON = 4


class Owner(IntEnum):
    """Component ids, as an annotated invalid leaf stores them in bits [3:1]."""

    HOST = 0
    HYP = 1
    GUEST = 2
    FFA = 3
    """The secure world (Android; facts §3.1)."""


class InvalidType(IntEnum):
    """Bits [63:60] of an annotated invalid leaf."""

    NONE = 0
    LOCKED = 1
    DONATION = 2
    POISONED = 3
    MMIO = 4
    """In a guest's tree: the guest expects a device there (facts §6.5, MMIO guard)."""


ANNOTATION = Layout(
    "annotated invalid leaf",
    Field("valid", 0, 0),
    Field("owner", 3, 1, {1: "HYP", 2: "GUEST", 3: "FFA"}),
    Field("vm", 19, 4),
    Field("gfn", 59, 20),
    Field("type", 63, 60, {1: "LOCKED", 2: "DONATION", 3: "POISONED", 4: "MMIO"}),
)
ANNOTATION_HYP = ANNOTATION.encode(type=InvalidType.DONATION, owner=Owner.HYP)
ANNOTATION_FFA = ANNOTATION.encode(type=InvalidType.DONATION, owner=Owner.FFA)
ANNOTATION_POISONED = ANNOTATION.encode(type=InvalidType.POISONED)
"""A guest's leaf whose page the host took back by force: nothing is mapped there ever again."""
ANNOTATION_MMIO = ANNOTATION.encode(type=InvalidType.MMIO, owner=Owner.GUEST)
"""A guest's leaf where it expects a device of the host's: never memory."""
ANNOTATION_GFN_SHIFT = 20
"""A guest annotation's gfn; successive pages of a range differ by 1 << 20."""


ANNOTATION_GUEST = ANNOTATION.encode(type=InvalidType.DONATION, owner=Owner.GUEST)
"""A guest annotation's other bits; the handle goes to ANNOTATION_VM_SHIFT."""
ANNOTATION_VM_SHIFT = ANNOTATION["vm"].lo
_HANDLE_BITS, _GFN_BITS = 16, 40


def guest_annotation(handle: int, gfn: int) -> int:
    """The host leaf of a page owned by VM `handle` at guest frame `gfn` (IPA >> 12).

    Raises ValueError if the handle exceeds 16 bits or the gfn 40 bits.
    """
    if handle >> _HANDLE_BITS or gfn >> _GFN_BITS:
        ANNOTATION.encode(vm=handle, gfn=gfn)  # says which one it cannot hold
    return ANNOTATION_GUEST | handle << ANNOTATION_VM_SHIFT | gfn << ANNOTATION_GFN_SHIFT


def level_shift(level: int) -> int:
    """log2 of the bytes that one entry at `level` (0-3) covers."""
    return PAGE_SHIFT + 9 * (LAST_LEVEL - level)


def level_size(level: int) -> int:
    """Bytes that one entry at `level` covers: 512 GiB, 1 GiB, 2 MiB, 4 KiB."""
    return 1 << level_shift(level)


def is_table(entry: int, level: int) -> bool:
    """Whether a descriptor at `level` points to a next-level table."""
    return level < LAST_LEVEL and entry & 3 == 3


def is_leaf(entry: int, level: int) -> bool:
    """Whether a descriptor at `level` is a valid block (levels 1, 2) or page (level 3)."""
    if level == LAST_LEVEL:
        return entry & 3 == 3
    return entry & 3 == 1 and level in BLOCK_LEVELS


VTCR = Layout(
    "VTCR_EL2",
    Field("T0SZ", 5, 0),
    Field("SL0", 7, 6),
    Field("IRGN0", 9, 8),
    Field("ORGN0", 11, 10),
    Field("SH0", 13, 12),
    Field("TG0", 15, 14),
    Field("PS", 18, 16),
    Field("VS", 19, 19),
    Field("HA", 21, 21),
    Field("RES1", 31, 31),
)
PARANGE_BITS = {0: 32, 1: 36, 2: 40, 3: 42, 4: 44, 5: 48}


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of a stage-2 tree for an IPA space of `ipa_bits` (facts §4.2).

    Up to 16 tables are concatenated at the start level, so the start level is
    that of an input four bits narrower. Raises ValueError outside 32-48 bits.
    """

    ipa_bits: int

    def __post_init__(self) -> None:
        if not 32 <= self.ipa_bits <= 48:
            raise ValueError(f"an IPA space has 32 to 48 bits, not {self.ipa_bits}")

    @property
    def levels(self) -> int:
        """Number of lookup levels."""
        return max(2, (self.ipa_bits - 4 - 4) // (PAGE_SHIFT - 3))

    @property
    def start_level(self) -> int:
        """Level at which the walk starts."""
        return 4 - self.levels

    @property
    def root_tables(self) -> int:
        """Concatenated tables at the start level; the root is aligned to their size."""
        return max(1, 1 << max(0, self.ipa_bits - level_shift(self.start_level) - 9))

    @property
    def root_bytes(self) -> int:
        """Size and alignment of the root, bytes."""
        return self.root_tables * PAGE_SIZE

    def vtcr(self, parange: int) -> int:
        """VTCR_EL2 for this geometry with PS = `parange` (ID_AA64MMFR0_EL1.PARange), HA off."""
        return VTCR.encode(
            RES1=1,
            T0SZ=64 - self.ipa_bits,
            SL0=2 - self.start_level,
            IRGN0=1,
            ORGN0=1,
            SH0=3,
            PS=parange,
        )


def geometry_of_vtcr(vtcr: int) -> Geometry:
    """The geometry that a VTCR_EL2 value describes. Raises ValueError if T0SZ is out of range."""
    return Geometry(64 - VTCR["T0SZ"].get(vtcr))


VTTBR_VMID_SHIFT = 48
VTTBR_BADDR_MASK = 0x0000_FFFF_FFFF_FFFE


def vttbr(root: int, vmid: int) -> int:
    """VTTBR_EL2 for a root table at PA `root` (bytes) and an 8- or 16-bit VMID."""
    return root | vmid << VTTBR_VMID_SHIFT
