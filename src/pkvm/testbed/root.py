# SPDX-License-Identifier: GPL-2.0-or-later
"""The root file system of an emulated test bed: Debian's busybox and Python, and the first process.

It becomes an initramfs, and the kernel unpacks it at each boot: what no program for KVM needs is
left out. /init opens the virtio ports and hands the first of them to a shell as its script.
"""

from __future__ import annotations

import re
from pathlib import Path

from pkvm.testbed.base import Progress
from pkvm.testbed.debian import DebianError, Packages
from pkvm.testbed.initramfs import Archive, busybox_root

SITE = "/usr/lib/python3/dist-packages"
"""Where Debian's Python looks for packages."""
LIBRARY = "usr/lib/aarch64-linux-gnu"
HOME = "/root"
BOOTED = "/run/booted"
"""Made when the bed is ready: what is newer was made by a command."""

PORTS = {"control": 3, "output": 4, "error": 5}
"""The virtio ports, which are numbered from 1 in this order, and /init's file descriptors."""

FSTAB = "devtmpfs /dev devtmpfs\nproc /proc proc\nsysfs /sys sysfs\n"
FSTAB_DEV = "devpts /dev/pts devpts\ntmpfs /dev/shm tmpfs\n"
"""What is mounted on folders that /init makes. One process mounts all: each takes time there."""

LOST = "test bed:"
"""How /init begins what it says on the serial console before it gives up."""

WITH_MEMORY = "with-memory"
"""A command's prefix: it gets what else guests can be made of, a file system on a disk as the
folder for temporary files and huge pages."""
_WITH_MEMORY = """\
#!/bin/sh
if [ ! -d /var/tmp ]; then
	mkdir -p /var/tmp
	busybox mke2fs -F /dev/nvme0n1 >/dev/null && mount -t ext4 /dev/nvme0n1 /var/tmp
fi
echo 8 >/proc/sys/vm/nr_hugepages
export TMPDIR=/var/tmp
exec "$@"
"""

INIT = f"""\
#!/bin/busybox sh
mount -a
mkdir /dev/pts /dev/shm
mount -a -T /etc/fstab.dev
ln -s /proc/self/fd /dev/fd
export PATH=/usr/bin:/bin HOME={HOME} TERM=linux LANG=C.UTF-8
cd {HOME}
tries=0
while ! [ -e /dev/vport0p3 ]; do
	tries=$((tries + 1))
	if [ $tries = 60 ]; then
		echo "{LOST} the kernel has no virtio console (CONFIG_VIRTIO_PCI, CONFIG_VIRTIO_CONSOLE)"
		poweroff -f
	fi
	usleep 30000
done
exec 3<>/dev/vport0p1 4<>/dev/vport0p2 5>/dev/vport0p3
read -r release </proc/sys/kernel/osrelease
: >{BOOTED}
echo "ready $release" >&3
exec sh <&3
"""


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


APPLETS = _names(
    "[ awk basename cat chmod cmp cp cut date dd df diff dirname dmesg du env expr false find free "
    "grep gunzip gzip head hexdump hostname id insmod kill killall less ln ls lsmod md5sum mkdir "
    "mkfifo mknod more mount mv nproc od pgrep pidof ping printenv printf ps pwd readlink realpath "
    "rm rmdir sed seq sha256sum sleep sort stat stty sync sysctl tail tar tee test time timeout "
    "top touch tr true tty umount uname uniq uptime vi wc which whoami xargs xxd yes"
)
"""busybox has more: these are there for programs that look for them by name."""

_LIBRARIES = {
    "libc6": ("ld-linux-aarch64.so.1", "libc.so.6", "libm.so.6"),
    "libgcc-s1": (
        "libgcc_s.so.1",
    ),  # pthread_exit(3), which ends Python's daemon threads, loads it
    "zlib1g": ("libz.so.1",),
    "libexpat1": ("libexpat.so.1",),
    r"libffi\d+": ("libffi.so.*",),
}
"""By the package's name, a pattern; the files by their patterns."""

