# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong with an emulated machine, brought about with the real parts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pkvm.testbed import bed as bed_module
from pkvm.testbed.base import BedError
from pkvm.testbed.bed import TestBed
from pkvm.testbed.qemu import Machine

pytestmark = pytest.mark.linux

PARENT = """\
import sys
from pkvm.testbed.bed import TestBed
with TestBed() as bed:
    print(bed.pid, flush=True)
    bed.run(("sleep", "1000"))
"""


def gone(pid: int) -> bool:
    """Whether a process ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def wait_till_gone(pid: int) -> None:
    while not gone(pid):
        os.sched_yield()


def boot_fails(bed: TestBed) -> str:
    with pytest.raises(BedError) as caught:
        bed.boot()
    pid = bed.pid
    bed.close()
    assert pid is None or gone(pid)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_qemu_is_killed_in_the_middle() -> None:
    with TestBed() as bed:
        assert bed.pid is not None
        pid = bed.pid
        with pytest.raises(BedError, match=r"^the emulated machine is gone: QEMU ended with sig"):
            bed.run(
                ("sh", "-c", "echo begun; sleep 1000"),
                on_stdout=lambda _: os.kill(pid, signal.SIGKILL),
            )
        with pytest.raises(BedError, match="is gone"):
            bed.run(("true",))
    assert gone(pid)


def test_a_kernel_that_panics_says_why() -> None:
    with TestBed() as bed, pytest.raises(BedError, match="Kernel panic - not syncing: sysrq"):
        bed.run(("sh", "-c", "echo c >/proc/sysrq-trigger"), timeout=120)


def test_a_machine_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    with TestBed() as bed:
        assert bed.pid is not None
        monkeypatch.setattr(bed_module, "PULSE_SECONDS", 0.2)
        monkeypatch.setattr(bed_module, "DEAD_SECONDS", 1)
        os.kill(bed.pid, signal.SIGSTOP)
        with pytest.raises(BedError, match=r"^the emulated machine hangs: no answer for 1 s"):
            bed.run(("true",))


def test_a_machine_that_does_not_boot_in_time() -> None:
    text = boot_fails(TestBed(boot_seconds=0.2))
    assert text.startswith("the emulated machine did not boot in 0.2 s")


def test_a_kernel_without_protected_mode() -> None:
    text = boot_fails(TestBed(append="kvm-arm.mode=nvhe"))
    assert "has no protected mode on this machine: it needs CONFIG_KVM" in text


def test_a_kernel_without_our_way_in() -> None:
    text = boot_fails(TestBed(append="initcall_blacklist=virtio_pci_driver_init"))
    assert text.endswith("(CONFIG_VIRTIO_PCI, CONFIG_VIRTIO_CONSOLE)")


def test_what_qemu_says_of_a_bad_machine() -> None:
    text = boot_fails(TestBed(Machine(memory=48)))
    assert text.startswith("the emulated machine is gone: QEMU ended with")


def test_a_failure_to_boot_ends_the_block() -> None:
    bed = TestBed(boot_seconds=0.2)
    with pytest.raises(BedError, match="did not boot"), bed:
        pass
    assert bed.pid is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_qemu_ends_with_its_parent(number: signal.Signals) -> None:
    with subprocess.Popen(
        (sys.executable, "-c", PARENT), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        qemu = int(parent.stdout.readline())
        assert not gone(qemu)
        parent.send_signal(number)
    wait_till_gone(qemu)
