# SPDX-License-Identifier: GPL-2.0-or-later
"""The archive, read back by a reader of its own; that a kernel takes it is tests/linux's part."""

from __future__ import annotations

import gzip
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvm.testbed.initramfs import INIT, MARKER, Archive, busybox_root, cached


@dataclass
class Entry:
    inode: int
    mode: int
    links: int
    mtime: int
    device: tuple[int, int]
    data: bytes


def read_cpio(archive: bytes) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        assert at % 4 == 0
        digits = archive[at + 6 : at + 110].decode()
        (inode, mode, uid, gid, links, mtime, size, _, _, major, minor, name_size, check) = (
            int(digits[n : n + 8], 16) for n in range(0, 104, 8)
        )
        assert (uid, gid, check) == (0, 0, 0)
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        start = at + 110 + name_size
        start += -start % 4
        entry = Entry(inode, mode, links, mtime, (major, minor), archive[start : start + size])
        at = start + size + -size % 4
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return entries
        entries[name[:-1].decode()] = entry


def test_every_kind_of_entry() -> None:
    archive = Archive()
    archive.file("/etc/motd", "good morning\n")
    archive.file("/bin/tool", b"\x7fELF", 0o755)
    archive.link("/bin/alias", "tool")
    archive.character_device("/dev/console", 5, 1)
    entries = read_cpio(archive.cpio())
    assert list(entries) == [
        "etc", "etc/motd", "bin", "bin/tool", "bin/alias", "dev", "dev/console",
    ]  # fmt: skip
    assert entries["etc"].mode == stat.S_IFDIR | 0o755
    assert (entries["etc/motd"].mode, entries["etc/motd"].data) == (
        stat.S_IFREG | 0o644,
        b"good morning\n",
    )
    assert entries["bin/tool"].mode == stat.S_IFREG | 0o755
    assert (entries["bin/alias"].mode, entries["bin/alias"].data) == (
        stat.S_IFLNK | 0o777,
        b"tool",
    )
    assert entries["dev/console"].mode == stat.S_IFCHR | 0o600
    assert entries["dev/console"].device == (5, 1)
    assert len({entry.inode for entry in entries.values()}) == len(entries)


def test_a_later_file_replaces_an_earlier_one() -> None:
    archive = Archive()
    archive.file("/init", "old")
    archive.file("init", "new", 0o755)
    entries = read_cpio(archive.cpio())
    assert {name: entry.data for name, entry in entries.items()} == {"init": b"new"}


@pytest.mark.parametrize("path", ["/", "", "/..", "/a/../b", "a/.."])
def test_a_path_that_names_no_file_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        Archive().file(path, b"")


@given(
    st.dictionaries(
        st.text("abcé /", min_size=1, max_size=12).filter(
            lambda path: path.strip("/ ") != "" and " /" not in path
        ),
        st.binary(max_size=9),
        max_size=4,
    )
)
def test_what_goes_in_comes_out(files: dict[str, bytes]) -> None:
    archive = Archive()
    expected: dict[str, bytes] = {}
    for path, data in files.items():
        name = "/".join(part for part in path.split("/") if part)
        if any(name == other or name.startswith(other + "/") for other in expected):
            continue
        if any(other.startswith(name + "/") for other in expected):
            continue
        archive.file(path, data)
        expected[name] = data
    entries = read_cpio(archive.cpio())
    found = {n: e.data for n, e in entries.items() if stat.S_ISREG(e.mode)}
    assert found == expected
    for name in entries:
        parent = name.rpartition("/")[0]
        assert not parent or list(entries).index(parent) < list(entries).index(name)


def test_the_same_content_gives_the_same_bytes() -> None:
    one, two = (busybox_root(b"program") for _ in range(2))
    assert one.gzip() == two.gzip()
    assert gzip.decompress(one.gzip()) == one.cpio()


def test_the_root_has_what_init_needs() -> None:
    entries = read_cpio(busybox_root(b"program").cpio())
    assert entries["init"].data.decode() == INIT
    assert entries["init"].mode == stat.S_IFREG | 0o755
    interpreter = INIT.split("\n", 1)[0].removeprefix("#!/").split()[0]
    assert entries[interpreter].data == b"program"
    assert stat.S_ISCHR(entries["dev/console"].mode)
    mounted = [line.split()[-1] for line in INIT.splitlines() if " mount -t" in line]
    assert {"/proc", "/sys", "/dev"} <= set(mounted)
    assert {"proc", "sys", "dev", "tmp"} <= set(entries)
    assert MARKER in INIT


def test_the_cached_one_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PKVM_CACHE", str(tmp_path / "cache"))
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"program")
    path = cached(busybox)
    assert path.read_bytes() == busybox_root(b"program").gzip()
    made = path.stat().st_mtime_ns
    assert cached(busybox) == path
    assert path.stat().st_mtime_ns == made
    busybox.write_bytes(b"another")
    assert cached(busybox) != path
