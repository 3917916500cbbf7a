# SPDX-License-Identifier: GPL-2.0-or-later
"""A real EL2 with a firmware and a secure world behind it, and a host that makes SMCs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fakes.el2_rig import PAGE, El2
from pkvm.arm64 import ffa
from pkvm.arm64.ffa import Function, Registers, Status
from pkvm.check.firmware_doors import check_doors
from pkvm.check.invariants import check_hyp
from pkvm.host.ffa import FfaCallError, FfaDriver
from pkvm.hyp.policy import RFC, Policy
from pkvm.machine.secure import PARTITIONS, SecureWorld

SP, OTHER_SP = PARTITIONS


class Doors(El2):
    """The El2 rig, and its host's SMCs."""

    def __init__(self, *, policy: Policy = RFC, protected: bool = True) -> None:
        super().__init__(policy=policy, protected=protected)
        self.seen: list[Registers] = []
        """What EL3 got to see."""
        call = self.machine.firmware.call

        def watched(cpu: object, registers: Registers) -> Registers:
            self.seen.append(registers)
            return call(cpu, registers)  # type: ignore[arg-type]

        self.machine.firmware.call = watched  # type: ignore[method-assign]

    @property
    def secure(self) -> SecureWorld:
        return self.machine.firmware.secure

    def smc(self, *numbers: int, immediate: int = 0, cpu: int = 0) -> Registers:
        return self.machine.smc(ffa.registers(*numbers), immediate, cpu)

    def driver(self, version: int = ffa.VERSION_1_2, *, mapped: bool = True) -> FfaDriver:
        """The host's FF-A driver, with pages of its own."""
        driver = FfaDriver(self.machine.smc, self.bus, self.pages(), self.pages(), version)
        if mapped:
            driver.map_buffers()
        return driver

    def problems(self) -> list[str]:
        """What does not hold, by every check there is."""
        held = self.secure.grants.pages()
        return check_hyp(self.hyp, held) + check_doors(self.hyp, self.machine)

    def sound(self) -> None:
        assert self.problems() == []

    @contextmanager
    def nothing_changes(self) -> Iterator[None]:
        """Neither EL2's records nor what the secure world has."""
        grants = dict(self.secure.grants.by_handle)
        with self.unchanged():
            yield
        assert self.secure.grants.by_handle == grants
        self.sound()

    @contextmanager
    def refused(self, status: Status, check_name: str = "") -> Iterator[None]:
        """An FF-A error, announced if EL2's, that has changed nothing."""
        known = len(self.refusals())
        with self.nothing_changes(), pytest.raises(FfaCallError) as error:
            yield
        assert error.value.status == status
        if check_name:
            assert [refusal.check for refusal in self.refusals()[known:]] == [check_name]


__all__ = ["OTHER_SP", "PAGE", "SP", "Doors", "Function"]
