# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host tries while Linux boots in a protected guest: to look into it, and to go away."""

from __future__ import annotations

import errno
import random
import threading
from contextlib import closing

import pytest

from fakes.contract_rig import running_system
from fakes.linux_fixtures import Linux
from pkvm.check.invariants import PrivacyWatch, check
from pkvm.firmware.image import builtin
from pkvm.kvm import Memory
from pkvm.system import System
from pkvm.testbed.initramfs import MARKER
from pkvm.uapi.errors import ProtectedPageError
from pkvm.vmm import board
from pkvm.vmm.initrd import place_initrd
from pkvm.vmm.loader import load_image
from pkvm.vmm.probes import Ways
from pkvm.vmm.vmm import Outcome, Vmm

pytestmark = [pytest.mark.linux, pytest.mark.timeout(1800)]  # a kernel may have to be built

RAM = 128 << 20
MACHINE = 192 << 20
SECONDS = 120
BURST = 40


class Guest:
    """Linux in a protected VM of this process, with an ear at its console."""

    def __init__(self, system: System, linux: Linux, kernel: str, run: str) -> None:
        self.system = system
        self.said = bytearray()
        self._awaited: list[tuple[bytes, threading.Event]] = []
        self.outcome: Outcome | None = None
        self.error: OSError | None = None
        append = f'console=ttyAMA0 panic=-1 run="{run}"'
        the_board = board.Board(RAM, 2, append, gic=True)
        image = load_image(linux.kernel(kernel).read_bytes(), the_board)
        initrd = place_initrd(linux.initrd.read_bytes(), image, the_board)
        self.vmm = Vmm(system.open(), the_board, image, initrd=initrd, console=self._hear)
        self.thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self.thread.start()

    def says(self, words: str) -> threading.Event:
        """An event that is set when the guest says `words`."""
        event = threading.Event()
        self._awaited.append((words.encode(), event))
        return event

    def _hear(self, data: bytes) -> None:
        self.said += data
        for words, event in self._awaited:
            if not event.is_set() and words in self.said:
                event.set()

    def _run(self) -> None:
        try:
            self.outcome = self.vmm.run(SECONDS)
        except OSError as error:
            self.error = error


def attempt(ways: Ways, kind: str, memory: Memory, at: int) -> bool:
    """Whether a word of private memory could be reached."""
    try:
        if kind in ways.readers:
            ways.readers[kind](memory, at, 8)
        else:
            ways.writers[kind](memory, at, b"intruder")
    except OSError as error:
        # The copy engine's word for a refusal is EIO.
        if not isinstance(error, ProtectedPageError) and error.errno != errno.EIO:
            raise
        return False
    return True


def test_every_attempt_at_every_moment_is_refused(linux: Linux) -> None:
    dice = random.Random(7)
    with running_system(memory=MACHINE, firmware=builtin()) as system:
        # A kernel that shares nothing: all of its memory is private.
        guest = Guest(system, linux, "6.12", "cat /proc/interrupts")
        with closing(guest.vmm), closing(Ways(guest.vmm.kvm.kernel)) as ways:
            kinds = [*ways.readers, *ways.writers]
            tried = dict.fromkeys(kinds, 0)
            through = []
            guest.start()
            while guest.thread.is_alive():
                # Each attempt stops the guest: it is to get on between the bursts.
                guest.thread.join(dice.random() / 50)
                for _ in range(dice.randrange(1, BURST)):
                    kind = dice.choice(kinds)
                    at = dice.randrange(RAM // 8) * 8
                    tried[kind] += 1
                    if attempt(ways, kind, guest.vmm.ram, at):
                        through.append((kind, hex(board.RAM_BASE + at)))
            assert guest.outcome is not None
            assert guest.outcome.kind == "powered-off", guest.said.decode()[-2000:]
            assert MARKER.encode() in guest.said
            assert through == []
            assert all(times > 100 for times in tried.values())


@pytest.mark.parametrize("moment", ["Booting Linux", "smp: Brought up", "Run /init", MARKER])
def test_the_vmm_may_die_at_any_moment(linux: Linux, moment: str) -> None:
    with running_system(memory=MACHINE, firmware=builtin()) as system:
        guest = Guest(system, linux, "sharing", "while true; do cat /proc/interrupts; done")
        watch = PrivacyWatch()
        reached = guest.says(moment)
        guest.start()
        assert reached.wait(SECONDS), guest.said.decode()[-2000:]
        assert watch.look(system.hyp.mem) == []
        assert system.census().guest["owned"] > RAM // 4096 // 2
        system.host.shutdown()
        guest.thread.join()
        assert watch.look(system.hyp.mem) == []
        assert check(system.hyp.mem, system.hyp.vms()) == []
        assert system.census().guest == {"owned": 0, "shared_with_host": 0}
