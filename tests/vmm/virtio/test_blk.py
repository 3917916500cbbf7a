# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio-blk against a file: what is written is read again, what cannot be is an I/O error and a
line in the report."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.virtio_driver import Driver, Rig
from pkvm.vmm.errors import LoadError
from pkvm.vmm.virtio import blk
from pkvm.vmm.virtio.blk import S_IOERR, S_OK, S_UNSUPP, Block
from pkvm.vmm.virtio.disk import Disk

SECTORS = 64
CONTENT = b"".join(n.to_bytes(4, "little") * 128 for n in range(SECTORS))


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


class Blk:
    """A driver of a disk of 64 sectors in a file."""

    def __init__(self, path: Path, *, read_only: bool = False, features: int = -1) -> None:
        self.path = path
        path.write_bytes(CONTENT)
        self.disk = Disk(str(path), read_only=read_only)
        self.rig = Rig(Block(self.disk, identity="a-disk"))
        self.driver = Driver(self.rig, features=features)

    def do(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> tuple[int, bytes]:
        """A request; its status and what it read."""
        readable = [header(kind, sector), data] if data else [header(kind, sector)]
        used = self.driver.request(readable, [room, 1] if room else [1])
        return used.data[-1], used.data[:-1]

    def read(self, sector: int, length: int) -> bytes:
        status, data = self.do(blk.T_IN, sector, room=length)
        assert status == S_OK
        return data

    def write(self, sector: int, data: bytes) -> int:
        return self.do(blk.T_OUT, sector, data)[0]

    def clear(self, kind: int, *segments: tuple[int, int, int]) -> int:
        data = b"".join(struct.pack("<QII", *segment) for segment in segments)
        return self.do(kind, 0, data)[0]

    def content(self) -> bytes:
        return self.path.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.img"


@pytest.fixture
def disk(path: Path) -> Iterator[Blk]:
    rig = Blk(path)
    yield rig
    rig.rig.device.close()


def test_the_configuration_says_what_the_disk_has(disk: Blk) -> None:
    read = disk.rig.device.read
    assert read(0x100, 8) == SECTORS
    assert read(0x100 + 12, 4) == 254  # seg_max
    assert read(0x100 + 20, 4) == 512  # blk_size
    assert [read(0x100 + at, n) for at, n in ((24, 1), (25, 1), (26, 2), (28, 4))] == [
        3,
        0,
        8,
        2048,
    ]
    assert read(0x100 + 32, 1) == 1  # writeback
    assert read(0x100 + 34, 2) == 1  # num_queues
    assert read(0x100 + 44, 4) == 8  # discard_sector_alignment
    assert read(0x100 + 56, 1) == 1  # write_zeroes_may_unmap


def test_what_is_written_is_read_again(disk: Blk) -> None:
    assert disk.read(0, 512 * SECTORS) == CONTENT
    data = os.urandom(4096)
    assert disk.write(7, data) == S_OK
    assert disk.read(7, 4096) == data
    assert disk.read(6, 512) == CONTENT[6 * 512 : 7 * 512]
    assert disk.do(blk.T_FLUSH) == (S_OK, b"")
    assert disk.content() == CONTENT[: 7 * 512] + data + CONTENT[15 * 512 :]


def test_parts_of_a_request_may_lie_anyhow(disk: Blk) -> None:
    used = disk.driver.request([header(0, 3)[:5], header(0, 3)[5:]], [100, 412, 511, 2])
    assert used == (1025, CONTENT[3 * 512 : 5 * 512] + b"\0")
    data = os.urandom(512)
    used = disk.driver.request([header(1, 3) + data[:100], data[100:]], [1])
    assert used == (1, b"\0")
    assert disk.read(3, 512) == data


def test_a_large_request_is_done_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blk, "PIECE", 1000)
    rig = Blk(tmp_path / "disk.img")
    data = os.urandom(10 * 512)
    assert rig.write(5, data) == S_OK
    assert rig.read(5, 5120) == data
    assert rig.content() == CONTENT[: 5 * 512] + data + CONTENT[15 * 512 :]
    rig.disk.close()


