# SPDX-License-Identifier: GPL-2.0-or-later
"""The test bed and the comparison with a real kernel.

* testbed-start: `pkvm testbed run` from a warm cache, from the process's start to the first word of
  its command, against a bare QEMU: the same kernel, CPU model, CPUs, memory and kernel command
  line, to the first word of a static /init in a small initramfs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import Result, Unavailable, median_ratio
from pkvm.testbed import base, debian, initramfs, qemu
from pkvm.testbed.bed import TestBed
from pkvm.testbed.console import Console
from pkvm.testbed.store import KERNEL, Store

PAIRS = 7
SECONDS = 180
"""No machine may take longer."""
WORD = "here I am"


def measure() -> Iterator[Result]:
    """The figures. Raises Unavailable, ConsoleError."""
    yield _testbed_start()


def _testbed_start() -> Result:
    ours = [sys.executable, "-m", "pkvm", "testbed", "run", "--quiet"]
    try:
        with TestBed() as bed:  # the cache is warm from here on
            bed.run(("true",))
        kernel = Store().kernel(KERNEL, base.silent)
        busybox = debian.Packages().busybox().read_bytes()
    except (base.BedError, debian.DebianError) as error:
        raise Unavailable(str(error)) from error
    with tempfile.TemporaryDirectory(prefix="pkvm-bench-") as folder:
        initrd = Path(folder) / "initrd.gz"
        initrd.write_bytes(initramfs.busybox_root(busybox).gzip())
        bare = [
            *(*qemu.Machine().command(), "-serial", "stdio"),
            *("-kernel", str(kernel), "-initrd", str(initrd), "-append", qemu.APPEND),
        ]
        pythons: list[float] = []

        def start() -> float:
            pythons.append(_seconds([*ours, "python3", "-c", f"print('{WORD}')"], WORD))
            return _seconds([*ours, "echo", WORD], WORD)

        ratio, bed_seconds, bare_seconds = median_ratio(
            start, lambda: _seconds(bare, initramfs.MARKER), PAIRS
        )
    return Result(
        "testbed-start",
        ratio,
        1.5,
        f"{bed_seconds:.2f} s to the first command ({sorted(pythons)[len(pythons) // 2]:.2f} s to "
        f"Python's first word), QEMU {bare_seconds:.2f} s to a static /init",
    )


def _seconds(command: list[str], word: str) -> float:
    """From the start of a process to a word of it."""
    with Console(command, limit=SECONDS) as console:
        return console.expect(word)
