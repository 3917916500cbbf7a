# SPDX-License-Identifier: GPL-2.0-or-later
"""What emulated test beds are made of, in the user's cache: kernels, root file systems, bytecode.

Python in an emulated machine takes seconds to compile what it imports. Only a Python of that
version can compile, so the machine does it once, and what it wrote is kept by what it came from.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
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

    def kernel(self, name: str, progress: Progress) -> Path:
        """The image of a Debian series such as "7.3", fetched if need be, or the file `name`."""
        if not _SERIES.fullmatch(name):
            if not Path(name).is_file():
                raise BedError(
                    f"{name} is no kernel: name a file (an arm64 Image), or a Debian series "
                    f"such as {KERNEL}"
                )
            return Path(name)
        target = self.folder / f"kernel-{name}"
        with self._held():
            if not target.is_dir():
                progress(f"fetching Debian's kernel {name}")
                image = Packages().kernel(name)
                with cache.making(target) as partial:
                    shutil.copyfile(image, partial / "Image")
        return target / "Image"

    def root(self, progress: Progress) -> Root:
        """The root file system, made if need be."""
        target = self.folder / f"root-{_recipe()}"
        with self._held():
            if not target.is_dir():
                archive, python = root.build(Packages(), progress)
                sources = {
                    path: digest(path, data)
                    for path, data in archive.files().items()
                    if path.endswith(".py")
                }
                with cache.making(target) as partial:
                    (partial / "root.cpio").write_bytes(archive.cpio())
                    facts = {"python": python, "sources": sources}
                    (partial / "root.json").write_text(json.dumps(facts))
            facts = json.loads((target / "root.json").read_text())
        return Root(target / "root.cpio", facts["python"], facts["sources"])

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
        return (self._bytecode(python) / "library").exists()

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

    def mark_compiled(self, python: str) -> None:
        """The standard library was compiled."""
        folder = self._bytecode(python)
        with self._held():
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / "library", b"")

    def clean(self) -> None:
        """Remove all of it but Debian's packages, which other things use too."""
        shutil.rmtree(self.folder, ignore_errors=True)

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


def _write(path: Path, data: bytes) -> None:
    """Write a file that appears whole."""
    partial = path.with_name(f".making-{os.getpid()}-{path.name}")
    try:
        partial.write_bytes(data)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
