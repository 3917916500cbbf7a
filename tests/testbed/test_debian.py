# SPDX-License-Identifier: GPL-2.0-or-later
"""Fetching with apt's tools replaced by scripts over a small archive in a folder.

dpkg-deb is the real one. That the real apt takes our configuration is shown by tests/linux.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pkvm.testbed import debian
from pkvm.testbed.debian import DebianError, Packages

APT_GET = """\
echo "apt-get $*" >>{log}
[ -e {archive}/down ] && {{ echo 'E: Failed to fetch: no network' >&2; exit 100; }}
case "$*" in
  *indextargets*) cat {archive}/uris ;;
  *update*) cp {archive}/index {archive}/seen ;;
  *download*)
    for last; do :; done
    file={archive}/$(echo "$last" | tr = _).deb
    [ -e "$file" ] || {{ echo "E: 404 Not Found $last" >&2; exit 100; }}
    cp "$file" . ;;
esac
"""
APT_CACHE = """\
echo "apt-cache $*" >>{log}
for last; do :; done
case "$*" in
  *pkgnames*) cut -d ' ' -f 1 {archive}/seen ;;
  *) awk -v name="$last" '$1 == name {{ print $1, "|", $2, "| archive" }}' {archive}/seen ;;
esac
"""


class FakeArchive:
    """A Debian archive in a folder, and the tools that look into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "archive"
        self.log = folder / "log"
        self.tools = folder / "tools"
        self.folder.mkdir()
        self.tools.mkdir()
        self.write_tool("apt-get", APT_GET)
        self.write_tool("apt-cache", APT_CACHE)
        (self.folder / "index").write_text("")
        (self.folder / "uris").write_text("https://archive.test/debian-security/\n")

    def write_tool(self, name: str, text: str) -> None:
        tool = self.tools / name
        tool.write_text("#!/bin/sh\n" + text.format(log=self.log, archive=self.folder))
        tool.chmod(0o755)

    def publish(self, name: str, version: str, files: dict[str, str]) -> None:
        """Make a package and put it into the index."""
        tree = self.folder / "tree"
        subprocess.run(("rm", "-rf", str(tree)), check=True)
        for path, text in files.items():
            file = tree / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN" / "control").write_text(
            f"Package: {name}\nVersion: {version}\nArchitecture: arm64\n"
            "Maintainer: Nobody <nobody@test>\nDescription: made for a test\n"
        )
        deb = self.folder / f"{name}_{version}.deb"
        subprocess.run(
            ("dpkg-deb", "-Znone", "--build", str(tree), str(deb)), check=True, capture_output=True
        )
        with (self.folder / "index").open("a") as index:
            index.write(f"{name} {version}\n")

    def withdraw(self, name: str, version: str) -> None:
        """The archive keeps no superseded version."""
        (self.folder / f"{name}_{version}.deb").unlink()
        index = self.folder / "index"
        index.write_text(index.read_text().replace(f"{name} {version}\n", ""))

    def calls(self, word: str) -> int:
        if not self.log.exists():
            return 0
        return sum(word in line for line in self.log.read_text().splitlines())


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeArchive:
    fake = FakeArchive(tmp_path)
    keyring = tmp_path / "keyring.gpg"
    keyring.touch()
    monkeypatch.setattr(debian, "KEYRING", keyring)
    monkeypatch.setenv("PATH", f"{fake.tools}:/usr/bin:/bin")
    monkeypatch.setenv("PKVM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PKVM_DEBIAN_MIRROR", "http://archive.test/debian")
    return fake


def test_a_package_is_unpacked_once(archive: FakeArchive) -> None:
    archive.publish("tool", "1.0-1", {"usr/bin/tool": "program"})
    folder = Packages().unpack("tool")
    assert (folder / "usr/bin/tool").read_text() == "program"
    assert Packages().unpack("tool") == folder
    assert (archive.calls("update"), archive.calls("download")) == (1, 1)


def test_what_is_there_needs_no_network(archive: FakeArchive) -> None:
    archive.publish("tool", "1.0-1", {"f": "1"})
    folder = Packages().unpack("tool")
    (archive.folder / "down").touch()
    assert Packages().unpack("tool") == folder
    archive.publish("other", "1", {"f": "1"})
    with pytest.raises(DebianError, match="no package other for arm64"):
        Packages().unpack("other")


def test_the_newest_version_of_all_suites(archive: FakeArchive) -> None:
    for version in ("1:1.9-1", "1:1.10-1~bpo1", "2.0-1"):
        archive.publish("tool", version, {"version": version})
    folder = Packages().unpack("tool")
    assert (folder / "version").read_text() == "1:1.10-1~bpo1"
    assert ":" not in folder.name


