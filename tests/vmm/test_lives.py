# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that asks for a reset gets a new VM, for as long as somebody wants it to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from fakes.fake_kernel import Block, FakeKernel, FakeVm, Guest, Load, Stop, just, power_off
from pkvm.kvm import Kvm
from pkvm.uapi import kvm as uapi
from pkvm.vmm.board import UART_BASE, Board
from pkvm.vmm.lives import Lives
from pkvm.vmm.loader import load_image
from pkvm.vmm.vmm import Moment, Outcome, Vmm

BOARD = Board(ram_bytes=4 << 20)
IMAGE = load_image(b"\x1f\x20\x03\xd5", BOARD)


def reset() -> Stop:
    return Stop(uapi.ExitReason.SYSTEM_EVENT, uapi.Run.SYSTEM_EVENT.pack(2, 0, *[0] * 16))


class Rig:
    """A kernel whose VMs behave one after the other as `guests` say; the last goes on."""

    def __init__(self, *guests: Callable[[], Guest]) -> None:
        self.kernel = FakeKernel(lambda _: self.guests[min(self.life, len(guests) - 1)]())
        self.kvm = Kvm(self.kernel)
        self.guests = guests
        self.life = -1
        self.seen: list[int] = []
        self.moments: list[Moment] = []

    def make(self, life: int, **options: Any) -> Vmm:
        for memory in self.kernel.memories:
            if memory.closed:
                memory.bytes.clear()  # the fake keeps every one
        self.life += 1
        self.seen.append(life)
        options.setdefault("console", lambda _: None)
        return Vmm(self.kvm, BOARD, IMAGE, observe=self.moments.append, **options)

    def vms(self) -> int:
        return sum(isinstance(owner, FakeVm) for owner in self.kernel.fds.values())


RESET = partial(just, reset())
OFF = partial(just, power_off())
FOR_EVER = partial(just, Block())


def test_a_reset_makes_a_new_vm_after_the_old_one_is_gone() -> None:
    rig = Rig(RESET, RESET, OFF)
    alive: list[int] = []

    def make(life: int) -> Vmm:
        alive.append(rig.vms())
        return rig.make(life)

    with Lives(make) as lives:
        assert lives.run(20).kind == "powered-off"
        assert lives.restarts == 2
        assert rig.vms() == 1
    assert rig.seen == [0, 1, 2]
    assert alive == [0, 0, 0]
    assert rig.moments == [Moment.END] * 3
    assert rig.vms() == 0
    assert all(memory.closed for memory in rig.kernel.memories)


def test_without_reboot_a_reset_is_the_end() -> None:
    rig = Rig(RESET, OFF)
    with Lives(rig.make, reboot=False) as lives:
        assert lives.run(20).kind == "reset"
        assert lives.restarts == 0


def test_the_time_limit_is_for_all_lives_together() -> None:
    with Lives(Rig(RESET, RESET, FOR_EVER).make) as lives:
        assert lives.run(0.2) == Outcome("timeout", "the guest still ran after 0.2 seconds")
        assert lives.restarts == 2
    with Lives(Rig(RESET).make) as lives:
        assert lives.run(0.2).kind == "timeout"
        assert lives.restarts > 2


def test_stop_ends_whichever_life_there_is() -> None:
    rig = Rig(RESET)
    lives: Lives

    def make(life: int) -> Vmm:
        if life == 3:
            stopper.start()
        return rig.make(life)

    stopper = threading.Thread(target=lambda: lives.stop(Outcome("interrupted", "by the test")))
    with Lives(make) as lives:
        assert lives.run(20) == Outcome("interrupted", "by the test")
        stopper.join()
    assert rig.vms() == 0


def test_what_making_a_vm_raises_comes_out() -> None:
    rig = Rig(RESET)

    def make(life: int) -> Vmm:
        if life:
            raise OSError(12, "Cannot allocate memory")
        return rig.make(life)

    with Lives(make) as lives, pytest.raises(OSError, match="allocate"):
        lives.run(20)
    assert rig.vms() == 0


def test_input_that_one_life_did_not_take_goes_to_the_next() -> None:
    got: list[int] = []

    def second() -> Guest:
        got.append((yield Load(UART_BASE, 1)))
        yield power_off()

    rig = Rig(RESET, second)
    given = [b"x"]
    with Lives(partial(rig.make, source=lambda _: given.pop() if given else b"")) as lives:
        assert lives.run(20).kind == "powered-off"
        lives.arrived()
    assert got == [ord("x")]


def test_ctrl_c_while_there_is_no_vm() -> None:
    rig = Rig(RESET)

    def make(life: int) -> Vmm:
        if life:
            raise KeyboardInterrupt
        return rig.make(life)

    with Lives(make) as lives:
        assert lives.run(20).kind == "interrupted"
    assert rig.vms() == 0
