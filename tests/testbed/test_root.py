# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes into the root, from packages made of a few files; that it boots is test_bed's part."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkvm.testbed import root
from pkvm.testbed.base import silent
from pkvm.testbed.debian import DebianError, Packages

LIBRARIES = {
    "libc6": ("ld-linux-aarch64.so.1", "libc.so.6", "libm.so.6"),
    "libgcc-s1": ("libgcc_s.so.1",),
    "zlib1g": ("libz.so.1.3.1",),
    "libexpat1": ("libexpat.so.1",),
    "libffi7": ("libffi.so.7",),
    "libffi10": ("libffi.so.10",),
}


class FakePackages(Packages):
    """Packages that are there already."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name, files in LIBRARIES.items():
            for file in files:
                self.write(name, f"{root.LIBRARY}/{file}")
        (folder / "zlib1g" / root.LIBRARY / "libz.so.1").symlink_to("libz.so.1.3.1")
        for python in ("python3.9", "python3.13"):
            self.write(f"{python}-minimal", f"usr/bin/{python}")
            for part, files in (
                ("minimal", ("os.py", "encodings/utf_8.py", "encodings/big5.py")),
                ("stdlib", ("json/decoder.py", "test/test_os.py", "asyncio/base.py",
                            "lib-dynload/_ctypes.cpython-313-aarch64-linux-gnu.so",
                            "lib-dynload/_curses.cpython-313-aarch64-linux-gnu.so")),
            ):  # fmt: skip
                for file in files:
                    self.write(f"lib{python}-{part}", f"usr/lib/{python}/{file}")
        self.write("busybox-static", "usr/bin/busybox")

    def write(self, package: str, path: str) -> None:
        file = self.folder / package / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{package} {path}")

    def names(self) -> list[str]:
        return [path.name for path in self.folder.iterdir()] + ["python3.13", "python3.9"]

    def unpack(self, name: str) -> Path:
        return self.folder / name


def test_what_is_needed_goes_in_and_no_more(tmp_path: Path) -> None:
    archive, python = root.build(FakePackages(tmp_path), silent)
    assert python == "python3.13"
    files = archive.files()
    library = {path for path in files if path.startswith("/usr/lib/python3.13/")}
    assert {path.removeprefix("/usr/lib/python3.13/") for path in library} == {
        "os.py", "encodings/utf_8.py", "json/decoder.py",
        "lib-dynload/_ctypes.cpython-313-aarch64-linux-gnu.so",
    }  # fmt: skip
    assert files["/usr/bin/python3.13"] == b"python3.13-minimal usr/bin/python3.13"
    assert f"/{root.LIBRARY}/libz.so.1.3.1" in files
    assert f"/{root.LIBRARY}/libffi.so.10" in files
    assert f"/{root.LIBRARY}/libffi.so.7" not in files
    assert b"busybox" in files["/bin/busybox"]
    assert files["/init"].decode() == root.INIT


def test_a_package_that_lacks_its_library(tmp_path: Path) -> None:
    packages = FakePackages(tmp_path)
    (tmp_path / "libexpat1" / root.LIBRARY / "libexpat.so.1").unlink()
    with pytest.raises(DebianError, match=r"holds no libexpat\.so\.1"):
        root.build(packages, silent)


def test_no_python() -> None:
    with pytest.raises(DebianError, match="no Python 3"):
        root.python_name(["python2.7", "python3-all", "libpython3.13"])
