# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of the scenarios' run in a test bed: a record, or a clear error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from pkvm.check import bed_run, recorded
from pkvm.check.scenarios import record
from pkvm.check.scenarios.record import RecordError
from pkvm.testbed.base import Bed, BedError, Listener, Result, Terminal


class FakeBed(Bed):
    """A bed whose commands end as `result` says."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.commands: list[tuple[str, ...]] = []

    def boot(self) -> None:
        pass

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float | None = None,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
        on_stdout: Listener | None = None,
        on_stderr: Listener | None = None,
    ) -> Result:
        self.commands.append(tuple(argv))
        if on_stderr is not None:
            on_stderr(self.result.stderr)
        return self.result

    def put(self, path: str, data: bytes) -> None:
        raise AssertionError

    def get(self, path: str) -> bytes:
        raise AssertionError

    def shell(self, terminal: Terminal) -> int:
        raise AssertionError

    def close(self) -> None:
        pass


def test_what_the_bed_prints_is_the_record() -> None:
    whole = recorded.load()
    text = record.to_json({"kernel": "9.9"}, whole.observations[:40])
    bed = FakeBed(Result(0, text.encode(), b"vm_types: good_types\n"))
    lines: list[bytes] = []
    seen = bed_run.run(bed, ["vm_types"], seconds=2.5, progress=lines.append)
    assert seen.machine == {"kernel": "9.9"}
    assert seen.observations == whole.observations[:40]
    assert lines == [b"vm_types: good_types\n"]
    assert bed.commands[0][-4:] == ("--seconds", "2.5", "--topic", "vm_types")


def test_a_run_that_fails_says_its_last_word() -> None:
    bed = FakeBed(Result(1, b"", b"error: /dev/kvm: there is no such file\n"))
    with pytest.raises(BedError, match=r"in the test bed: error: /dev/kvm: there is no"):
        bed_run.run(bed, ["vm_types"], seconds=1)


def test_output_that_is_no_record() -> None:
    with pytest.raises(RecordError, match="what the test bed printed is not JSON"):
        bed_run.run(FakeBed(Result(0, b"\xff", b"")), [], seconds=1)
