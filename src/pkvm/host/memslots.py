# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory slots: which IPAs of a VM are memory, and where the VMM has it (KVM API 4.35)."""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from pkvm.host.mm import USER_END
from pkvm.host.ports import PAGE_MASK, PAGE_SHIFT
from pkvm.uapi.kvm import MEM_SLOTS_NUM, MEMORY_REGION, MemFlag

_SIZE_LIMIT = 1 << 64
_MAX_PAGES = (1 << 31) - 1
"""KVM_MEM_MAX_NR_PAGES."""
_KNOWN_FLAGS = int(MemFlag.LOG_DIRTY_PAGES | MemFlag.READONLY)


@dataclass(frozen=True, slots=True)
class Slot:
    """A memory slot: [ipa, ipa+size) of the guest is user memory at `user`; bytes."""

    number: int
    flags: int
    ipa: int
    size: int
    user: int

    @property
    def gfn(self) -> int:
        """First guest frame number (IPA >> 12)."""
        return self.ipa >> PAGE_SHIFT

    @property
    def npages(self) -> int:
        """Size in pages."""
        return self.size >> PAGE_SHIFT

    @property
    def end(self) -> int:
        """First IPA after the slot."""
        return self.ipa + self.size

    def user_of(self, ipa: int) -> int:
        """The user address behind an IPA of the slot."""
        return self.user + ipa - self.ipa

    @property
    def logs_dirty_pages(self) -> bool:
        """Whether KVM is to tell which pages the guest wrote to."""
        return bool(self.flags & MemFlag.LOG_DIRTY_PAGES)

    @property
    def readonly(self) -> bool:
        """Whether a guest's stores come out as MMIO."""
        return bool(self.flags & MemFlag.READONLY)


class Change(Enum):
    """What a KVM_SET_USER_MEMORY_REGION would do."""

    CREATE = "create"
    DELETE = "delete"
    MOVE = "move"
    FLAGS = "flags"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked change, ready for `MemSlots.apply`: the slot before and after it, None for none."""

    change: Change
    old: Slot | None
    new: Slot | None


Access = tuple[int, int, bool, int]
"""A load or store of a guest's to be emulated: IPA, bytes, whether a store, mask of its data."""
_MAX_ACCESSES = 1024


class MemSlots:
    """The slots of one VM, in an IPA space of `ipa_bits`."""

    def __init__(self, ipa_bits: int) -> None:
        self._ipa_limit = 1 << ipa_bits
        self._slots: dict[int, Slot] = {}
        self._sorted: list[Slot] = []
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.accesses: dict[tuple[int, int, int], Access] = {}
        """Aborts (ESR, FAR, HPFAR) that were accesses to devices with the slots as they are."""

    def __iter__(self) -> Iterator[Slot]:
        """The slots, by IPA."""
        return iter(self._sorted)

    def __len__(self) -> int:
        return len(self._sorted)

    def get(self, number: int) -> Slot | None:
        """The slot of that number."""
        return self._slots.get(number)

    def at(self, ipa: int) -> Slot | None:
        """The slot that holds an IPA."""
        index = bisect_right(self._starts, ipa) - 1
        if index >= 0 and ipa < self._ends[index]:
            return self._sorted[index]
        return None

    def plan(self, region: bytes) -> Plan:
        """Check a kvm_userspace_memory_region against the rules and the other slots.

        In Linux's order. Raises EINVAL for unknown flags, unaligned or wrapping numbers, a slot
        number out of range, deleting what is not there and changing size, user address or
        READONLY of what is; EEXIST for an overlap; EFAULT beyond the IPA space.
        """
        number, flags, ipa, size, user = MEMORY_REGION.unpack(region)
        if flags & ~_KNOWN_FLAGS:
            raise _invalid(f"unknown memory slot flags {flags:#x}")
        if size & PAGE_MASK or ipa & PAGE_MASK or user & PAGE_MASK:
            raise _invalid("size, guest address and user address must be page-aligned")
        if user + size > USER_END:
            raise _invalid(f"[{user:#x}, +{size:#x}) is no range of user addresses")
        if number >= MEM_SLOTS_NUM:
            raise _invalid(f"slot {number}: there are {MEM_SLOTS_NUM} slots and one address space")
        if ipa + size >= _SIZE_LIMIT or size >> PAGE_SHIFT > _MAX_PAGES:
            raise _invalid(f"guest range [{ipa:#x}, +{size:#x}) wraps or is too large")
        old = self._slots.get(number)
        if size == 0:
            if old is None:
                raise _invalid(f"slot {number} cannot be deleted: there is none")
            return Plan(Change.DELETE, old, None)
        new = Slot(number, flags, ipa, size, user)
        change = Change.CREATE
        if old is not None:
            if user != old.user or size != old.size or (flags ^ old.flags) & MemFlag.READONLY:
                raise _invalid(f"slot {number}: only its guest address and dirty logging change")
            if new == old:
                return Plan(Change.NOTHING, old, new)
            change = Change.MOVE if ipa != old.ipa else Change.FLAGS
        for other in self._sorted:
            if other is not old and ipa < other.end and new.end > other.ipa:
                raise OSError(
                    errno.EEXIST,
                    f"slot {number} [{ipa:#x}, +{size:#x}) overlaps slot {other.number} "
                    f"[{other.ipa:#x}, +{other.size:#x})",
                )
        if new.end > self._ipa_limit:
            raise OSError(errno.EFAULT, f"slot {number} ends beyond the IPA space: {new.end:#x}")
        return Plan(change, old, new)

    def apply(self, plan: Plan) -> None:
        """Make a planned change."""
        if plan.old is not None:
            del self._slots[plan.old.number]
        if plan.new is not None:
            self._slots[plan.new.number] = plan.new
        self._sorted = sorted(self._slots.values(), key=lambda slot: slot.ipa)
        self._starts = [slot.ipa for slot in self._sorted]
        self._ends = [slot.end for slot in self._sorted]
        self.accesses.clear()

    def remember(self, abort: tuple[int, int, int], access: Access) -> None:
        """Note what an abort (ESR, FAR, HPFAR) is, until a slot changes."""
        if len(self.accesses) >= _MAX_ACCESSES:
            self.accesses.clear()
        self.accesses[abort] = access


def _invalid(words: str) -> OSError:
    return OSError(errno.EINVAL, words)
