# SPDX-License-Identifier: GPL-2.0-or-later
"""The /dev/kvm back-end on a stock Debian kernel in protected mode, in the test bed.

One boot serves all; what a script there finds comes back as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from fakes.linux_fixtures import Linux
from pkvm.testbed.bed import TestBed

pytestmark = pytest.mark.linux
RUN = ("pkvm", "run", "--backend", "/dev/kvm")


@pytest.fixture(scope="module")
def bed() -> Iterator[TestBed]:
    with TestBed() as bed:
        yield bed


def found_by(bed: TestBed, script: str) -> dict[str, Any]:
    """What a script prints after the words that all of them begin with."""
    result = bed.run(("python3", "-c", BEGIN + script), timeout=120)
    assert result.stderr == b""
    assert result.status == 0
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_demonstration(bed: TestBed) -> None:
    result = bed.run((*RUN, "--json"), timeout=120)
    assert result.stderr == b""
    assert result.status == 0
    report = json.loads(result.stdout)
    assert (report["backend"], report["dialect"]) == ("/dev/kvm", "upstream")
    assert (report["outcome"], report["protected"]) == ("powered-off", True)
    assert "the VMM read 54 bytes" in report["console"]
    assert "my private pages are as I left them" in report["console"]
    probes = report["host_probes"]
    assert probes["tried"] == probes["refused"] >= 3 * 4
    assert probes["shared"] == {"tried": 4, "allowed": 4, "equal": True, "trouble": []}
    assert report["pinned_by_moment"]["end"] >= 10 * 4096


def test_the_same_without_protection(bed: TestBed) -> None:
    result = bed.run((*RUN, "--unprotected", "--json"), timeout=120)
    report = json.loads(result.stdout)
    assert (result.status, report["outcome"]) == (3, "powered-off")
    assert report["host_probes"]["refused"] == 0


def test_more_cpus(bed: TestBed) -> None:
    smp = "/usr/lib/python3/dist-packages/pkvm/guests/smp.bin"
    result = bed.run((*RUN, "--cpus", "2", smp), timeout=120)
    assert b"CPU 0x1 is up" in result.stdout
    assert result.status == 0


BEGIN = """
import ctypes, errno, json, os, signal, subprocess, sys, threading, time
import pkvm
from pkvm import guests
from pkvm.guests.agent import Agent
from pkvm.kvm import Intr
from pkvm.uapi.errors import ProtectedPageError
from pkvm.uapi.kvm import TYPE_PROTECTED

BASE = 0x4000_0000
kvm = pkvm.open("/dev/kvm")

def guest(image):
    vm = kvm.create_vm(TYPE_PROTECTED)
    ram = kvm.mmap(4 << 20)
    ram.write(0, image)
    vm.set_user_memory_region(0, BASE, ram)
    vcpu = vm.create_vcpu(0)
    vcpu.init()
    vcpu.set_reg("pc", BASE)
    return ram, vcpu

def said(call, *arguments):
    try:
        return repr(call(*arguments))
    except ProtectedPageError as error:
        return ["refused", error.address - ram.address, error.errno]
    except OSError as error:
        return errno.errorcode[error.errno]

ram, vcpu = guest(guests.image("agent"))
agent = Agent(vcpu)
agent.start()
DATA = BASE + 0x30_0000
found = {}
"""

ACCESS = """
agent.store(DATA, 0x1122334455667788)
at = DATA - BASE
for name in ("read", "syscall_read"):
    found[name] = said(getattr(ram, name), at + 8, 8)
    found[name + " across"] = said(getattr(ram, name), at - 100, 200)
for name in ("write", "syscall_write"):
    found[name] = said(getattr(ram, name), at + 8, b"intruder")
    found[name + " across"] = said(getattr(ram, name), at - 100, b"x" * 200)
found["before it"] = said(ram.read, at - 4, 4)
child = os.fork()
if not child:
    os._exit(0)
os.waitpid(child, 0)
subprocess.run(["true"], check=True, close_fds=True, preexec_fn=lambda: None)
found["after a fork"] = hex(agent.load(DATA))
print(json.dumps(found))
"""


def test_the_host_is_refused_and_lives(bed: TestBed) -> None:
    at = 0x30_0000
    assert found_by(bed, ACCESS) == {
        **{name: ["refused", at + 8, 14] for name in KINDS},
        **{f"{name} across": ["refused", at, 14] for name in KINDS},
        "before it": "b'xxxx'",
        "after a fork": "0x1122334455667788",
    }


KINDS = ("read", "syscall_read", "write", "syscall_write")

LOAD = """
# A load in earnest: strlen(3), in a process of its own that has this one's memory.
libc = ctypes.CDLL(None, use_errno=True)
CLONE_VM, CLONE_VFORK = 0x100, 0x4000
stack = ctypes.create_string_buffer(1 << 16)
top = (ctypes.addressof(stack) + len(stack)) & ~15
strlen = ctypes.cast(libc.strlen, ctypes.c_void_p)

def load(address):
    flags = CLONE_VM | CLONE_VFORK | signal.SIGCHLD
    child = libc.clone(strlen, ctypes.c_void_p(top), flags, ctypes.c_void_p(address))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

