# SPDX-License-Identifier: GPL-2.0-or-later
"""The test bed and the comparison with a real kernel.

* testbed-start: `pkvm testbed run` from a warm cache, from the process's start to the first word of
  its command, against a bare QEMU: the same kernel, CPU model, CPUs, memory and kernel command
  line, to the first word of a static /init in a small initramfs.
* compare-speed: `pkvm compare` with the record, on the model, against the same scenarios on the
  real kernel in the test bed, each as one process from its start to its end.
* exits-a-second: exits to the VMM in a second, the agent in a loop: the real kernel's in the test
  bed over the model's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import Result, Unavailable, median_ratio
from pkvm.testbed import base, debian, initramfs, qemu
from pkvm.testbed.bed import TestBed
from pkvm.testbed.console import Console
from pkvm.testbed.root import WITH_MEMORY
from pkvm.testbed.store import KERNEL, Store

PAIRS = 7
RUNS = 3
"""Of all scenarios, which take a minute on the real kernel."""
SECONDS = 180
"""No machine may take longer."""
WORD = "here I am"


def measure() -> Iterator[Result]:
    """The figures. Raises Unavailable, ConsoleError."""
    yield _testbed_start()
    yield _scenarios()
    yield _real_exits()


def _scenarios() -> Result:
    script = [sys.executable, "-m", "pkvm", "compare", "--json"]
    bed = [sys.executable, "-m", "pkvm", "testbed", "run", "--quiet", WITH_MEMORY, "python3"]
    real = [*bed, "-m", "pkvm.check.scenarios", "--backend", "/dev/kvm"]
    ratio, model_seconds, real_seconds = median_ratio(
        lambda: _whole(script), lambda: _whole(real), RUNS
    )
    return Result(
        "compare-speed",
        ratio,
        1 / 20,
        f"{model_seconds:.2f} s on the model, {real_seconds:.1f} s on the real kernel in QEMU, "
        "start and end of both included",
    )


def _whole(command: list[str]) -> float:
    """How long a command takes. Raises Unavailable if it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise Unavailable(said[-1] if said else f"{command[0]} fails")
    return seconds


def _real_exits() -> Result:
    code = _EXITS.format(backend="/dev/kvm")
    try:
        with TestBed() as bed:
            result = bed.run(("python3", "-c", code), timeout=SECONDS)
    except base.BedError as error:
        raise Unavailable(str(error)) from error
    if not result.ok:
        raise Unavailable(result.stderr.decode(errors="replace").strip().splitlines()[-1])
    here = subprocess.run(
        [sys.executable, "-c", _EXITS.format(backend="model")], check=True, capture_output=True
    )
    real, model = float(result.stdout), float(here.stdout)
    return Result(
        "exits-a-second",
        real / model,
        1,
        f"{real:,.0f} exits a second on the real kernel in QEMU, {model:,.0f} on the model",
    )


_EXITS = """
import time
import pkvm
from pkvm.check.scenarios.bench import Bench, DEVICE
from pkvm.kvm import Vcpu

backend = "{backend}"
options = dict(dialect="upstream") if backend == "model" else dict()
with pkvm.open(backend, **options) as kvm, Bench(kvm) as bench:
    agent = bench.vm().agent().agent
    agent.on_mmio = lambda access: 0
    exits, run = 0, agent.vcpu.run
    def counted():
        global exits
        exits += 1
        return run()
    agent.vcpu.run = counted
    best = 0.0
    for _ in range(5):
        exits, start = 0, time.perf_counter()
        for _ in range(100):
            agent.load(DEVICE)
        best = max(best, exits / (time.perf_counter() - start))
    print(best)
"""


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
