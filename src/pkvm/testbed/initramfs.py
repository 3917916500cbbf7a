# SPDX-License-Identifier: GPL-2.0-or-later
"""Initramfs archives: the "newc" cpio format, gzip, and a root of busybox alone.

The format is the kernel's own (Documentation/driver-api/early-userspace/buffer-format.rst). The
same content gives the same bytes: no times, no owners but root, and inode numbers in order.

`python -m pkvm.testbed.initramfs` makes one of Debian's busybox in the user's cache and prints its
path: a shell on the console, or with run="COMMAND" on the kernel's command line that command.
"""

from __future__ import annotations

import gzip
import hashlib
import stat
import sys
from pathlib import Path, PurePosixPath

from pkvm.testbed import cache
from pkvm.testbed.debian import DebianError, Packages

MARKER = "userland reached"
"""What /init prints first, followed by the seconds since the kernel's start."""

INIT = f"""\
#!/bin/busybox sh
# Environment: run=COMMAND (from the kernel's command line) runs it and powers off;
# without it, an interactive shell, and power-off at its end.
busybox=/bin/busybox
$busybox mount -t proc proc /proc
read -r uptime _ </proc/uptime
echo "{MARKER} $uptime"
$busybox mount -t sysfs sysfs /sys
$busybox mount -t devtmpfs devtmpfs /dev
$busybox mkdir -p /dev/pts
$busybox mount -t devpts devpts /dev/pts
$busybox mount -t tmpfs tmpfs /tmp
export PATH=/bin HOME=/root TERM=${{TERM:-linux}}
if [ -n "$run" ]; then
	sh -c "$run"
	echo "run ended with status $?"
else
	setsid cttyhack sh
fi
sync
poweroff -f
"""
"""/init of `busybox_root`. The marker comes before anything that takes time."""

_TRAILER = "TRAILER!!!"


class Archive:
    """A cpio archive in the making, in memory.

    Paths are absolute, as the guest will see them; the folders that lead to one are made. A path
    that names nothing in the archive raises ValueError.
    """

    def __init__(self) -> None:
        self._entries: dict[str, bytes] = {}
        self._files: dict[str, bytes] = {}
        self._inode = 0

    def folder(self, path: str, mode: int = 0o755) -> None:
        """A folder, if there is none of that name yet."""
        name = self._enter(path)
        if name not in self._entries:
            self._add(name, stat.S_IFDIR | mode)

    def file(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        """A file with these bytes, or this text in UTF-8."""
        content = data.encode() if isinstance(data, str) else data
        name = self._enter(path)
        self._add(name, stat.S_IFREG | mode, content)
        self._files[name] = content

    def link(self, path: str, target: str) -> None:
        """A symbolic link to `target`."""
        self._add(self._enter(path), stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A character device node."""
        self._add(self._enter(path), stat.S_IFCHR | mode, device=(major, minor))

    def files(self) -> dict[str, bytes]:
        """The content of every file so far, by its absolute path."""
        return {f"/{name}": data for name, data in self._files.items()}

    def cpio(self) -> bytes:
        """The archive so far, with its end, uncompressed."""
        return b"".join(self._entries.values()) + _record(_TRAILER, 0, 0, b"", (0, 0))

    def gzip(self) -> bytes:
        """The archive so far, as the kernel takes it."""
        return gzip.compress(self.cpio(), compresslevel=6, mtime=0)

    def _enter(self, path: str) -> str:
        """The archive's name for `path`, with the folders before it made."""
        name = str(PurePosixPath("/", path)).lstrip("/")
        if not name or ".." in name.split("/"):
            raise ValueError(f"{path!r} is no path in an archive")
        parent = str(PurePosixPath(name).parent)
        if parent != ".":
            self.folder(parent)
        return name

    def _add(
        self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        self._entries[name] = _record(name, self._inode, mode, data, device)


def busybox_root(busybox: bytes, *, init: str = INIT) -> Archive:
    """A root with `busybox` (a static one), its applets by way of the shell, and `init` as /init.

    Debian's static busybox runs its applets from its own shell without links to them. More may be
    put in before the archive is made.
    """
    archive = Archive()
    for path in ("/dev", "/proc", "/sys", "/tmp", "/root", "/bin"):
        archive.folder(path)
    # /init's standard streams, before it can mount anything.
    archive.character_device("/dev/console", 5, 1)
    archive.file("/bin/busybox", busybox, 0o755)
    archive.link("/bin/sh", "busybox")
    archive.file("/init", init, 0o755)
    return archive


def _record(name: str, inode: int, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
    """One entry: a header of thirteen 8-digit fields, the name, the bytes, each padded to 4."""
    path = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + path) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def cached(busybox: Path) -> Path:
    """A gzipped `busybox_root` of this busybox, in the user's cache. Raises OSError."""
    data = busybox_root(busybox.read_bytes()).gzip()
    folder = cache.root() / "initramfs" / hashlib.sha256(data).hexdigest()[:16]
    with cache.lock(folder.parent):
        if not folder.exists():
            with cache.making(folder) as partial:
                (partial / "initrd.gz").write_bytes(data)
    return folder / "initrd.gz"


def main() -> int:
    """The command line of this module; its exit status."""
    try:
        print(cached(Packages().busybox()))
    except (DebianError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
