# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio-console, virtio-net and virtio-vsock with Linux's drivers, in a protected guest."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakes.linux_fixtures import Linux
from fakes.pty_child import PtyChild
from pkvm.testbed import initramfs

BULK = 1 << 20
SOCKETS = r"""
/* sockets connect|listen PORT APPLET [ARGUMENT]: an applet of busybox at a vsock connection. */
typedef unsigned long word;

static long call(word number, word a, word b, word c, word d)
{
	register word x8 __asm__("x8") = number;
	register word x0 __asm__("x0") = a;
	register word x1 __asm__("x1") = b;
	register word x2 __asm__("x2") = c;
	register word x3 __asm__("x3") = d;
	__asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
	return (long)x0;
}

static int run(word *stack)
{
	char **argv = (char **)(stack + 1);
	struct { unsigned short family, zero; unsigned port, cid; char pad[4]; } address = { 40 };
	long fd = call(198, 40, 1, 0, 0);

	for (char *p = argv[2]; *p; p++)
		address.port = 10 * address.port + (unsigned)(*p - '0');
	if (argv[1][0] == 'c') {
		address.cid = 2;
		if (call(203, fd, (word)&address, 16, 0))
			return 1;
	} else {
		address.cid = -1U;
		if (call(200, fd, (word)&address, 16, 0) || call(201, fd, 1, 0, 0))
			return 2;
		call(64, 1, (word)"listening\n", 10, 0);
		fd = call(202, fd, 0, 0, 0);
		if (fd < 0)
			return 3;
	}
	call(24, fd, 0, 0, 0);
	call(24, fd, 1, 0, 0);
	argv[2] = "busybox";
	call(221, (word)"/bin/busybox", (word)(argv + 2), 0, 0);
	return 4;
}

__attribute__((used)) static void start(word *stack) { call(93, (word)run(stack), 0, 0, 0); }
__asm__(".globl _start\n_start: mov x0, sp\n bl start\n");
"""

pytestmark = pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-gcc") is None, reason="no compiler for AArch64"
)

Boot = Callable[..., PtyChild]