def test_the_id_is_what_it_was_given(disk: Blk) -> None:
    assert disk.do(blk.T_GET_ID, room=20) == (S_OK, b"a-disk".ljust(20, b"\0"))
    assert disk.do(blk.T_GET_ID, room=4) == (S_OK, b"a-di")


def test_many_requests_in_one_notification(disk: Blk) -> None:
    for n in range(5):
        disk.driver.add([header(blk.T_IN, n)], [512, 1])
    disk.driver.notify()
    back = disk.driver.collect()
    assert [used.data for used in back] == [CONTENT[n * 512 :][:512] + b"\0" for n in range(5)]
    assert disk.rig.wire.raised == 1


class TestClearing:
    def test_discarded_sectors_may_have_any_content_and_the_others_keep_theirs(
        self, disk: Blk
    ) -> None:
        assert disk.clear(blk.T_DISCARD, (8, 8, 0), (24, 8, 0)) == S_OK
        content = disk.content()
        assert len(content) == len(CONTENT)
        for first, end in ((0, 8), (16, 24), (32, SECTORS)):
            assert content[first * 512 : end * 512] == CONTENT[first * 512 : end * 512]

    @pytest.mark.parametrize("flags", [0, 1])
    def test_zeroes(self, disk: Blk, flags: int) -> None:
        assert disk.clear(blk.T_WRITE_ZEROES, (3, 2, flags), (8, 16, flags)) == S_OK
        wanted = bytearray(CONTENT)
        wanted[3 * 512 : 5 * 512] = bytes(1024)
        wanted[8 * 512 : 24 * 512] = bytes(8192)
        assert disk.content() == wanted

    def test_zeroes_where_no_hole_can_be_made(
        self, disk: Blk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Disk, "_punch", lambda *_: False)
        assert disk.clear(blk.T_WRITE_ZEROES, (3, 2, 1)) == S_OK
        assert disk.content() == CONTENT[: 3 * 512] + bytes(1024) + CONTENT[5 * 512 :]
        assert disk.clear(blk.T_DISCARD, (0, SECTORS, 0)) == S_OK
        assert disk.read(0, 512) == CONTENT[:512]

    @pytest.mark.parametrize("kind", [blk.T_DISCARD, blk.T_WRITE_ZEROES])
    @pytest.mark.parametrize(
        ("segments", "status"),
        [
            ([(SECTORS - 1, 2, 0)], S_IOERR),
            ([(1 << 63, 1, 0)], S_IOERR),
            ([((1 << 64) - 1, 0xFFFF_FFFF, 0)], S_IOERR),
            ([(0, 1, 0), (SECTORS, 1, 0)], S_IOERR),
            ([(0, 1, 2)], S_UNSUPP),
            ([(0, 1, 0)] * 17, S_IOERR),
            ([], S_IOERR),
        ],
    )
    def test_bad_segments_change_nothing(
        self, disk: Blk, kind: int, segments: list[tuple[int, int, int]], status: int
    ) -> None:
        assert disk.clear(kind, *segments) == status
        assert disk.content() == CONTENT

    def test_bad_length(self, disk: Blk) -> None:
        assert disk.do(blk.T_DISCARD, 0, bytes(15))[0] == S_IOERR

    def test_discard_has_no_flags(self, disk: Blk) -> None:
        assert disk.clear(blk.T_DISCARD, (0, 1, 1)) == S_UNSUPP


