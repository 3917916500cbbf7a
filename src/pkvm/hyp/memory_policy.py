# SPDX-License-Identifier: GPL-2.0-or-later
"""What the dialects do differently with ownership of memory (facts §3.3, §3.4), as data.

The transitions are the same; which errno a caller gets, and which of the rarer
ones the host may ask for, differs. No field takes a guest's protection away.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pkvm.hyp.errors import Errno


class FirmwareRule(Enum):
    """How the guest firmware gets into a protected VM (facts §8.1)."""

    NONE = "none"
    """There is no such call."""
    WHOLE = "whole"
    """Its range is donated at once and filled then; before that no vCPU runs."""
    PAGES = "pages"
    """Each page of its range that is donated is filled then, until the guest gives up one of
    them. The range is named before the VM has vCPUs or memory."""


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """A dialect's ownership of memory."""

    not_ram: Errno
    """Given for a range that is no RAM at all."""
    unmapped: Errno
    """Given for a guest's own page that is not there."""
    pinned: Errno
    """Given for a page that is mapped for DMA and so cannot be donated or shared with EL2."""
    force_reclaim: bool
    """The host kernel may take a private page of a guest's back by force: it is zeroed, and the
    guest's frame poisoned. Without, such an access of the host's is its own fault."""
    split_call: bool
    """The host may split a guest's block into pages by a call of its own."""
    firmware: FirmwareRule
    lend_takes_access: bool
    """FFA_MEM_LEND leaves the host without access, not as FFA_MEM_SHARE does."""


RFC_MEMORY = MemoryPolicy(
    not_ram=Errno.EPERM,
    unmapped=Errno.EFAULT,
    pinned=Errno.EPERM,
    force_reclaim=True,
    split_call=False,
    firmware=FirmwareRule.WHOLE,
    lend_takes_access=False,
)
"""The mail says of a host that touches a guest's page: it panics, or the page is destroyed."""
ANDROID_MEMORY = MemoryPolicy(
    not_ram=Errno.EINVAL,
    unmapped=Errno.EFAULT,
    pinned=Errno.EINVAL,
    force_reclaim=False,
    split_call=True,
    firmware=FirmwareRule.PAGES,
    lend_takes_access=True,
)
UPSTREAM_MEMORY = MemoryPolicy(
    not_ram=Errno.EPERM,
    unmapped=Errno.ENOENT,
    pinned=Errno.EPERM,
    force_reclaim=True,
    split_call=False,
    firmware=FirmwareRule.NONE,
    lend_takes_access=False,
)