@pytest.fixture(scope="module")
def initrd(linux: Linux, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A busybox root with the program for sockets."""
    folder = tmp_path_factory.mktemp("sockets")
    source = folder / "sockets.c"
    source.write_text(SOCKETS)
    subprocess.run(
        [
            "aarch64-linux-gnu-gcc", "-Os", "-static", "-nostdlib", "-ffreestanding",
            "-fno-stack-protector", "-o", str(folder / "sockets"), str(source),
        ],
        check=True,
    )  # fmt: skip
    archive = initramfs.busybox_root(linux.packages.busybox().read_bytes())
    archive.file("/bin/sockets", (folder / "sockets").read_bytes(), 0o755)
    path = folder / "initrd.gz"
    path.write_bytes(archive.gzip())
    return path


@pytest.fixture
def boot(linux: Linux, initrd: Path) -> Iterator[Boot]:
    """Starts the sharing kernel with its shell at hvc0; what is running at the end is killed."""
    running: list[PtyChild] = []

    def start(*options: str) -> PtyChild:
        child = PtyChild(
            [
                *("-m", "pkvm", "run", "--kernel", str(linux.kernel("sharing"))),
                *("--initrd", str(initrd), "--console", "virtio", "--timeout", "100"),
                *options,
            ]
        )
        running.append(child)
        child.expect(rb"/ # ")
        return child

    yield start
    for child in running:
        child.__exit__(None, None, None)


def power_off(child: PtyChild) -> None:
    child.press(b"poweroff -f\r")
    assert child.wait() == 0, child.seen[-3000:]


def test_hvc0_at_a_terminal_follows_its_size(boot: Boot) -> None:
    child = boot()
    child.press(b"stty size\r")
    assert child.expect(rb"\n(\d+ \d+)\r\n/ # ")[1] == b"24 80"
    child.press(b"while [ \"$(stty size)\" != '43 132' ]; do :; done; echo res''ized\r")
    child.expect(rb"ized\r\n")
    child.set_size(132, 43)
    child.expect(rb"resized\r\n/ # ")
    child.press(b"\x1di")
    child.expect(rb"private, \d{4,} shared with the host")
    power_off(child)
    assert child.attributes() == child.before


@pytest.fixture
def tap() -> Iterator[str]:
    """A TAP interface with the address 198.18.77.1 (RFC 2544)."""
    name = f"pkvmt{os.getpid() % 100_000}"
    for words in (
        f"tuntap add dev {name} mode tap",
        f"addr add 198.18.77.1/24 dev {name}",
        f"link set {name} up",
    ):
        if shutil.which("ip") is None or subprocess.run(["ip", *words.split()]).returncode:
            pytest.skip("no TAP interface can be made here")
    yield name
    subprocess.run(["ip", "link", "delete", name], stderr=subprocess.DEVNULL)


def test_tcp_both_ways_over_a_tap_interface_that_vanishes(boot: Boot, tap: str) -> None:
    child = boot("--net", f"tap={tap},mac=02:00:00:00:00:07")
    child.press(b"ifconfig eth0 198.18.77.2 up; cat /sys/class/net/eth0/address\r")
    child.expect(rb"02:00:00:00:00:07\r\n/ # ")
    got: list[int] = []
    with socket.create_server(("198.18.77.1", 0)) as server:
        server.settimeout(60)
        port = server.getsockname()[1]

        def serve() -> None:
            with server.accept()[0] as guest:
                guest.sendall(bytes(BULK))
            with server.accept()[0] as guest:
                got.append(_count(guest))

        thread = threading.Thread(target=serve)
        thread.start()
        child.press(b"nc 198.18.77.1 %d </dev/null | wc -c\r" % port)
        child.expect(rb"\n%d\r\n/ # " % BULK)
        child.press(b"head -c %d /dev/zero | nc 198.18.77.1 %d\r" % (BULK, port))
        child.expect(rb"\n/ # ")
        thread.join(60)
    assert got == [BULK]
    subprocess.run(["ip", "link", "delete", tap], check=True)
    child.press(b"while grep -q 1 /sys/class/net/eth0/carrier; do :; done; echo do''wn\r")
    child.expect(rb"\ndown\r\n/ # ")
    power_off(child)
    assert f"the TAP interface {tap} is gone".encode() in child.seen


def test_vsock_from_the_guest_and_from_the_host(boot: Boot, tmp_path: Path) -> None:
    path = tmp_path / "v"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}_5000")
        server.listen()
        server.settimeout(60)
        child = boot("--vsock", f"7,{path}")
        # The guest opens, and says all that it hears, until the host ends its half.
        child.press(b"sockets connect 5000 cat; echo =$?\r")
        with server.accept()[0] as guest:
            _echo(guest)
        child.expect(rb"\n=0\r\n")
        child.press(b"sockets connect 5001 cat; echo =$?\r")
        child.expect(rb"\n=1\r\n")
    # The host opens.
    child.press(b"sockets listen 1024 cat; echo =$?\r")
    child.expect(rb"listening")
    with socket.socket(socket.AF_UNIX) as host:
        host.settimeout(60)
        host.connect(str(path))
        host.sendall(b"CONNECT 1024\n")
        assert host.recv(100).startswith(b"OK ")
        _echo(host)
    child.expect(rb"\n=0\r\n")
    # Nobody listens there any more.
    with socket.socket(socket.AF_UNIX) as host:
        host.settimeout(60)
        host.connect(str(path))
        host.sendall(b"CONNECT 1024\n")
        assert host.recv(100) == b""
    power_off(child)
    assert not path.exists()


def _echo(connection: socket.socket) -> None:
    """Say much, hear it again, and end."""
    connection.settimeout(60)
    said = bytes(n % 251 for n in range(BULK))

    def say() -> None:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=say)
    thread.start()
    heard = bytearray()
    while part := connection.recv(1 << 16):
        heard += part
    thread.join()
    assert heard == said


def _count(connection: socket.socket) -> int:
    """How many bytes come until the end."""
    connection.settimeout(60)
    total = 0
    while part := connection.recv(1 << 16):
        total += len(part)
    return total
