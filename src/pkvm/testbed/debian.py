# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian packages of another architecture, unpacked as files and never installed.

A private configuration of apt (apt.conf(5)) in the user's cache names the architecture, the
suites and Debian's keyring; the mirror is the one that this machine's own apt uses, or
PKVM_DEBIAN_MIRROR. What is unpacked once needs no network again.

`python -m pkvm.testbed.debian PACKAGE...` unpacks packages and prints their folders;
`python -m pkvm.testbed.debian --kernel 7.3` prints the path of a kernel image.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from pkvm.testbed import cache
from pkvm.testbed.child import bound

ARCHITECTURE = "arm64"
SUITES = ("trixie", "trixie-backports")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
LISTS_DAYS = 7
"""Package lists older than this are fetched again, if there is a network."""

LISTS_BYTES = 200 << 20
"""Room that the lists need while they are fetched."""
TOOL_SECONDS = 1800
"""No tool of apt's may take longer."""

_TOOLS = {"apt-get": "apt", "apt-cache": "apt", "dpkg": "dpkg", "dpkg-deb": "dpkg"}


class DebianError(Exception):
    """A package cannot be had; the text says what is missing and what to do."""


class Packages:
    """The packages of one architecture in some suites, as folders of unpacked files.

    `folder` holds everything: apt's configuration and lists, and a folder for each package.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        architecture: str = ARCHITECTURE,
        suites: tuple[str, ...] = SUITES,
    ) -> None:
        self.folder = folder or cache.root() / "debian" / architecture
        self.architecture = architecture
        self.suites = suites
        self._apt = self.folder / "apt"
        self._ready = False

    def unpack(self, name: str) -> Path:
        """The folder with the files of package `name`, the newest version of all suites.

        Raises DebianError.
        """
        with self._held():
            try:
                return self._unpack(name)
            except DebianError:
                # An archive keeps no superseded version: the lists may be out of date.
                if not self._refresh(older_than_days=0):
                    raise
                return self._unpack(name)

    def refresh(self) -> None:
        """Fetch the lists of packages again, if there is a network. Raises DebianError."""
        with self._held():
            self._refresh(older_than_days=0)

    def names(self) -> list[str]:
        """The names of all packages. Raises DebianError."""
        with self._held():
            return self._tool("apt-cache", "pkgnames").split()

    def kernel(self, series: str, flavour: str = "cloud-arm64") -> Path:
        """The kernel image of the newest package of `series`, such as "7.3", in `flavour`.

        It is what Debian calls vmlinuz; on arm64 a plain Image. Newer packages have it in
        linux-binary-*, older ones in linux-image-*. Raises DebianError.
        """
        names = self.names()
        for kind in ("linux-binary", "linux-image"):
            pattern = rf"{kind}-{re.escape(series)}(?:[.+].*)?-{re.escape(flavour)}"
            if found := [name for name in names if re.fullmatch(pattern, name)]:
                break
        else:
            raise DebianError(
                f"Debian has no kernel {series} {flavour} for {self.architecture} in "
                + ", ".join(self.suites)
            )
        name = max(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
        folder = self.unpack(name)
        for pattern in ("usr/lib/modules/*/vmlinuz", "lib/modules/*/vmlinuz", "boot/vmlinuz-*"):
            for image in sorted(folder.glob(pattern)):
                return image
        raise DebianError(f"{name} holds no kernel image")

    def busybox(self) -> Path:
        """The static busybox. Raises DebianError."""
        folder = self.unpack("busybox-static")
        for path in ("usr/bin/busybox", "bin/busybox"):
            if (folder / path).is_file():
                return folder / path
        raise DebianError("busybox-static holds no busybox")

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The folder ready, and for this process alone. Raises DebianError."""
        try:
            with cache.lock(self.folder):
                self._prepare()
                yield
        except OSError as error:
            raise DebianError(f"the cache {self.folder} is of no use: {error.strerror}") from error

    def _unpack(self, name: str) -> Path:
        version = self._candidate(name)
        folder = self.folder / "packages" / f"{name}_{quote(version, safe='+~.')}"
        if folder.is_dir():
            return folder
        downloads = self._apt / "downloads"
        shutil.rmtree(downloads, ignore_errors=True)
        downloads.mkdir(parents=True)
        try:
            self._tool("apt-get", "download", f"{name}={version}", folder=downloads)
            files = list(downloads.glob("*.deb"))
            if len(files) != 1:
                raise DebianError(f"apt-get downloaded no file for {name}")
            with cache.making(folder) as partial:
                self._tool("dpkg-deb", "--extract", str(files[0]), str(partial))
        finally:
            shutil.rmtree(downloads, ignore_errors=True)
        return folder

    def _candidate(self, name: str) -> str:
        """The newest version of package `name` in all suites."""
        table = self._tool("apt-cache", "madison", name)  # name | version | archive
        if not table:
            raise DebianError(
                f"Debian has no package {name} for {self.architecture} in {', '.join(self.suites)}"
            )
        newest, *versions = [line.split("|")[1].strip() for line in table.splitlines()]
        for version in versions:
            newer = subprocess.run(
                ("dpkg", "--compare-versions", version, "gt", newest), check=False
            )
            newest = version if newer.returncode == 0 else newest
        return newest

    def _prepare(self) -> None:
        """Write apt's configuration and see to it that there are lists. Raises DebianError."""
        if self._ready:
            return
        for tool, package in _TOOLS.items():
            if shutil.which(tool) is None:
                raise DebianError(f"{tool} is missing (Debian package {package})")
        if not KEYRING.is_file():
            raise DebianError(f"{KEYRING} is missing (Debian package debian-archive-keyring)")
        for folder in ("lists/partial", "archives/partial"):
            (self._apt / folder).mkdir(parents=True, exist_ok=True)
        (self._apt / "status").touch()
        (self._apt / "apt.conf").write_text(self._configuration())
        wanted = "".join(
            f"deb [arch={self.architecture} signed-by={KEYRING}] {mirror()} {suite} main\n"
            for suite in self.suites
        )
        sources = self._apt / "sources.list"
        if not sources.is_file() or sources.read_text() != wanted:
            (self._apt / "updated").unlink(missing_ok=True)
            sources.write_text(wanted)
        self._refresh(older_than_days=LISTS_DAYS)
        self._ready = True

    def _configuration(self) -> str:
        """What differs from the machine's own configuration, which is read before it."""
        return "".join(
            f"{line};\n"
            for line in (
                f'APT::Architecture "{self.architecture}"',
                "#clear APT::Architectures",
                f'APT::Architectures {{ "{self.architecture}"; }}',
                # No other user need be able to write into the cache.
                'APT::Sandbox::User ""',
                'Acquire::Languages "none"',
                'Acquire::Retries "2"',
                f'Dir::State "{self._apt}"',
                'Dir::State::Lists "lists"',
                f'Dir::State::status "{self._apt}/status"',
                f'Dir::Cache "{self._apt}"',
                'Dir::Cache::pkgcache "packages.bin"',
                'Dir::Cache::srcpkgcache "sources.bin"',
                "#clear APT::Update::Post-Invoke",
                f'Dir::Etc::SourceList "{self._apt}/sources.list"',
                'Dir::Etc::SourceParts "/dev/null"',
            )
        )

    def _refresh(self, older_than_days: float) -> bool:
        """Fetch the lists if they are older than that; whether it was done.

        Lists that are there serve on without a network. Raises DebianError if there are none.
        """
        stamp = self._apt / "updated"
        there = stamp.is_file()
        if there and time.time() - stamp.stat().st_mtime < older_than_days * 86400:
            return False
        try:
            # On a full disk apt waits for ever.
            cache.need_room(self._apt, LISTS_BYTES)
            self._tool("apt-get", "update", "--error-on=any")
        except (DebianError, OSError) as error:
            self._tidy()
            if there:
                return False
            if isinstance(error, OSError):
                raise
            raise DebianError(
                f"{error} (the archive is {mirror()}; PKVM_DEBIAN_MIRROR=http://HOST/debian names "
                "another)"
            ) from error
        stamp.touch()
        return True

    def _tidy(self) -> None:
        """Remove what a failed update left half-made."""
        for left in (*(self._apt / "lists/partial").iterdir(), *self._apt.glob("*.bin.*")):
            left.unlink()

    def _tool(self, tool: str, *arguments: str, folder: Path | None = None) -> str:
        """Run a tool of apt's under our configuration; its standard output.

        Raises DebianError with what the tool said.
        """
        ours = ("--config-file", str(self._apt / "apt.conf")) if tool.startswith("apt") else ()
        try:
            done: subprocess.CompletedProcess[str] = subprocess.run(
                bound((tool, *ours, *arguments)),
                check=False,
                capture_output=True,
                text=True,
                cwd=folder,
                env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                timeout=TOOL_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise DebianError(f"{tool} {arguments[0]} did not end in {error.timeout:g} s") from None
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith(("E:", tool))]
            raise DebianError(
                f"{tool} {arguments[0]} failed: "
                + (said or [done.stderr.strip() or f"status {done.returncode}"])[0]
            )
        return done.stdout


def mirror() -> str:
    """The Debian archive that this machine's apt uses, or PKVM_DEBIAN_MIRROR.

    Raises DebianError if there is neither.
    """
    if given := os.environ.get("PKVM_DEBIAN_MIRROR"):
        return given
    targets = subprocess.run(
        ("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"),
        check=False,
        capture_output=True,
        text=True,
    )
    for uri in targets.stdout.split():
        if uri.rstrip("/").endswith("/debian"):
            return uri
    raise DebianError(
        "this machine's apt has no Debian archive in its sources: "
        "name one, PKVM_DEBIAN_MIRROR=http://HOST/debian"
    )


def main() -> int:
    """The command line of this module; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m pkvm.testbed.debian", description=__doc__)
    parser.add_argument("package", nargs="*", help="unpack it and print its folder")
    parser.add_argument("--kernel", metavar="SERIES", help="print the path of a kernel image")
    args = parser.parse_args()
    packages = Packages()
    try:
        for name in args.package:
            print(packages.unpack(name))
        if args.kernel is not None:
            print(packages.kernel(args.kernel))
    except DebianError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
