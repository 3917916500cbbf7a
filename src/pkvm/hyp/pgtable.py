# SPDX-License-Identifier: GPL-2.0-or-later
"""Stage-2 tables: real descriptors in physical memory (Arm ARM D8.3; facts §4)."""

from __future__ import annotations


class Stage2:
    """One stage-2 tree: the host's, the DMA masters' or a guest's.

    Made by `MemProtect.new_guest_stage2` for a guest.
    """

    root: int
    """PA of the (concatenated) root tables."""
    vmid: int
    vttbr: int
    """VTTBR_EL2 for this tree."""
    vtcr: int
    """VTCR_EL2 for this tree."""
    ipa_limit: int
    """First IPA beyond the tree's input space."""

    def leaf(self, ipa: int) -> tuple[int, int]:
        """(descriptor, level) where the walk of `ipa` ends: valid leaf, annotation or zero.

        Raises Refused(ERANGE) for an IPA beyond the tree's input space.
        """
        raise NotImplementedError

    def destroy(self) -> None:
        """Free every table, the root's pages too, into the table source (for a guest: its
        memcache, which `drain` then gives back). Pages still mapped stay as they are: annotated in
        the host's stage-2, never exposed. The caller has flushed the VMID."""
        raise NotImplementedError