class TestBadRequests:
    @pytest.mark.parametrize(
        ("sector", "room"), [(SECTORS, 512), (SECTORS - 1, 1024), (0, 511), ((1 << 64) - 1, 512)]
    )
    def test_bad_read(self, disk: Blk, sector: int, room: int) -> None:
        status, data = disk.do(blk.T_IN, sector, room=room)
        assert status == S_IOERR
        assert not any(data)
        assert "not whole sectors" in disk.rig.report()

    @pytest.mark.parametrize(("sector", "length"), [(SECTORS, 512), (1 << 55, 512), (0, 513)])
    def test_bad_write(self, disk: Blk, sector: int, length: int) -> None:
        assert disk.write(sector, bytes(length)) == S_IOERR
        assert disk.content() == CONTENT

    @pytest.mark.parametrize("kind", [2, 5, 7, 10, 14, 0xFFFF_FFFF])
    def test_bad_kind(self, disk: Blk, kind: int) -> None:
        assert disk.do(kind)[0] == S_UNSUPP

    def test_bad_header(self, disk: Blk) -> None:
        disk.driver.add([header(0)[:15]], [513])
        disk.driver.notify()
        assert disk.rig.needs_reset
        assert "header has 15 bytes" in disk.rig.report()

    def test_bad_no_room_for_a_status(self, disk: Blk) -> None:
        disk.driver.add([header(1), bytes(512)])
        disk.driver.notify()
        assert disk.rig.needs_reset
        assert disk.content() == CONTENT

    def test_a_private_buffer_is_an_io_error_that_is_named(self, disk: Blk) -> None:
        page = disk.driver.take(0) // 4096
        disk.rig.ram.private.update((page + 1, page + 2))  # the buffer, behind the header's page
        disk.driver.add([header(blk.T_IN)], [512, 1])
        disk.rig.ram.private.remove(page + 2)  # the status
        disk.driver.notify()
        (used,) = disk.driver.collect()
        assert used.data == bytes(512) + bytes((S_IOERR,))
        assert used.length == 0
        assert not disk.rig.needs_reset
        assert f"queue requests at {0x4000_0000 + (page + 1) * 4096:#x}: the page is private" in (
            disk.rig.report()
        )
        disk.rig.ram.private.clear()
        assert disk.read(0, 512) == CONTENT[:512]


