# SPDX-License-Identifier: GPL-2.0-or-later
"""Any stage-2 tree in words: runs of like entries, by rising IPA.

A run is as many neighbouring entries of one level as differ only by the next
physical address (leaves) or the next guest frame (annotations). `Run` is the
machine-readable form (`dataclasses.asdict` gives JSON's), `dump_stage2` the
text for people who know the Arm ARM.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    AF,
    ANNOTATION,
    ANNOTATION_GFN_SHIFT,
    DESCRIPTOR,
    LAST_LEVEL,
    PAGE_SHIFT,
    S2AP_R,
    S2AP_W,
    VALID,
    InvalidType,
    Owner,
    PageState,
    is_leaf,
    is_table,
    level_shift,
    level_size,
)
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.stage2 import Stage2Context, iter_leaves, iter_tables

_MEMATTR = DESCRIPTOR["MemAttr"]
_SHAREABILITY = {0: "non-shareable", 1: "SH=0b01", 2: "outer", 3: "inner"}
_EXECUTE = {0: "X", 1: "x@EL0", 2: "-", 3: "x@EL1"}
_SIZES = {1: "1 GiB block", 2: "2 MiB block", 3: "4 KiB page"}


@dataclass(frozen=True, slots=True)
class Run:
    """`entries` neighbouring entries at `level`, alike; addresses and `size` in bytes.

    What `kind` does not have is None: only a leaf has `pa`, permissions, memory type,
    shareability, access flag and state; only an annotation has an owner, and of those only a
    guest's has `vm` (EL2 handle) and `gfn` (guest frame of the first entry).
    """

    ipa: int
    size: int
    level: int
    entries: int
    kind: str
    """"block", "page", "annotation", "locked", "poisoned", "reserved" (an encoding that the
    architecture does not define there) or "table" (one that points outside RAM)."""
    descriptor: int
    """The first entry."""
    pa: int | None = None
    permissions: str | None = None
    """"R", "W" and "X" or "-" each; "x@EL0", "x@EL1" where only that level may execute."""
    memory_type: str | None = None
    shareability: str | None = None
    access_flag: bool | None = None
    state: str | None = None
    """pKVM's page state by the software bits, of a guest's tree: "OWNED", ..."""
    owner: str | None = None
    """"hyp" or "guest"; "owner N" for a component id that pKVM does not define."""
    vm: int | None = None
    gfn: int | None = None


def stage2_runs(memory: PhysicalMemory, ctx: Stage2Context) -> list[Run]:
    """Everything that a tree holds, as runs by rising IPA.

    Raises ValueError if VTCR and VTTBR describe no tree, BusError if its root is not in RAM.
    """
    runs = []
    for ipa, level, entry, entries in _merged(iter_leaves(memory, ctx)):
        runs.append(_run(ipa, level, entry, entries, guest=ctx.vmid != 0))
    return runs


def dump_stage2(memory: PhysicalMemory, ctx: Stage2Context, title: str) -> str:
    """A tree in words: a header, a line for each run, a summary. Errors as `stage2_runs`."""
    digits = (ctx.ipa_bits + 3) // 4
    tables = f"{ctx.root_tables} concatenated tables" if ctx.root_tables > 1 else "one table"
    lines = [
        f"{title}: VTTBR_EL2 {ctx.vttbr:#018x} (VMID {ctx.vmid}, root PA {ctx.root:#x}), "
        f"VTCR_EL2 {ctx.vtcr:#x}",
        f"{ctx.ipa_bits}-bit IPA, 4 KiB granule, {tables} at start level {ctx.start_level}",
    ]
    runs = stage2_runs(memory, ctx)
    for run in runs:
        span = f"IPA {run.ipa:#0{digits + 2}x}-{run.ipa + run.size - 1:#0{digits + 2}x}"
        lines.append(f"  {span} {_what(run)}")
    mapped = sum(run.size for run in runs if run.pa is not None)
    pages = sum(1 for _ in iter_tables(memory, ctx))
    lines.append(
        f"{_bytes(mapped)} mapped, {sum(run.entries for run in runs)} entries in {len(runs)} runs, "
        f"{pages} table pages"
    )
    return "\n".join(lines)


def describe_leaf(descriptor: int, level: int, *, guest: bool = True) -> str:
    """One entry that is not a table, in words; `guest`: its software bits are a page state.

    Zero is "invalid: nothing mapped".
    """
    if descriptor == 0:
        return "invalid: nothing mapped"
    return _what(_run(0, level, descriptor, 1, guest=guest))


def _merged(leaves: Iterator[tuple[int, int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """(ipa, level, first entry, number of entries) of each run."""
    first_ipa = level = first = entries = step = next_ipa = next_entry = 0
    for ipa, at_level, entry in leaves:
        if entries and ipa == next_ipa and at_level == level and entry == next_entry:
            entries += 1
        else:
            if entries:
                yield first_ipa, level, first, entries
            first_ipa, level, first, entries = ipa, at_level, entry, 1
            step = _step(entry, at_level)
        next_ipa = ipa + level_size(level)
        next_entry = entry + step
    if entries:
        yield first_ipa, level, first, entries


def _step(entry: int, level: int) -> int:
    """By how much the next entry of a run is larger."""
    if is_leaf(entry, level):
        return level_size(level)
    if _is_guest_annotation(entry):
        return 1 << ANNOTATION_GFN_SHIFT + level_shift(level) - PAGE_SHIFT
    return 0


def _is_guest_annotation(entry: int) -> bool:
    fields = ANNOTATION.decode(entry)
    return (
        not entry & VALID
        and fields["type"] == InvalidType.DONATION
        and fields["owner"] == Owner.GUEST
    )


def _run(ipa: int, level: int, entry: int, entries: int, *, guest: bool) -> Run:
    size = entries * level_size(level)
    if is_leaf(entry, level):
        fields = DESCRIPTOR.decode(entry)
        state = PageState(fields["SW"] & 3).name if guest else None
        return Run(
            ipa, size, level, entries,
            kind="page" if level == LAST_LEVEL else "block",
            descriptor=entry,
            pa=entry & ADDRESS_MASK & -level_size(level),
            permissions=("R" if entry & S2AP_R else "-")
            + ("W" if entry & S2AP_W else "-")
            + _EXECUTE[fields["XN"]],
            memory_type=_MEMATTR.names.get(fields["MemAttr"], f"MemAttr={fields['MemAttr']:#x}"),
            shareability=_SHAREABILITY[fields["SH"]],
            access_flag=bool(entry & AF),
            state=state,
        )  # fmt: skip
    if is_table(entry, level):
        return Run(ipa, size, level, entries, "table", entry)
    if entry & VALID:
        return Run(ipa, size, level, entries, "reserved", entry)
    fields = ANNOTATION.decode(entry)
    if fields["type"] == InvalidType.LOCKED:
        return Run(ipa, size, level, entries, "locked", entry)
    if fields["type"] == InvalidType.POISONED:
        return Run(ipa, size, level, entries, "poisoned", entry)
    if fields["type"] != InvalidType.DONATION:
        return Run(ipa, size, level, entries, "reserved", entry)
    if fields["owner"] == Owner.GUEST:
        return Run(
            ipa, size, level, entries, "annotation", entry,
            owner="guest", vm=fields["vm"], gfn=fields["gfn"],
        )  # fmt: skip
    owner = "hyp" if fields["owner"] == Owner.HYP else f"owner {fields['owner']}"
    return Run(ipa, size, level, entries, "annotation", entry, owner=owner)


def _what(run: Run) -> str:
    """The run without its addresses."""
    count = f"{run.entries} x " if run.entries > 1 else ""
    size = f"level {run.level}, {count}{_SIZES.get(run.level, '512 GiB entry')}"
    if run.pa is not None:
        words = [f"-> PA {run.pa:#x}", size, run.permissions, run.memory_type, run.shareability]
        if not run.access_flag:
            words.append("AF=0")
        words.append(run.state)
        return "  ".join(word for word in words if word)
    if run.kind == "annotation":
        if run.gfn is not None:
            owner = f"owned by guest VM {run.vm:#x} from gfn {run.gfn:#x}"
        else:
            owner = f"owned by {'EL2' if run.owner == 'hyp' else run.owner}"
        return f"annotated: {owner}  {size}"
    if run.kind == "table":
        return f"broken: table outside RAM, descriptor {run.descriptor:#018x}  {size}"
    if run.kind == "reserved":
        return f"broken: reserved encoding {run.descriptor:#018x}  {size}"
    return f"{run.kind}  {size}"


def _bytes(count: int) -> str:
    """A size in the largest unit that divides it."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count and count % (1 << shift) == 0:
            return f"{count >> shift} {unit}"
    return f"{count} bytes"
