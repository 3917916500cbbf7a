# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pkvm.testbed import child

PARENT = """\
import subprocess
from pkvm.testbed import child
process = subprocess.Popen(child.bound(("sleep", "1000")))
print(process.pid, flush=True)
process.wait()
"""


def test_the_command_runs_with_its_words() -> None:
    done = subprocess.run(
        child.bound(("sh", "-c", 'printf "%s|" "$@"; exit 5', "sh", "-c", "a b", "")),
        check=False,
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (5, b"-c|a b||", b"")


def test_a_child_ends_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen((sys.executable, "-c", PARENT), stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        # A child that was not bound yet when its parent was killed sees that it came too late.
        parent.send_signal(signal.SIGKILL)
    stat = Path(f"/proc/{pid}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
        os.sched_yield()


def test_a_program_that_cannot_be_run(tmp_path: Path) -> None:
    done = subprocess.run(
        child.bound((str(tmp_path / "none"),)), check=False, capture_output=True, text=True
    )
    assert done.stderr == f"{tmp_path}/none cannot be run: No such file or directory\n"
    assert done.returncode == 1


def test_elsewhere_than_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert child.bound(("a", "b")) == ["a", "b"]
