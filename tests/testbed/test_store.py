# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytecode is kept by what it came from, and found again only for that."""

from __future__ import annotations

import io
import os
import tarfile
import time
from pathlib import Path

import pytest

from pkvm.testbed import store
from pkvm.testbed.base import BedError
from pkvm.testbed.store import Store, bytecode_path, digest

PYTHON = "python3.13"
SOURCE = "/usr/lib/python3/dist-packages/pkvm/fdt.py"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    monkeypatch.setenv("PKVM_CACHE", str(tmp_path))
    return Store()


def tar(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def test_python_finds_bytecode_where_we_put_it() -> None:
    assert bytecode_path("/a/b.c.py", PYTHON) == "/a/__pycache__/b.c.cpython-313.pyc"


def test_bytecode_belongs_to_a_source(kept: Store) -> None:
    sources = {SOURCE: digest(SOURCE, b"1 + 1")}
    pyc = bytecode_path(SOURCE, PYTHON)
    kept.keep(tar({pyc.lstrip("/"): b"code", "usr/bin/pkvm": b"no code"}), sources, PYTHON)
    assert kept.compiled(sources, PYTHON) == {pyc: b"code"}
    assert kept.compiled({SOURCE: digest(SOURCE, b"1 + 2")}, PYTHON) == {}
    assert kept.compiled(sources, "python3.14") == {}
    elsewhere = f"{SOURCE}/other.py"
    assert kept.compiled({elsewhere: digest(elsewhere, b"1 + 1")}, PYTHON) == {}


def test_the_library_is_marked_once_compiled(kept: Store) -> None:
    assert not kept.is_compiled(PYTHON)
    kept.mark_compiled(PYTHON)
    assert kept.is_compiled(PYTHON)
    assert not kept.is_compiled("python3.14")


def test_bytecode_of_sources_long_gone_goes(kept: Store, tmp_path: Path) -> None:
    old, new = {SOURCE: digest(SOURCE, b"old")}, {SOURCE: digest(SOURCE, b"new")}
    pyc = bytecode_path(SOURCE, PYTHON)
    kept.keep(tar({pyc: b"1"}), old, PYTHON)
    kept.mark_compiled(PYTHON)
    kept.keep(tar({pyc: b"2"}), new, PYTHON)
    assert kept.compiled(old, PYTHON) == {pyc: b"1"}
    long_ago = time.time() - (store.UNUSED_DAYS + 1) * 86400
    for path in tmp_path.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    kept.keep(tar({}), new, PYTHON)
    assert kept.compiled(old, PYTHON) == {}
    assert kept.compiled(new, PYTHON) == {pyc: b"2"}
    assert kept.is_compiled(PYTHON)


def test_a_cache_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PKVM_CACHE", str(tmp_path / "file"))
    with pytest.raises(BedError, match=r"the cache .*/file/testbed is of no use: Not a directory"):
        Store().mark_compiled(PYTHON)
