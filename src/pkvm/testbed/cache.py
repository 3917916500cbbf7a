# SPDX-License-Identifier: GPL-2.0-or-later
"""The user's cache: files that can be made again, of which nothing half-made is ever seen."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
PARTIAL = ".making-"
"""How the names of things in the making begin."""


def root() -> Path:
    """The cache's folder: PKVM_CACHE, or `pkvm` in XDG_CACHE_HOME or in ~/.cache.

    It need not exist.
    """
    if given := os.environ.get("PKVM_CACHE"):
        return Path(given).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "pkvm"


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made if need be, for this process alone.

    Waits while another process holds it. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def making(target: Path) -> Iterator[Path]:
    """A new folder to fill; it becomes `target` at the end, or goes if an error ends the block.

    `target` must not exist; its parent is made if need be, and whoever makes something there holds
    a `lock`: what a process that was killed left half-made there goes now. Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{PARTIAL}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=target.parent))
    try:
        partial.chmod(0o755)
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def need_room(folder: Path, size: int) -> None:
    """Raise OSError (ENOSPC) if the file system of `folder` has not `size` bytes to spare."""
    status = os.statvfs(folder)
    if status.f_bavail * status.f_frsize < size:
        words = f"{os.strerror(errno.ENOSPC)} ({size >> 20} MiB are needed)"
        raise OSError(errno.ENOSPC, words, str(folder))
