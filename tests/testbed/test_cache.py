# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pkvm.testbed import cache

KILLED = """
import os, pathlib, signal, sys
from pkvm.testbed import cache
with cache.making(pathlib.Path(sys.argv[1])) as partial:
    (partial / "file").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_folder_is_named_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PKVM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.root() == tmp_path / ".cache" / "pkvm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.root() == tmp_path / "xdg" / "pkvm"
    monkeypatch.setenv("PKVM_CACHE", str(tmp_path / "ours"))
    assert cache.root() == tmp_path / "ours"


def test_what_is_made_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "made"
    with cache.making(target) as partial:
        (partial / "file").write_text("whole")
        assert not target.exists()
    assert (target / "file").read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "made"

    def interrupted() -> None:
        with cache.making(target) as partial:
            (partial / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    killed = subprocess.run((sys.executable, "-c", KILLED, str(tmp_path / "made")), check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(cache.PARTIAL)
    (tmp_path / f"{cache.PARTIAL}file").touch()
    with cache.making(tmp_path / "made"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_room_is_asked_for(tmp_path: Path) -> None:
    cache.need_room(tmp_path, 1)
    with pytest.raises(OSError, match=r"No space left on device \(\d+ MiB are needed\)"):
        cache.need_room(tmp_path, 1 << 60)


def test_a_lock_keeps_others_out_and_ends_with_the_block(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with (
        cache.lock(folder),
        (folder / ".lock").open() as other,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (folder / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