_WITHOUT = _names(
    "__phello__ _pyrepl asyncio curses dbm doctest.py email ensurepip ftplib.py html http "
    "idlelib imaplib.py mailbox.py nntplib.py pdb.py pickletools.py plistlib.py poplib.py pydoc.py "
    "pydoc_data smtplib.py sqlite3 ssl.py test tkinter tomllib turtle.py turtledemo venv "
    "webbrowser.py wsgiref xml xmlrpc zoneinfo"
)
"""Top-level names of the standard library that stay out."""
_ENCODINGS = _names(
    "__init__ aliases ascii cp437 idna latin_1 raw_unicode_escape unicode_escape utf_16 utf_16_le "
    "utf_32 utf_8 utf_8_sig"
)
_EXTENSIONS = _names(
    "_contextvars _ctypes _decimal _multiprocessing _posixshmem _queue mmap readline resource "
    "termios"
)


def python_name(names: list[str]) -> str:
    """The newest Python among package names, such as "python3.13". Raises DebianError."""
    found = [int(match[1]) for name in names if (match := re.fullmatch(r"python3\.(\d+)", name))]
    if not found:
        raise DebianError("Debian has no Python 3 for this architecture")
    return f"python3.{max(found)}"


def build(packages: Packages, progress: Progress) -> tuple[Archive, str]:
    """The root without this package, and its Python's name.

    Raises DebianError, OSError.
    """

    def unpack(name: str) -> Path:
        progress(f"fetching the Debian package {name}")
        return packages.unpack(name)

    progress("asking for Debian's packages")
    names = packages.names()
    python = python_name(names)
    archive = busybox_root(packages.busybox().read_bytes(), init=INIT)
    archive.file("/etc/fstab", FSTAB)
    archive.file("/etc/fstab.dev", FSTAB_DEV)
    archive.folder("/run")
    archive.link("/lib", "usr/lib")
    for applet in APPLETS:
        archive.link(f"/bin/{applet}", "busybox")
    for pattern, files in _LIBRARIES.items():
        found = [name for name in names if re.fullmatch(pattern, name)]
        if not found:
            raise DebianError(f"Debian has no package {pattern} for this architecture")
        folder = unpack(max(found, key=lambda name: (len(name), name)))
        for file in files:
            _add_library(archive, folder / LIBRARY, file)
    archive.link("/usr/lib/ld-linux-aarch64.so.1", "aarch64-linux-gnu/ld-linux-aarch64.so.1")
    program = unpack(f"{python}-minimal") / "usr/bin" / python
    archive.file(f"/usr/bin/{python}", program.read_bytes(), 0o755)
    archive.link("/usr/bin/python3", python)
    archive.link("/usr/bin/python", python)
    for part in ("minimal", "stdlib"):
        folder = unpack(f"lib{python}-{part}") / "usr/lib" / python
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if path.is_file() and _wanted(inside.parts):
                archive.file(f"/usr/lib/{python}/{inside}", path.read_bytes())
    archive.file(f"/usr/bin/{WITH_MEMORY}", _WITH_MEMORY, 0o755)
    archive.file("/usr/bin/pkvm", '#!/bin/sh\nexec python3 -m pkvm "$@"\n', 0o755)
    return archive, python


def _add_library(archive: Archive, folder: Path, pattern: str) -> None:
    found = sorted(folder.glob(pattern))
    if not found:
        raise DebianError(f"{folder} holds no {pattern}")
    for path in found:
        if path.is_symlink():
            target = path.readlink()
            archive.link(f"/{LIBRARY}/{path.name}", str(target))
            path = path.parent / target
        archive.file(f"/{LIBRARY}/{path.name}", path.read_bytes(), 0o755)


def _wanted(parts: tuple[str, ...]) -> bool:
    """Whether a file of the standard library goes in."""
    if parts[0] == "lib-dynload":
        return parts[-1].split(".")[0] in _EXTENSIONS
    if parts[0] == "encodings":
        return parts[-1].removesuffix(".py") in _ENCODINGS
    return parts[0] not in _WITHOUT and not parts[0].startswith("_sysconfigdata__linux")
