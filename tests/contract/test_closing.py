# SPDX-License-Identifier: GPL-2.0-or-later
"""A VMM that goes away: descriptors and mappings closed in any order, also while vCPUs are in
KVM_RUN. What is left works or is refused, and at the end nothing is lost (`running_system`).
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.contract_rig import RAM_IPA
from fakes.dialect_rig import Party, party
from pkvm.check.invariants import check_hyp
from pkvm.guests.agent import Agent, AgentExitError
from pkvm.kvm import Intr
from pkvm.uapi import kvm as uapi

TIMEOUT_S = 30
ENDS = 8
"""How many things there are to close."""
COUNT = (0x9100_0400, 0xEB01_001F, 0x54FF_FFC1)
"""add x0, x0, #1; cmp x0, x1; b.ne to the first."""


@dataclass
class Scene:
    """A VM with two vCPUs and an interrupt controller; vCPU 1 waits to be turned on."""

    made: Party
    agent: Agent
    ends: dict[str, Callable[[], object]] = field(default_factory=dict)
    threads: list[threading.Thread] = field(default_factory=list)
    results: list[int] = field(default_factory=list)

    def run_in_thread(self, fd: int) -> None:
        """KVM_RUN until it ends."""
        kernel = self.made.kvm.kernel

        def body() -> None:
            try:
                kernel.ioctl(fd, uapi.Ioctl.RUN)
                self.results.append(0)
            except OSError as error:
                self.results.append(error.errno or 0)

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        self.threads.append(thread)

    def check(self) -> None:
        assert check_hyp(self.made.system.hyp) == []


@contextmanager
def scene(name: str, *, running: bool) -> Iterator[Scene]:
    with party(name) as made:
        vm, kernel = made.vm, made.kvm.kernel
        gic = vm.create_device(uapi.DeviceType.ARM_VGIC_V3)
        first = made.vcpu()
        second = made.vcpu(1, power_off=True)
        for address, ipa in ((uapi.VgicAddr.DIST, 0x800_0000), (uapi.VgicAddr.REDIST, 0x80A_0000)):
            gic.set_attr(uapi.VgicGroup.ADDR, address, ipa)
        gic.set_attr(uapi.VgicGroup.CTRL, uapi.VgicCtrl.INIT)
        agent = Agent(first)
        agent.start()
        agent.store(RAM_IPA, 0x5EC2E7)
        one = Scene(made, agent)
        page = kernel.mmap_vcpu(first.fd, 8192)
        one.ends = {
            "vm": vm.close, "first": first.close, "second": second.close, "gic": gic.close,
            "page": page.close, "ram": made.ram.close, "code": made.code.close,
            "kvm": made.kvm.close,
        }  # fmt: skip
        if running:
            one.run_in_thread(second.fd)
        yield one
        for end in one.ends.values():
            end()
        for thread in one.threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
        assert set(one.results) <= {errno.EINTR, errno.EBADF}


@pytest.mark.parametrize("name", ["rfc", "android", "upstream"])
@settings(
    max_examples=15, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(order=st.permutations(range(ENDS)), running=st.booleans())
def test_in_any_order(name: str, order: list[int], running: bool) -> None:
    """After each step the guest, while it can be run, still has what it stored."""
    with scene(name, running=running) as one:
        assert len(one.ends) == ENDS
        names = [[*one.ends][index] for index in order]
        for at, what in enumerate(names):
            one.ends[what]()
            one.check()
            if "first" not in names[: at + 1]:
                assert one.agent.load(RAM_IPA) == 0x5EC2E7
        one.check()


@pytest.mark.parametrize("name", ["rfc", "android", "upstream"])
@pytest.mark.parametrize("what", ["vm", "second", "page", "ram", "code", "gic", "kvm"])
def test_under_a_guest_that_runs(name: str, what: str) -> None:
    """It spins and notices nothing, until a kick ends it."""
    with scene(name, running=False) as one:
        left: list[object] = []

        def spin() -> None:
            with pytest.raises(AgentExitError) as end:
                one.agent.execute(*COUNT, x=(0, 1 << 40))
            left.append(end.value.exit)

        thread = threading.Thread(target=spin, daemon=True)
        thread.start()
        one.threads.append(thread)
        one.ends[what]()
        one.check()
        one.made.vcpus[0].kick()
        thread.join(TIMEOUT_S)
        assert left == [Intr()]
        one.check()