class TestTroubleWithTheFile:
    def test_a_full_disk(self, disk: Blk, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(fd: int, data: bytes, offset: int) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwrite", full)
        assert disk.write(0, bytes(512)) == S_IOERR
        assert "the disk failed: No space left on device" in disk.rig.report()
        monkeypatch.undo()
        assert disk.write(0, bytes(512)) == S_OK

    def test_writes_may_be_partial(self, disk: Blk, monkeypatch: pytest.MonkeyPatch) -> None:
        pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:100], at))
        data = os.urandom(1024)
        assert disk.write(1, data) == S_OK
        assert disk.read(1, 1024) == data

    def test_reads_may_be_partial(self, disk: Blk, monkeypatch: pytest.MonkeyPatch) -> None:
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda fd, length, at: pread(fd, min(length, 100), at))
        assert disk.read(1, 1024) == CONTENT[512 : 3 * 512]

    def test_a_file_that_became_shorter(self, disk: Blk) -> None:
        os.truncate(disk.path, 1024)
        assert disk.do(blk.T_IN, 1, room=1024)[0] == S_IOERR
        assert "shorter" in disk.rig.report()
        assert disk.read(0, 1024) == CONTENT[:1024]

    def test_a_flush_that_fails(self, disk: Blk, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(fd: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fdatasync", fail)
        assert disk.do(blk.T_FLUSH)[0] == S_IOERR

    def test_without_flush_a_write_is_flushed(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flushed: list[int] = []
        monkeypatch.setattr(os, "fdatasync", flushed.append)
        for features, times in ((-1, 0), (~blk.F_FLUSH, 1)):
            disk = Blk(path, features=features)
            assert disk.write(0, bytes(512)) == S_OK
            assert len(flushed) == times
            disk.disk.close()


class TestReadOnly:
    @pytest.fixture
    def disk(self, path: Path) -> Iterator[Blk]:
        rig = Blk(path, read_only=True)
        yield rig
        rig.disk.close()

    def test_it_is_offered_as_such(self, disk: Blk) -> None:
        assert disk.driver.features & blk.F_RO
        assert not disk.driver.features & (blk.F_DISCARD | blk.F_WRITE_ZEROES)

    def test_nothing_can_be_written(self, disk: Blk) -> None:
        assert disk.write(0, bytes(512)) == S_IOERR
        assert disk.clear(blk.T_DISCARD, (0, 1, 0)) == S_IOERR
        assert disk.clear(blk.T_WRITE_ZEROES, (0, 1, 0)) == S_IOERR
        assert disk.content() == CONTENT
        assert disk.read(1, 512) == CONTENT[512:1024]
        assert "read-only" in disk.rig.report()


class TestFiles:
    def test_bad_size(self, tmp_path: Path) -> None:
        (tmp_path / "odd").write_bytes(bytes(513))
        with pytest.raises(LoadError, match=r"has 513 bytes.*truncate -s 1024"):
            Disk(str(tmp_path / "odd"))

    def test_bad_empty(self, tmp_path: Path) -> None:
        (tmp_path / "empty").write_bytes(b"")
        with pytest.raises(LoadError, match="empty"):
            Disk(str(tmp_path / "empty"))

    def test_bad_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            Disk(str(tmp_path / "none"))

    def test_bad_directory(self, tmp_path: Path) -> None:
        with pytest.raises(LoadError, match="neither"):
            Disk(str(tmp_path), read_only=True)

    def test_bad_fifo(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(LoadError, match="neither"):
            Disk(str(tmp_path / "fifo"))

    def test_bad_not_writable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: str, flags: int) -> int:
            raise PermissionError(errno.EACCES, "Permission denied", path)

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(LoadError, match="add ,ro"):
            Disk("some.img")
        with pytest.raises(PermissionError):
            Disk("some.img", read_only=True)

    def test_bad_in_use(self, path: Path) -> None:
        path.write_bytes(CONTENT)
        first = Disk(str(path))
        for read_only in (False, True):
            with pytest.raises(LoadError, match="uses the disk"):
                Disk(str(path), read_only=read_only)
        first.close()
        readers = [Disk(str(path), read_only=True) for _ in range(2)]
        with pytest.raises(LoadError, match="uses the disk"):
            Disk(str(path))
        for reader in readers:
            reader.close()
            reader.close()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, SECTORS - 1), st.integers(1, 9)),
        st.tuples(st.just("read"), st.integers(0, SECTORS - 1), st.integers(1, 9)),
        st.tuples(st.just("zero"), st.integers(0, SECTORS - 1), st.integers(0, 9)),
        st.tuples(st.just("reset"), st.just(0), st.just(0)),
    ),
    max_size=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(steps=steps, indirect=st.booleans())
def test_the_disk_is_a_row_of_sectors(
    path: Path, steps: list[tuple[str, int, int]], indirect: bool
) -> None:
    disk = Blk(path)
    model = bytearray(CONTENT)
    try:
        for n, (step, sector, count) in enumerate(steps):
            fits = sector + count <= SECTORS
            span = slice(sector * 512, (sector + count) * 512)
            if step == "reset":
                disk.driver = Driver(disk.rig, indirect=indirect)
            elif step == "write":
                data = bytes((n + 1,)) * (count * 512)
                assert disk.write(sector, data) == (S_OK if fits else S_IOERR)
                if fits:
                    model[span] = data
            elif step == "zero":
                status = disk.clear(blk.T_WRITE_ZEROES, (sector, count, n & 1))
                assert status == (S_OK if fits else S_IOERR)
                if fits:
                    model[span] = bytes(count * 512)
            else:
                status, data = disk.do(blk.T_IN, sector, room=count * 512)
                assert status == (S_OK if fits else S_IOERR)
                assert data == (model[span] if fits else bytes(count * 512))
        assert disk.content() == model
    finally:
        disk.disk.close()
