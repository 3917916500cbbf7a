# SPDX-License-Identifier: GPL-2.0-or-later
"""What a Linux boot costs against another commit: `python benchmarks/boot_cost.py COMMIT`.

The unit is user and system CPU time of a whole process, `pkvm run` of the stock Debian 7.3 kernel
as a protected guest with 1 vCPU, to user space and off. The commit is put into a worktree of its
own, both are compiled, and they run in turn. One line: name, ratio, bound, "ok" or "NOT OK"; the
exit status is 1 beyond the bound.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import Result, median_ratio
from pkvm.testbed import debian, initramfs

HERE = Path(__file__).parent.parent
SECONDS = 180
"""No guest may take longer."""


def main() -> int:
    """Parse the command line, measure, print; returns the exit status."""
    parser = argparse.ArgumentParser(description="CPU time of a Linux boot against another commit")
    parser.add_argument("commit", help="what to compare with")
    parser.add_argument("--pairs", type=int, default=9, metavar="N", help="how many pairs")
    parser.add_argument("--bound", type=float, default=1.1, help="highest ratio")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="pkvm-boot-") as name:
            result = _measure(Path(name), options.commit, options.pairs, options.bound)
    except (debian.DebianError, subprocess.SubprocessError) as error:
        print(f"boot_cost: not measured: {error}", file=sys.stderr)
        return 1
    verdict = "ok" if result.ok else "NOT OK"
    print(f"{result.name} {result.ratio:.3f} bound {result.bound:g} {verdict} {result.detail}")
    return 0 if result.ok else 1


def _measure(folder: Path, commit: str, pairs: int, bound: float) -> Result:
    packages = debian.Packages()
    kernel, initrd = packages.kernel("7.3"), folder / "initrd.gz"
    initrd.write_bytes(initramfs.busybox_root(packages.busybox().read_bytes()).gzip())
    with _worktree(folder / "base", commit) as base:
        for tree in (HERE, base):
            _check_call(sys.executable, "-m", "compileall", "-q", str(tree / "src"))
        # The first boots find nothing in the page cache.
        for tree in (HERE, base):
            _cpu_seconds(tree, kernel, initrd)
        boots: dict[Path, list[float]] = {HERE: [], base: []}

        def boot(tree: Path) -> float:
            boots[tree].append(_cpu_seconds(tree, kernel, initrd))
            return boots[tree][-1]

        ratio, ours, theirs = median_ratio(lambda: boot(HERE), lambda: boot(base), pairs)
    words = f"{ours:.2f} s, {commit} {theirs:.2f} s; least {min(boots[HERE]):.2f} s and"
    return Result("linux-boot-cpu", ratio, bound, f"{words} {min(boots[base]):.2f} s")


@contextmanager
def _worktree(folder: Path, commit: str) -> Iterator[Path]:
    git = ("git", "-C", str(HERE), "worktree")
    _check_call(*git, "add", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        _check_call(*git, "remove", "--force", str(folder))


def _check_call(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _cpu_seconds(tree: Path, kernel: Path, initrd: Path) -> float:
    """User and system time of a boot with the sources of `tree`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [
            *(sys.executable, "-m", "pkvm", "run", "--kernel", str(kernel)),
            *("--initrd", str(initrd), "--append", 'console=ttyAMA0 panic=-1 run="true"'),
            *("--cpus", "1", "--memory", "256M"),
        ],
        check=True,
        timeout=SECONDS,
        env=os.environ | {"PYTHONPATH": str(tree / "src")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
