# SPDX-License-Identifier: GPL-2.0-or-later
"""What the host gives to the secure world: descriptors taken apart, pages marked (facts §9.4).

Everything is read from EL2's own copy of a fragment. Every offset, length and
count in it is the host's word; EL2 follows none that leads out of the fragment,
and wants the whole to add up, so that the secure world, which takes the same
bytes apart by itself, comes to the same pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pkvm.arm64 import ffa_memory
from pkvm.arm64.ffa import NORMAL_WORLD, Status
from pkvm.arm64.ffa_memory import COMPOSITE_BYTES, CONSTITUENT_BYTES, Constituent
from pkvm.arm64.stage2 import PAGE_MASK, PAGE_SHIFT
from pkvm.events import NO_ADDRESS
from pkvm.hyp.errors import Refused
from pkvm.hyp.mem_protect import MemProtect

Ranges = Sequence[Constituent]


class FfaRefused(Exception):
    """An FF-A call failed a check of EL2's; nothing has changed. `check` names the check, `why`
    says in words what it saw, `status` is what the host gets."""

    def __init__(self, status: Status, check: str, why: str, pa: int = NO_ADDRESS) -> None:
        super().__init__(f"{check}: {why}")
        self.status = status
        self.check = check
        self.why = why
        self.pa = pa


def invalid(check: str, why: str) -> FfaRefused:
    """A refusal with INVALID_PARAMETERS."""
    return FfaRefused(Status.INVALID_PARAMETERS, check, why)


def first_ranges(data: bytes, total_bytes: int, version: int) -> list[Constituent]:
    """The ranges in a first fragment of a transaction of `total_bytes`: from the host, to one
    receiver. Raises FfaRefused."""
    try:
        header = ffa_memory.read_transaction(data, version)
        if header.sender != NORMAL_WORLD:
            raise invalid("ffa_sender", f"the sender is {header.sender:#x}, not the host")
        if header.endpoint_count != 1:
            raise invalid("ffa_endpoints", f"{header.endpoint_count} receivers, not one")
        endpoint = ffa_memory.read_endpoint(data, header.endpoint_offset)
        start = endpoint.composite_offset
        if start < header.endpoint_offset + ffa_memory.ENDPOINT_LEAST:
            raise invalid("ffa_composite", f"the memory's descriptor at {start:#x} is no such")
        composite = ffa_memory.read_composite(data, start)
        start += COMPOSITE_BYTES
        if start + composite.range_count * CONSTITUENT_BYTES != total_bytes:
            why = f"{composite.range_count} ranges do not end at byte {total_bytes:#x}"
            raise invalid("ffa_length", why)
        return more_ranges(data[start:])
    except ValueError as error:
        raise invalid("ffa_descriptor", str(error)) from error


def more_ranges(data: bytes) -> list[Constituent]:
    """The ranges that a run of bytes consists of. Raises FfaRefused."""
    try:
        return ffa_memory.read_constituents(data)
    except ValueError as error:
        raise invalid("ffa_constituents", str(error)) from error


class SecureSharing:
    """Marks the host's pages as given to the secure world, and back."""

    def __init__(self, mem: MemProtect) -> None:
        self._mem = mem

    def give(self, ranges: Ranges, *, lend: bool) -> None:
        """All of these pages or none: the host's own become shared; if it lends them, in some
        dialects the secure world's. Raises FfaRefused: DENIED for a page that is not the host's
        own."""
        mem = self._mem
        taken = lend and mem.policy.lend_takes_access
        done: list[Constituent] = []
        with mem.lock:
            try:
                self._each(ranges, mem.host_donate_ffa if taken else mem.host_share_ffa, done)
            except FfaRefused:
                self._each(done, mem.host_return_ffa)
                raise

    def check_given(self, ranges: Ranges) -> None:
        """Refuse (FfaRefused, DENIED) unless the host gave all of these pages."""
        self._each(ranges, self._mem.host_check_given_ffa)

    def take_back(self, ranges: Ranges) -> None:
        """The host has these pages for itself again. Raises FfaRefused as `check_given`."""
        with self._mem.lock:
            self.check_given(ranges)
            self._each(ranges, self._mem.host_return_ffa)

    def _each(
        self,
        ranges: Iterable[Constituent],
        transition: Callable[[int, int], None],
        done: list[Constituent] | None = None,
    ) -> None:
        """One transition for each range, noted in `done`."""
        for item in ranges:
            if item.address & PAGE_MASK:
                why = f"the range at {item.address:#x} is not of whole pages"
                raise FfaRefused(Status.DENIED, "ffa_alignment", why, item.address)
            try:
                transition(item.address >> PAGE_SHIFT, item.page_count)
            except Refused as refused:
                raise FfaRefused(Status.DENIED, refused.check, refused.why, refused.pa) from refused
            if done is not None:
                done.append(item)
