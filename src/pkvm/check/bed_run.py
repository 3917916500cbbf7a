# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenarios on the kernel of a test bed: a run to compare with, or to keep as a record."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pkvm.check.scenarios import record
from pkvm.check.scenarios.record import Record
from pkvm.testbed import qemu
from pkvm.testbed.base import Bed, BedError
from pkvm.testbed.bed import TestBed
from pkvm.testbed.root import WITH_MEMORY

SECONDS = 1800.0
"""The most that all scenarios together may take."""


def run(
    bed: Bed,
    topics: Sequence[str],
    *,
    seconds: float,
    progress: Callable[[bytes], None] | None = None,
) -> Record:
    """Run the scenarios of `topics` in a bed that is up, each for no more than `seconds`.
    `progress` gets a line for each.

    Raises BedError, RecordError.
    """
    argv = ["python3", "-m", "pkvm.check.scenarios", "--backend", "/dev/kvm"]
    argv += ["--seconds", f"{seconds:g}"]
    for topic in topics:
        argv += ["--topic", topic]
    facts = {}
    if isinstance(bed, TestBed):
        argv.insert(0, WITH_MEMORY)
        version = ".".join(str(part) for part in qemu.version(bed.machine.program))
        facts = {"cpu": bed.machine.cpu, "qemu": f"QEMU {version}"}
    result = bed.run(argv, timeout=SECONDS, on_stderr=progress)
    if not result.ok:
        said = result.stderr.decode(errors="replace").strip().splitlines()
        raise BedError(f"the scenarios fail in the test bed: {said[-1] if said else 'no word'}")
    seen = record.from_json(result.stdout.decode(errors="replace"), "what the test bed printed")
    return Record({**seen.machine, **facts}, seen.observations)
