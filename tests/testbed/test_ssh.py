# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine by way of ssh, where ssh is a script that hands the command to a shell, as sshd does.

What that machine is and has, other scripts say.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkvm.testbed.base import BedError, TimedOut
from pkvm.testbed.ssh import SshBed

SSH = """\
#!/bin/sh
# -- DESTINATION SCRIPT
[ "$1" = -- ] || exit 2
echo "$2" >>{log}
[ "$2" = nowhere ] && {{ echo "ssh: connect to host nowhere: No route" >&2; exit 255; }}
[ -e {folder}/lost ] && {{ echo "Connection closed" >&2; exit 255; }}
export PATH={folder}/there:$PATH TMPDIR={folder}/tmp
exec /bin/sh -c "$3"
"""
PYTHON = """\
#!/bin/sh
case "$*" in
*0xAE01*) cat {folder}/complaint >&2; exit $(wc -l <{folder}/complaint) ;;
esac
exec {python} "$@"
"""


class There:
    """The machine at the other end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tmp = folder / "tmp"
        self.tmp.mkdir()
        (folder / "there").mkdir()
        (folder / "complaint").touch()
        self._script("ssh", SSH)
        self._script("there/python3", PYTHON)
        self.architecture("aarch64")

    def _script(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(
            text.format(folder=self.folder, log=self.folder / "log", python=sys.executable)
        )
        path.chmod(0o755)

    def architecture(self, name: str) -> None:
        self._script("there/uname", f"#!/bin/sh\necho 7.3.9-arm64 {name}\n")

    def bed(self, destination: str = "me@there") -> SshBed:
        return SshBed(destination, program=(str(self.folder / "ssh"),))


@pytest.fixture
def there(tmp_path: Path) -> There:
    return There(tmp_path)


@pytest.fixture
def bed(there: There) -> Iterator[SshBed]:
    with there.bed() as bed:
        yield bed


def test_the_package_goes_there_and_is_removed(there: There) -> None:
    with there.bed() as bed:
        assert bed.release == "7.3.9-arm64"
        (folder,) = there.tmp.iterdir()
        assert (folder / "pkvm/uapi/kvm.py").is_file()
        said = bed.run(("python3", "-c", "import pkvm; print(pkvm.__file__)"))
        assert said.stdout.decode().strip() == str(folder / "pkvm/__init__.py")
        assert bed.run(("pkvm", "--version")).stdout.startswith(b"pkvm ")
    assert list(there.tmp.iterdir()) == []
    assert set((there.folder / "log").read_text().split()) == {"me@there"}


def test_words_status_and_output(bed: SshBed) -> None:
    words = ("it's", 'a "b" $c', "", "*", "two\nlines")
    script = 'printf "%s|" "$@"; echo "$A" >&2; exit 9'
    result = bed.run(("sh", "-c", script, "sh", *words), environment={"A": "b $c"})
    assert result.stdout == "".join(f"{word}|" for word in words).encode()
    assert (result.status, result.stderr) == (9, b"b $c\n")


def test_input_and_files(bed: SshBed) -> None:
    data = bytes(range(256)) * 4096
    assert bed.run(("cat",), stdin=data).stdout == data
    assert bed.run(("true",), stdin=data).ok
    assert bed.run(("cat",)).stdout == b""
    bed.put("a folder/it's", data)
    assert bed.get("a folder/it's") == data
    with pytest.raises(BedError, match="nothing cannot be fetched from the test bed: "):
        bed.get("nothing")
    with pytest.raises(BedError, match="cannot be written on me@there"):
        bed.put("a folder", b"")


def test_output_is_heard_as_it_comes(bed: SshBed) -> None:
    heard = bytearray()
    with pytest.raises(TimedOut, match=r"took longer than 0\.5 s on me@there"):
        bed.run(("sh", "-c", "echo now; exec sleep 1000"), timeout=0.5, on_stdout=heard.extend)
    assert heard == b"now\n"


def test_a_machine_out_of_reach(there: There) -> None:
    with pytest.raises(BedError, match="nowhere takes no package: ssh: connect to host nowhere"):
        there.bed("nowhere").boot()


def test_a_machine_that_is_lost(there: There) -> None:
    with there.bed() as bed:
        (there.folder / "lost").touch()
        with pytest.raises(BedError, match="me@there cannot be reached: Connection closed"):
            bed.run(("true",))


def test_another_architecture(there: There) -> None:
    there.architecture("x86_64")
    with pytest.raises(BedError, match="me@there is x86_64, and no arm64 machine"), there.bed():
        pass
    assert list(there.tmp.iterdir()) == []


def test_a_kernel_that_is_not_right(there: There) -> None:
    complaint = "its kernel makes no protected VM: boot it with kvm-arm.mode=protected"
    (there.folder / "complaint").write_text(f"{complaint}\n")
    with pytest.raises(BedError, match=f"^me@there is no test bed: {complaint}"), there.bed():
        pass
    assert list(there.tmp.iterdir()) == []


def test_the_probe_itself(there: There) -> None:
    """It is a program of its own, and this machine has no KVM for arm64."""
    (there.folder / "there/python3").unlink()
    (there.folder / "there/python3").symlink_to(sys.executable)
    expected = r"no test bed: (/dev/kvm: |its kernel makes no protected VM)"
    with pytest.raises(BedError, match=expected), there.bed():
        pass


def test_no_ssh_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BedError, match="ssh is missing: install the package openssh-client"):
        SshBed("there").boot()
    assert shutil.which("ssh") is None


def test_an_option_is_no_destination(there: There) -> None:
    with pytest.raises(BedError, match="-oProxyCommand=rm is no machine"):
        there.bed("-oProxyCommand=rm").boot()
