# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine by way of ssh with a real kernel in protected mode: the emulated one plays it.

ssh is a script that hands its command and input to this process, which runs it there.
"""

from __future__ import annotations

import pickle
import socket
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from pkvm.testbed.bed import TestBed
from pkvm.testbed.ssh import SshBed

pytestmark = pytest.mark.linux

BRIDGE = """\
import pickle, socket, sys
with socket.socket(socket.AF_UNIX) as end:
    end.connect(sys.argv[1])
    end.sendall(pickle.dumps((sys.argv[4], sys.stdin.buffer.read())))
    end.shutdown(socket.SHUT_WR)
    status, out, err = pickle.loads(b"".join(iter(lambda: end.recv(65536), b"")))
sys.stdout.buffer.write(out)
sys.stderr.buffer.write(err)
sys.exit(status)
"""


def use(program: tuple[str, ...]) -> list[bytes]:
    """What a person may do there."""
    with SshBed("there", program=program) as bed:
        found = bed.run(("python3", "-c", "import pkvm; print(pkvm.__file__)"), timeout=100)
        bed.put("file", b"bytes \x00\xff")
        listed = bed.run(("ls", "/tmp"))
        return [bed.release.encode(), found.stdout, found.stderr, bed.get("file"), listed.stdout]


def serve(door: socket.socket, there: TestBed) -> bool:
    """Run what the next ssh wants run; False if there is none any more."""
    end, _ = door.accept()
    with end:
        request = b"".join(iter(lambda: end.recv(1 << 16), b""))
        if not request:
            return False
        script, stdin = pickle.loads(request)
        result = there.run(("sh", "-c", script), stdin=stdin)
        end.sendall(pickle.dumps((result.status, result.stdout, result.stderr)))
    return True


def test_a_machine_that_makes_protected_vms(tmp_path: Path) -> None:
    """As the probe finds before anything else is done."""
    path = str(tmp_path / "door")
    program = (sys.executable, "-c", BRIDGE, path)

    def hang_up(_: Future[list[bytes]]) -> None:
        with socket.socket(socket.AF_UNIX) as end:
            end.connect(path)

    with (
        socket.socket(socket.AF_UNIX) as door,
        TestBed() as there,
        ThreadPoolExecutor() as pool,
    ):
        door.bind(path)
        door.listen()
        user = pool.submit(use, program)
        user.add_done_callback(hang_up)
        while serve(door, there):
            pass
        release, found, errors, file, listed = user.result()
        assert release.decode() == there.release
        assert (found[:9], found[-18:], errors) == (b"/tmp/pkvm", b"/pkvm/__init__.py\n", b"")
        assert file == b"bytes \x00\xff"
        assert listed.startswith(b"pkvm-bed.")
        assert b"pkvm-bed" not in there.run(("ls", "/tmp")).stdout
