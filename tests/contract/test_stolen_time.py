# SPDX-License-Identifier: GPL-2.0-or-later
"""Stolen time: the attribute, the calls and the structure, with guests that take the CPU from each
other.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pytest

from fakes import a64
from fakes.contract_rig import PAGE, RAM_IPA, errno_of
from fakes.dialect_rig import CODE_IPA, FREE_IPA, host, party
from pkvm import guests
from pkvm.arm64.pvtime import STOLEN_NS, STOLEN_TIME
from pkvm.arm64.smccc import NOT_SUPPORTED, Function
from pkvm.guests.agent import Agent
from pkvm.kvm import Kvm, Mmio, Vcpu, Vm
from pkvm.kvm.kernel import Memory
from pkvm.machine.clock import NS_PER_TICK
from pkvm.uapi import kvm as uapi

FEATURES, ST = Function.PV_TIME_FEATURES, Function.PV_TIME_ST
PLACE = RAM_IPA + 3 * PAGE + 128
STORE_IPA = CODE_IPA + (1 << 20)
"""A store to a device is there."""
SPIN = (0xF100_0400, 0x54FF_FFE1)
"""subs x0, x0, #1; b.ne to it."""


@contextmanager
def plain_vm(
    name: str = "upstream", clock: Literal["real", "virtual"] = "virtual"
) -> Iterator[tuple[Kvm, Vm, Memory]]:
    """A VM that is not protected, with the agent in it."""
    with host(name, clock=clock) as (_, kvm), kvm.create_vm() as vm:
        ram, code = kvm.mmap(64 * PAGE), kvm.mmap(2 << 20)
        code.write(0, guests.image("agent"))
        code.write(
            STORE_IPA - CODE_IPA, a64.code([*a64.mov(3, 0x900_0000), a64.store(0, 3, size=3)])
        )
        vm.set_user_memory_region(0, RAM_IPA, ram)
        vm.set_user_memory_region(1, CODE_IPA, code)
        vm.set_user_memory_region(2, FREE_IPA, kvm.mmap(PAGE), flags=uapi.MemFlag.READONLY)
        yield kvm, vm, ram


def vcpu_of(vm: Vm, index: int = 0, pc: int = CODE_IPA) -> Vcpu:
    vcpu = vm.create_vcpu(index)
    vcpu.init()
    vcpu.set_reg("pc", pc)
    return vcpu


def agent_of(vm: Vm) -> Agent:
    agent = Agent(vcpu_of(vm))
    agent.start()
    return agent


def name_place(agent: Agent, ipa: int) -> None:
    assert isinstance(agent.vcpu, Vcpu)
    agent.vcpu.set_attr(uapi.PVTIME_CTRL, uapi.PVTIME_IPA, ipa)


def counter(agent: Agent) -> int:
    """The guest's CNTVCT_EL0, in nanoseconds."""
    return agent.read_sysreg(3, 3, 14, 0, 2) * NS_PER_TICK


@pytest.mark.parametrize(("name", "there"), [("rfc", False), ("android", True), ("upstream", True)])
def test_the_attribute_of_a_vcpu(name: str, there: bool) -> None:
    with plain_vm(name) as (_, vm, _), vm.create_vcpu(0) as vcpu:
        has = [vcpu.has_attr(group, attr) for group in range(4) for attr in range(2)]
        assert has == [False] * 4 + [there, False] + [False] * 2
        if not there:
            return
        group, attr = uapi.PVTIME_CTRL, uapi.PVTIME_IPA
        assert vcpu.get_attr(group, attr) == (1 << 64) - 1
        for ipa in (PLACE + 8, PLACE + 32, PLACE - 4):
            assert errno_of(vcpu.set_attr, group, attr, ipa) == errno.EINVAL, "64 bytes"
        for ipa in (0, FREE_IPA, RAM_IPA + 64 * PAGE, (1 << 64) - 64):
            assert errno_of(vcpu.set_attr, group, attr, ipa) == errno.EINVAL, "no memory to write"
        vcpu.set_attr(group, attr, PLACE)
        assert vcpu.get_attr(group, attr) == PLACE
        assert errno_of(vcpu.set_attr, group, attr, PLACE) == errno.EEXIST
        assert errno_of(vcpu.set_attr, group, attr, 1) == errno.EINVAL
        assert errno_of(vcpu.set_attr, group, attr + 1, PLACE) == errno.ENXIO


