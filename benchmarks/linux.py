# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux as a protected guest against the same kernel and initramfs under QEMU's TCG.

Both sides run as whole processes, in turn, in one run, with the same kernel command line and
without `quiet`. The time is taken here, when a line of the guest's console arrives: neither side's
own clock is asked. QEMU is `qemu-system-aarch64 -M virt,gic-version=3 -cpu cortex-a72` with TCG and
without protection.

* linux-boot: from the process's start to the first words of user space, the stock Debian 7.3
  kernel, 1 vCPU, 256 MiB.
* linux-boot-4-vcpus: the same, ours with 4 vCPUs against ours with 1.
* linux-disk-read: 256 MiB read from a virtio disk, between two words of the guest; the kernel
  that can share (guests/linux), so that a protected guest has a disk at all.
* linux-sha256: the same for sha256sum of 64 MiB that lie in memory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import Result, Unavailable, median_ratio
from pkvm.testbed import debian, initramfs
from pkvm.testbed.console import Console

PAIRS = 9
FEWER_PAIRS = 5
MEMORY = "256M"
DISK_BYTES = 256 << 20
SHA_MIB = 64
SECONDS = 180
"""No guest may take longer."""

APPEND = "console=ttyAMA0 panic=-1"
GUESTS = Path(__file__).parent.parent / "guests" / "linux"


class Material:
    """Kernels, initramfs and disk in a folder, and both sides' commands to run them."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("qemu-system-aarch64") is None:
            raise Unavailable("qemu-system-aarch64 is missing (Debian package qemu-system-arm)")
        packages = debian.Packages()
        try:
            self.kernel = packages.kernel("7.3")
            busybox = packages.busybox().read_bytes()
        except debian.DebianError as error:
            raise Unavailable(str(error)) from error
        built = subprocess.run(
            ("make", "-s", "-C", str(GUESTS), f"PYTHON={sys.executable}"),
            check=False,
            stdout=subprocess.PIPE,
            text=True,
        )
        if built.returncode:
            raise Unavailable("the sharing kernel cannot be built, see above")
        self.sharing = Path(built.stdout.strip())
        self.initrd = folder / "initrd.gz"
        self.initrd.write_bytes(initramfs.busybox_root(busybox).gzip())
        self.disk = folder / "disk"
        with self.disk.open("wb") as disk:
            for _ in range(DISK_BYTES >> 20):
                disk.write(os.urandom(1 << 20))

    def pkvm(self, kernel: Path, run: str, *options: str, cpus: int = 1) -> list[str]:
        """Ours: a protected guest."""
        return [
            *(sys.executable, "-m", "pkvm", "run", "--kernel", str(kernel)),
            *("--initrd", str(self.initrd), "--append", _append(run), "--cpus", str(cpus)),
            *("--memory", MEMORY, *options),
        ]

    def qemu(self, kernel: Path, run: str, *options: str) -> list[str]:
        """Theirs: no protection."""
        return [
            *("qemu-system-aarch64", "-M", "virt,gic-version=3", "-cpu", "cortex-a72"),
            *("-accel", "tcg", "-smp", "1", "-m", MEMORY, "-nographic", "-nic", "none"),
            *("-no-reboot", "-kernel", str(kernel), "-initrd", str(self.initrd)),
            *("-append", _append(run), *options),
        ]


def _append(run: str) -> str:
    return f'{APPEND} run="{run}"'


def _boot_seconds(command: list[str]) -> float:
    """From the start of the process to the first words of user space."""
    with Console(command, limit=SECONDS) as console:
        seconds = console.expect(initramfs.MARKER)
        console.expect("run ended with status 0")
        _finish(console)
        return seconds


def _span_seconds(command: list[str], result: str) -> float:
    """From the guest's word "begin" to its word "end", with `result` in between."""
    with Console(command, limit=SECONDS) as console:
        console.expect(initramfs.MARKER)
        begin = console.expect("\nbegin")
        console.expect(result)
        seconds = console.expect("\nend") - begin
        _finish(console)
        return seconds


def _finish(console: Console) -> None:
    status = console.finish()
    if status:
        raise RuntimeError(f"the guest ended with status {status}:\n{console.text[-2000:]}")


def measure() -> Iterator[Result]:
    """The four figures. Raises Unavailable, ConsoleError, RuntimeError."""
    with tempfile.TemporaryDirectory(prefix="pkvm-bench-") as folder:
        material = Material(Path(folder))
        yield _boot(material)
        yield _vcpus(material)
        yield _disk(material)
        yield _sha256(material)


def _boot(material: Material) -> Result:
    ratio, ours, theirs = median_ratio(
        lambda: _boot_seconds(material.pkvm(material.kernel, "true")),
        lambda: _boot_seconds(material.qemu(material.kernel, "true")),
        PAIRS,
    )
    return Result("linux-boot", ratio, 1.5, f"{ours:.2f} s, QEMU {theirs:.2f} s to user space")


def _vcpus(material: Material) -> Result:
    ratio, four, one = median_ratio(
        lambda: _boot_seconds(material.pkvm(material.kernel, "true", cpus=4)),
        lambda: _boot_seconds(material.pkvm(material.kernel, "true")),
        FEWER_PAIRS,
    )
    return Result("linux-boot-4-vcpus", ratio, 2, f"{four:.2f} s, with 1 vCPU {one:.2f} s")


def _disk(material: Material) -> Result:
    run = "echo; echo begin; dd if=/dev/vda of=/dev/null bs=1M; echo end"
    ours_options = ("--disk", f"{material.disk},ro")
    qemu_options = (
        *("-drive", f"file={material.disk},format=raw,if=none,id=disk,readonly=on"),
        *("-device", "virtio-blk-device,drive=disk", "-global", "virtio-mmio.force-legacy=false"),
    )
    done = f"{DISK_BYTES >> 20}+0 records out"
    ratio, ours, theirs = median_ratio(
        lambda: _span_seconds(material.pkvm(material.sharing, run, *ours_options), done),
        lambda: _span_seconds(material.qemu(material.sharing, run, *qemu_options), done),
        FEWER_PAIRS,
    )
    mib = DISK_BYTES >> 20
    return Result(
        "linux-disk-read", ratio, 2, f"{mib / ours:.0f} MiB/s, QEMU {mib / theirs:.0f} MiB/s"
    )


def _sha256(material: Material) -> Result:
    make = f"dd if=/dev/zero of=/tmp/f bs=1M count={SHA_MIB}"
    run = f"{make}; echo; echo begin; sha256sum /tmp/f; echo end"
    # sha256 of 64 MiB of zero bytes
    digest = "3b6a07d0d404fab4e23b6d34bc6696a6a312dd92821332385e5af7c01c421351"
    ratio, ours, theirs = median_ratio(
        lambda: _span_seconds(material.pkvm(material.sharing, run), digest),
        lambda: _span_seconds(material.qemu(material.sharing, run), digest),
        FEWER_PAIRS,
    )
    return Result("linux-sha256", ratio, 1.5, f"{ours:.2f} s, QEMU {theirs:.2f} s")