agent.store(DATA, 0x1122334455667788)
ram.write(DATA - BASE + 4096, b"seven..")
found["the guest's"] = load(ram.address + DATA - BASE)
found["the host's"] = load(ram.address + DATA - BASE + 4096)
found["the guest"] = hex(agent.load(DATA))
print(json.dumps(found))
"""


def test_a_load_in_earnest_is_the_end_of_who_does_it(bed: TestBed) -> None:
    """Why `Memory.read` makes none."""
    assert found_by(bed, LOAD) == {
        "the guest's": -11,
        "the host's": 7,
        "the guest": "0x1122334455667788",
    }


FORCE = """
agent.store(DATA, 0x1122334455667788)
found["forced"] = said(ram.forced_read, DATA - BASE, 8)
found["read"] = said(ram.read, DATA - BASE, 8)
try:
    agent.load(DATA)
except OSError as error:
    found["the guest's next touch"] = errno.errorcode[error.errno]
print(json.dumps(found))
"""


def test_what_is_taken_by_force_is_lost(bed: TestBed) -> None:
    assert found_by(bed, FORCE) == {
        "forced": repr(bytes(8)),
        "read": repr(bytes(8)),
        "the guest's next touch": "EFAULT",
    }


KICK = """
_, spinning = guest((0x1400_0000).to_bytes(4, "little"))  # b .
found["kicks"] = []
for kick in (spinning.kick, lambda: kvm.kernel.kick(spinning.fd)):
    exits = []
    thread = threading.Thread(target=lambda: exits.append(spinning.run()))
    thread.start()
    count = 0
    while thread.is_alive():  # this thread runs while that one is in the guest
        count += 1
        if count > 50:
            kick()
        thread.join(0.01)
    found["kicks"].append([count > 50, exits == [Intr()]])
print(json.dumps(found))
"""


def test_a_kick_brings_a_vcpu_home(bed: TestBed) -> None:
    assert found_by(bed, KICK) == {"kicks": [[True, True], [True, True]]}


INTERRUPTS = """
from pkvm.vmm import board
from pkvm.vmm.board import Board
from pkvm.vmm.loader import load_image
from pkvm.vmm.mailbox import Mailbox
from pkvm.vmm.vmm import Vmm

SPI = 63
the_board = Board(ram_bytes=8 << 20, cpus=2, gic=True)
image = load_image(guests.image("irq"), the_board)

class Run:
    # guests/irq tells each interrupt that it took, and first that it waits for its SPI.
    def __init__(self, irqfd):
        self.notes, self.console = [], b""
        self.raised = os.eventfd(0)
        self.irqfd = irqfd
        self.vmm = Vmm(kvm, the_board, image, console=self.hear, plug=self.plug)
        self.outcome = self.vmm.run(60).kind
        self.vmm.close()

    def hear(self, data):
        self.console += data

    def plug(self, vmm):
        vmm.devices[board.MAILBOX_BASE >> 12] = Mailbox(self.note)
        self.line = vmm.line(SPI)

    def note(self, event):
        number = event.args[0]
        lower = number in self.notes
        self.notes.append(number)
        if number != SPI + 32:
            return
        if not self.irqfd:
            self.line.set(not lower)
        elif not lower:
            self.vmm.vm.irqfd(self.raised, SPI)
            os.eventfd_write(self.raised, 1)

for name in ("line", "irqfd"):
    run = Run(name == "irqfd")
    found[name] = [run.outcome, run.notes, run.console.decode()]
print(json.dumps(found))
"""


def test_an_interrupt_of_each_kind(bed: TestBed) -> None:
    """Timers, an SPI and SGIs, by the interrupt controller of the real kernel."""
    notes = [27, 30, 95, 95, 3]
    console = "irq: took every interrupt\n"
    assert found_by(bed, INTERRUPTS) == {
        "line": ["powered-off", notes, console],
        "irqfd": ["powered-off", notes, console],
    }


@pytest.mark.timeout(1800)  # the kernel may have to be built first
def test_linux_with_devices(bed: TestBed, linux: Linux) -> None:
    """Its interrupts and timers are the real kernel's; what its devices see is shared."""
    bed.put("kernel", linux.kernel("sharing").read_bytes())
    bed.put("initrd", linux.initrd.read_bytes())
    command = 'run="cat /proc/interrupts; head -c 64 /dev/hwrng | wc -c"'
    guest = ("--kernel", "kernel", "--initrd", "initrd", "--append", command)
    result = bed.run(
        (*RUN, *guest, "--console", "virtio", "--rng", "--cpus", "2", "--json"), timeout=240
    )
    report = json.loads(result.stdout)
    assert (result.status, report["outcome"]) == (0, "powered-off")
    console = report["console"]
    assert "userland reached" in console
    timer = next(line for line in console.splitlines() if "arch_timer" in line)
    assert all(int(count) > 10 for count in timer.split()[1:3])
    assert "\r\n64\r\n" in console
    probes = report["host_probes"]
    assert probes["tried"] == probes["refused"] > 400
    assert probes["shared"]["equal"] is True
    moved = {device["device"]: device for device in report["devices"]}
    assert all(device["bounced"] for device in moved.values())
    assert report["device_faults"] == []