def test_nothing_is_there_before_the_vmm_names_a_place() -> None:
    """As the kernel's log has it: PV_TIME_FEATURES -> -1."""
    with plain_vm() as (_, vm, _):
        agent = agent_of(vm)
        assert agent.hvc(Function.SMCCC_ARCH_FEATURES, FEATURES)[0] == 0
        for call in ((FEATURES, FEATURES), (FEATURES, ST), (ST, 0)):
            assert agent.hvc(*call)[:4] == (NOT_SUPPORTED, 0, 0, 0)


def test_the_calls_and_the_structure() -> None:
    with plain_vm() as (_, vm, ram):
        agent = agent_of(vm)
        name_place(agent, PLACE)
        ram.write(PLACE - RAM_IPA - 64, b"\xff" * 192)
        for call, expected in (
            ((FEATURES, FEATURES), 0),
            ((FEATURES, ST), 0),
            ((FEATURES, Function.KVM_PTP), NOT_SUPPORTED),
            ((ST,), PLACE),
        ):
            assert agent.hvc(*call)[:4] == (expected, 0, 0, 0)
        around = ram.read(PLACE - RAM_IPA - 64, 192)
        assert around == b"\xff" * 64 + STOLEN_TIME.pack(0, 0, 0) + b"\xff" * 64
        assert STOLEN_TIME.size == 64
        assert agent.hvc(ST & ~(1 << 30))[0] == NOT_SUPPORTED, "of 64 bits alone"


def test_what_others_take_is_counted_to_the_nanosecond() -> None:
    """Two vCPUs that both have work all the time: what one sees pass and did not use itself, the
    other one took. In virtual time a block of guest code takes 16 ns."""
    with plain_vm() as (_, vm, ram):
        ram.write(0, a64.code([a64.LOOP]))
        other = vcpu_of(vm, 1, RAM_IPA)
        mine = agent_of(vm)
        name_place(mine, PLACE)
        other.set_attr(uapi.PVTIME_CTRL, uapi.PVTIME_IPA, PLACE + 64)
        assert mine.hvc(ST)[0] == PLACE
        rounds = 1 << 20
        thread = threading.Thread(target=other.run, daemon=True)
        begin, before = counter(mine), mine.load(PLACE + STOLEN_NS)
        thread.start()
        mine.execute(*SPIN, x=(rounds,))
        end, stolen = counter(mine), mine.load(PLACE + STOLEN_NS) - before
        of_other = mine.load(PLACE + 64 + STOLEN_NS)
        other.kick()
        thread.join(60)
        own = end - begin - stolen
        assert rounds * 16 <= own < (rounds + 20_000) * 16
        assert stolen >= rounds * 16 // 2
        assert stolen % NS_PER_TICK == 0
        assert 0 < of_other <= own, "it is told even if it never asked"


@pytest.mark.parametrize("shared", [False, True])
def test_a_protected_guest_of_upstream_is_told_in_a_page_that_it_shares(shared: bool) -> None:
    with party("upstream") as made:
        agent = made.agent()
        agent.store(PLACE, 0x5EC2E7)
        agent.store(PLACE + STOLEN_NS, 7)
        if shared:
            assert agent.hvc(Function.MEM_SHARE, PLACE & -PAGE)[0] == 0
        name_place(agent, PLACE)
        assert agent.hvc(ST)[0] == PLACE
        words = agent.load(PLACE), agent.load(PLACE + STOLEN_NS)
        assert words == ((0, 0) if shared else (0x5EC2E7, 7))
        second = made.vm.create_vcpu(1)
        assert errno_of(second.set_attr, uapi.PVTIME_CTRL, uapi.PVTIME_IPA, PLACE + 64) == 0
        second.close()


@pytest.mark.parametrize("name", ["rfc", "android"])
def test_where_el2_answers_a_guest_never_hears_of_it(name: str) -> None:
    with party(name) as made:
        agent = made.agent()
        if name == "android":
            name_place(agent, PLACE)
        for call in ((FEATURES, ST), (ST,), (Function.SMCCC_ARCH_FEATURES, FEATURES)):
            assert agent.hvc(*call)[0] == NOT_SUPPORTED


def test_a_place_that_went_away_is_no_trouble() -> None:
    with plain_vm() as (_, vm, ram):
        other = vcpu_of(vm, 1, STORE_IPA)
        mine = agent_of(vm)
        name_place(mine, PLACE)
        assert mine.hvc(ST)[0] == PLACE
        vm.set_user_memory_region(0, RAM_IPA, None)
        ram.close()
        assert isinstance(other.run(), Mmio), "another vCPU has the CPU meanwhile"
        assert mine.hvc(ST)[0] == PLACE
