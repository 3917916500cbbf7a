# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulated machine, with the real QEMU and Debian's kernel and Python."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pkvm.testbed.base import BedError, TimedOut
from pkvm.testbed.bed import TestBed
from pkvm.testbed.root import WITH_MEMORY

pytestmark = pytest.mark.linux


@pytest.fixture(scope="module")
def bed() -> Iterator[TestBed]:
    with TestBed(files={"/root/before": b"the start"}) as bed:
        yield bed


def test_status_and_output_come_back(bed: TestBed) -> None:
    result = bed.run(("sh", "-c", "echo out; echo err >&2; exit 7"))
    assert (result.status, result.stdout, result.stderr) == (7, b"out\n", b"err\n")


def test_the_kernel_makes_protected_vms(bed: TestBed) -> None:
    script = (
        "import ctypes, os\n"
        "kvm = os.open('/dev/kvm', os.O_RDWR)\n"
        "print(ctypes.CDLL(None).ioctl(kvm, 0xAE01, ctypes.c_ulong(1 << 31)) > 0)"
    )
    assert bed.run(("python3", "-c", script), timeout=120).stdout == b"True\n"
    assert bed.release.startswith("7.3.")


def test_words_arrive_as_they_are(bed: TestBed) -> None:
    words = ("it's", 'a "b" $c', "", "*", "two\nlines", "\\001", "é")
    result = bed.run(("sh", "-c", 'printf "%s|" "$@"', "sh", *words))
    assert result.stdout == "".join(f"{word}|" for word in words).encode()


def test_files_go_and_come(bed: TestBed) -> None:
    data = bytes(range(256)) * 1024
    bed.put("/tmp/a folder/file", data)
    assert bed.get("/tmp/a folder/file") == data
    bed.put("empty", b"")
    assert bed.get("/root/empty") == b""
    assert bed.get("before") == b"the start"


def test_a_file_that_cannot_be_written_or_read(bed: TestBed) -> None:
    with pytest.raises(BedError, match=r"^/proc/file cannot be written in the test bed: "):
        bed.put("/proc/file", b"x" * 5000)
    bed.put("/tmp/after", b"right")
    assert bed.get("/tmp/after") == b"right"
    with pytest.raises(BedError, match=r"^nothing cannot be fetched .*: cat: can't open 'nothing'"):
        bed.get("nothing")


def test_much_output_in_both_streams(bed: TestBed) -> None:
    result = bed.run(("sh", "-c", "seq 200000; seq 200000 >&2"))
    expected = "".join(f"{number}\n" for number in range(1, 200001)).encode()
    assert result.stdout == result.stderr == expected


def test_input_and_environment(bed: TestBed) -> None:
    result = bed.run(
        ("sh", "-c", 'cat; echo "$A"'), stdin=b"typed\x00\x01\n", environment={"A": "b c"}
    )
    assert result.stdout == b"typed\x00\x01\nb c\n"
    assert bed.run(("cat",)).stdout == b""


def test_a_command_has_its_time(bed: TestBed) -> None:
    with pytest.raises(TimedOut, match=r"took longer than 0\.5 s"):
        bed.run(("sh", "-c", "echo before; setsid sleep 1000 & sleep 1000"), timeout=0.5)
    assert bed.run(("echo", "after")).stdout == b"after\n"
    assert b"sleep 1000" not in bed.run(("ps",)).stdout


def test_guest_memory_of_every_kind_is_at_hand(bed: TestBed) -> None:
    script = "stat -f -c %t $TMPDIR; cat /proc/sys/vm/nr_hugepages"
    for _ in range(2):
        result = bed.run((WITH_MEMORY, "sh", "-c", script), timeout=60)
        assert result.stdout == b"ef53\n8\n", result.stderr
