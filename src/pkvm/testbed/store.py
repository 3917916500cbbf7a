# SPDX-License-Identifier: GPL-2.0-or-later
"""What emulated test beds are made of, in the user's cache: kernels, root file systems, bytecode.

Python in an emulated machine takes seconds to compile what it imports. Only a Python of that
version can compile, so the machine does it once, and what it wrote is kept by what it came from.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pkvm.testbed import cache, root
from pkvm.testbed.base import BedError, Progress
from pkvm.testbed.debian import DebianError, Packages
from pkvm.testbed.initramfs import Archive

KERNEL = "7.3"
"""The Debian kernel series that a bed has unless another is named."""

UNUSED_DAYS = 7
"""What other versions of this package made is kept for so long."""

_LIBRARY = "library"
"""The mark that the standard library was compiled."""
_MAGIC = b"ARM\x64"
"""At byte 56 of an Image (the kernel's Documentation/arch/arm64/booting.rst)."""
_GZIP = b"\x1f\x8b"
_SERIES = re.compile(r"\d+\.\d+")


def digest(path: str, data: bytes) -> str:
    """The name under which bytecode of this source at this path is kept."""
    return hashlib.sha256(path.encode() + b"\0" + data).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Root:
    """A root file system in the cache."""

    archive: Path
    python: str
    """Its Python's name, such as "python3.13"."""
    sources: dict[str, str]
    """The digest of each Python source in it by its path."""


class Store:
    """The cache's part for test beds. Its methods raise BedError."""

    def __init__(self) -> None:
        self.folder = cache.root() / "testbed"

    def kernel(self, name: str, progress: Progress, *, anew: bool = False) -> Path:
        """The image of a Debian series such as "7.3", fetched if need be, or the file `name`.

        `anew` fetches the newest and replaces what is there.
        """
        if not _SERIES.fullmatch(name):
            return _image(Path(name))
        target = self.folder / f"kernel-{name}"
        with self._held():
            if anew or not target.is_dir():
                progress(f"fetching Debian's kernel {name}")
                packages = Packages()
                if anew:
                    packages.refresh()
                image = packages.kernel(name)
                _remove(target)
                with cache.making(target) as partial:
                    shutil.copyfile(image, partial / "Image")
        return target / "Image"

    def root(self, progress: Progress, *, anew: bool = False) -> Root:
        """The root file system, made if need be; `anew` replaces what is there."""
        target = self.folder / f"root-{_recipe()}"
        with self._held():
            if anew or not target.is_dir():
                self._make_root(target, progress)
            facts = json.loads((target / "root.json").read_text())
        return Root(target / "root.cpio", facts["python"], facts["sources"])

    def _make_root(self, target: Path, progress: Progress) -> None:
        archive, python = root.build(Packages(), progress)
        sources = {
            path: digest(path, data)
            for path, data in archive.files().items()
            if path.endswith(".py")
        }
        _remove(target)
        for old in (*self.folder.glob("root-*"), *self.folder.glob("compiled-*")):
            if _is_old(old):
                _remove(old)
        with cache.making(target) as partial:
            (partial / "root.cpio").write_bytes(archive.cpio())
            facts = {"python": python, "sources": sources}
            (partial / "root.json").write_text(json.dumps(facts))

    def compiled(self, sources: Mapping[str, str], python: str) -> dict[str, bytes]:
        """What bytecode there is for sources, given by path and digest; by its own path."""
        folder = self._bytecode(python)
        found = {}
        for path, name in sources.items():
            try:
                found[bytecode_path(path, python)] = (folder / name).read_bytes()
            except FileNotFoundError:
                continue
        return found

    def is_compiled(self, python: str) -> bool:
        """Whether the standard library was compiled."""
        return (self._bytecode(python) / _LIBRARY).exists()

    def keep(self, tar: bytes, sources: Mapping[str, str], python: str) -> None:
        """Keep the bytecode in a tar archive, as far as it belongs to sources."""
        owners = {bytecode_path(path, python): name for path, name in sources.items()}
        folder = self._bytecode(python)
        with self._held():
            folder.mkdir(parents=True, exist_ok=True)
            with tarfile.open(fileobj=io.BytesIO(tar)) as files:
                for member in files:
                    name = owners.get(f"/{member.name.lstrip('/')}")
                    content = files.extractfile(member) if member.isfile() else None
                    if name is not None and content is not None:
                        _write(folder / name, content.read())
            wanted = {*owners.values(), _LIBRARY}
            for path in folder.iterdir():
                if path.name not in wanted and _is_old(path):
                    path.unlink()

    def mark_compiled(self, python: str) -> None:
        """The standard library was compiled."""
        folder = self._bytecode(python)
        with self._held():
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / _LIBRARY, b"")

    def clean(self) -> None:
        """Remove all of it but Debian's packages, which other things use too."""
        if self.folder.is_dir():
            with self._held():
                for path in self.folder.iterdir():
                    _remove(path)

    def _bytecode(self, python: str) -> Path:
        return self.folder / f"compiled-{python}-{_recipe()}"

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The store for this process alone; errors on the way become BedErrors."""
        try:
            with cache.lock(self.folder):
                yield
        except DebianError as error:
            raise BedError(str(error)) from error
        except OSError as error:
            raise BedError(f"the cache {self.folder} is of no use: {error.strerror}") from error


def _image(path: Path) -> Path:
    """`path`, if that looks like a kernel. Raises BedError."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise BedError(
            f"{path} is no kernel: {error.strerror}; name a file, or a Debian series such as "
            f"{KERNEL}"
        ) from error
    if head[56:60] != _MAGIC and not head.startswith(_GZIP):
        raise BedError(f"{path} is no kernel: QEMU boots an arm64 Image, plain or gzipped")
    return path


def bytecode_path(source: str, python: str) -> str:
    """Where Python keeps the bytecode of a source (PEP 3147)."""
    path = PurePosixPath(source)
    tag = python.replace("python", "cpython-").replace(".", "")
    return str(path.parent / "__pycache__" / f"{path.stem}.{tag}.pyc")


def overlay(files: Mapping[str, bytes]) -> bytes:
    """An initramfs archive that adds files to a root."""
    archive = Archive()
    for path, data in files.items():
        archive.file(path, data)
    return archive.cpio()


def _recipe() -> str:
    """Another name for every other way to build the root."""
    text = Path(root.__file__).read_bytes() + Path(__file__).with_name("initramfs.py").read_bytes()
    return hashlib.sha256(text).hexdigest()[:12]


def _is_old(path: Path) -> bool:
    return path.stat().st_mtime < time.time() - UNUSED_DAYS * 86400


def _remove(path: Path) -> None:
    """Remove a file or folder, if it is there and can be."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.name != cache.LOCK:
        path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    """Write a file that appears whole, under a lock."""
    partial = path.with_name(f"{cache.PARTIAL}{path.name}")
    try:
        partial.write_bytes(data)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