def test_superseded_lists_are_fetched_again(archive: FakeArchive) -> None:
    archive.publish("tool", "1.0-1", {"version": "old"})
    archive.publish("other", "1", {"f": "1"})
    Packages().unpack("other")
    archive.withdraw("tool", "1.0-1")
    archive.publish("tool", "1.0-2", {"version": "new"})
    assert (Packages().unpack("tool") / "version").read_text() == "new"
    assert archive.calls("update") == 2


def test_another_mirror_means_other_lists(
    archive: FakeArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.publish("tool", "1", {"f": "1"})
    Packages().unpack("tool")
    monkeypatch.setenv("PKVM_DEBIAN_MIRROR", "http://elsewhere.test/debian")
    Packages().unpack("tool")
    assert archive.calls("update") == 2


@pytest.mark.parametrize(
    ("packages", "series", "image"),
    [
        (["linux-image-6.12.94-cloud-arm64 boot/vmlinuz-6.12.94",
          "linux-image-6.12.107+deb13-cloud-arm64 boot/vmlinuz-6.12.107",
          "linux-image-6.12.200-cloud-arm64-unsigned boot/vmlinuz-unsigned",
          "linux-image-6.1.300-cloud-arm64 boot/vmlinuz-6.1.300"],
         "6.12", "boot/vmlinuz-6.12.107"),
        (["linux-image-7.3.4+deb13-cloud-arm64 usr/share/doc/nothing",
          "linux-binary-7.3.4+deb13-cloud-arm64 usr/lib/modules/7.3.4/vmlinuz",
          "linux-binary-unsigned-7.3.5+deb13-cloud-arm64 usr/lib/modules/7.3.5/vmlinuz"],
         "7.3", "usr/lib/modules/7.3.4/vmlinuz"),
    ],
)  # fmt: skip
def test_the_newest_kernel_of_a_series(
    archive: FakeArchive, packages: list[str], series: str, image: str
) -> None:
    for package in packages:
        name, path = package.split()
        archive.publish(name, "1", {path: path})
    assert Packages().kernel(series).read_text() == image


def test_a_kernel_that_debian_has_not(archive: FakeArchive) -> None:
    archive.publish("linux-image-6.12.1-cloud-arm64", "1", {"boot/vmlinuz-6.12.1": ""})
    with pytest.raises(DebianError, match=r"no kernel 7\.3 cloud-arm64 for arm64 in trixie, "):
        Packages().kernel("7.3")


def test_no_network_and_no_lists(archive: FakeArchive) -> None:
    (archive.folder / "down").touch()
    with pytest.raises(DebianError, match="apt-get update failed: E: Failed to fetch: no network"):
        Packages().unpack("tool")


def test_a_broken_package_leaves_nothing(archive: FakeArchive) -> None:
    archive.publish("tool", "1", {"f": "1"})
    (archive.folder / "tool_1.deb").write_bytes(b"rubbish")
    packages = Packages()
    with pytest.raises(DebianError, match="dpkg-deb --extract failed: dpkg-deb: error"):
        packages.unpack("tool")
    assert list((packages.folder / "packages").iterdir()) == []


@pytest.mark.parametrize("tool", ["apt-get", "apt-cache", "dpkg-deb"])
def test_a_missing_tool_is_named(
    archive: FakeArchive, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    (archive.tools / "dpkg-deb").symlink_to("/usr/bin/dpkg-deb")
    (archive.tools / "dpkg").symlink_to("/usr/bin/dpkg")
    (archive.tools / tool).unlink()
    monkeypatch.setenv("PATH", str(archive.tools))
    with pytest.raises(DebianError, match=rf"^{tool} is missing \(Debian package (apt|dpkg)\)"):
        Packages().unpack("tool")


def test_a_missing_keyring_is_named(archive: FakeArchive) -> None:
    debian.KEYRING.unlink()
    with pytest.raises(DebianError, match=r"keyring.gpg is missing \(Debian package debian-arch"):
        Packages().unpack("tool")


def test_a_folder_that_cannot_be_made(archive: FakeArchive, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DebianError, match=r"is of no use: .*Not a directory"):
        Packages(tmp_path / "file" / "cache").unpack("tool")


def test_the_mirror_is_the_machines_own(
    archive: FakeArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PKVM_DEBIAN_MIRROR")
    with pytest.raises(DebianError, match="PKVM_DEBIAN_MIRROR=http://HOST/debian"):
        debian.mirror()
    with (archive.folder / "uris").open("a") as uris:
        uris.write("http://archive.test/debian/\n")
    assert debian.mirror() == "http://archive.test/debian/"


def test_the_command_line(
    archive: FakeArchive, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.publish("tool", "1", {"f": "1"})
    monkeypatch.setattr("sys.argv", ["debian", "tool"])
    assert debian.main() == 0
    assert (Path(capsys.readouterr().out.strip()) / "f").is_file()
    monkeypatch.setattr("sys.argv", ["debian", "--kernel", "9.9"])
    assert debian.main() == 1
    assert capsys.readouterr().err.startswith("error: Debian has no kernel 9.9")
