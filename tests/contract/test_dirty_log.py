# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty logs of a VM that is not protected: exactly the pages that its guest wrote to."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.contract_rig import PAGE, RAM_IPA, errno_of
from fakes.dialect_rig import CODE_IPA, FREE_IPA, host
from pkvm import guests
from pkvm.check.invariants import check_hyp
from pkvm.guests.agent import Agent
from pkvm.kvm import Kvm, Vcpu, Vm
from pkvm.kvm.kernel import Memory
from pkvm.system import System
from pkvm.uapi import kvm as uapi

PAGES = 1024
"""Of the slot: two blocks of 2 MiB."""
SLOT = 0
LOG = uapi.MemFlag.LOG_DIRTY_PAGES


@dataclass
class Logged:
    """A VM whose slot SLOT may have a log, and the agent in it."""

    system: System
    kvm: Kvm
    vm: Vm
    ram: Memory
    agent: Agent
    bitmap: Memory
    model: set[int] = field(default_factory=set)
    logging: bool = False

    def log(self, on: bool) -> None:
        self.vm.set_user_memory_region(SLOT, RAM_IPA, self.ram, flags=LOG if on else 0)
        if on != self.logging:
            self.model.clear()
        self.logging = on

    def load(self, page: int) -> int:
        return self.agent.load(RAM_IPA + page * PAGE)

    def store(self, page: int, value: int) -> None:
        self.agent.store(RAM_IPA + page * PAGE + 8, value)
        if self.logging:
            self.model.add(page)

    def request(self, slot: int = SLOT, address: int | None = None) -> int:
        where = self.bitmap.address if address is None else address
        argument = bytearray(uapi.DIRTY_LOG.pack(slot, 0, where))
        return errno_of(self.kvm.kernel.ioctl, self.vm.fd, uapi.Ioctl.GET_DIRTY_LOG, argument)

    def check(self) -> None:
        """Ask for the log."""
        assert self.request() == (0 if self.logging else errno.ENOENT)
        if self.logging:
            bits = int.from_bytes(self.bitmap.read(0, PAGES // 8), "little")
            assert {page for page in range(PAGES) if bits >> page & 1} == self.model
            self.model.clear()
        assert check_hyp(self.system.hyp) == []


@contextmanager
def logged(name: str = "upstream", *, misalign: bool = False) -> Iterator[Logged]:
    with host(name, misalign=misalign) as (system, kvm), kvm.create_vm() as vm:
        ram, code = kvm.mmap(PAGES * PAGE), kvm.mmap(2 << 20)
        code.write(0, guests.image("agent"))
        vm.set_user_memory_region(SLOT, RAM_IPA, ram)
        vm.set_user_memory_region(1, CODE_IPA, code)
        vcpu = vm.create_vcpu(0)
        vcpu.init()
        vcpu.set_reg("pc", CODE_IPA)
        agent = Agent(vcpu)
        agent.start()
        yield Logged(system, kvm, vm, ram, agent, kvm.mmap(PAGE))


@pytest.mark.parametrize("name", ["rfc", "android", "upstream"])
@pytest.mark.parametrize("misalign", [False, True], ids=["blocks", "pages"])
def test_the_log_step_by_step(name: str, misalign: bool) -> None:
    with logged(name, misalign=misalign) as made:
        made.store(3, 33)
        assert made.request() == errno.ENOENT
        made.log(True)
        made.check()  # clean, though a page was written to before
        assert made.load(3) == made.load(4) == 0
        made.check()  # who reads leaves no trace
        for page in (0, 3, 511, 512, 1023, 3):
            made.store(page, page)
        made.ram.write(700 * PAGE, b"the VMM's own stores are not the guest's")
        assert made.request(address=8) == errno.EFAULT  # nothing is lost by it
        made.check()
        made.check()
        made.store(511, 1)
        made.check()
        assert made.request(slot=1) == made.request(slot=9) == errno.ENOENT
        made.store(7, 1)
        made.log(False)
        made.store(8, 1)
        made.check()
        made.log(True)
        made.check()
        assert [made.agent.load(RAM_IPA + page * PAGE + 8) for page in (3, 7, 8)] == [3, 1, 1]


def test_a_slot_that_moves_or_goes_has_another_log_or_none() -> None:
    with logged() as made:
        made.log(True)
        made.store(5, 5)
        made.vm.set_user_memory_region(SLOT, FREE_IPA, made.ram, flags=LOG)
        made.model.clear()
        made.check()
        made.agent.store(FREE_IPA + 6 * PAGE, 6)
        made.model.add(6)
        made.check()
        made.vm.set_user_memory_region(SLOT, FREE_IPA, None)
        assert made.request() == errno.ENOENT
        made.vm.set_user_memory_region(SLOT, RAM_IPA, made.ram, flags=LOG)
        made.check()
        assert made.agent.load(RAM_IPA + 6 * PAGE) == 6


def test_what_the_kernel_writes_for_the_guest_is_in_the_log() -> None:
    with logged() as made:
        made.log(True)
        first = made.agent.vcpu
        assert isinstance(first, Vcpu)
        first.set_attr(uapi.PVTIME_CTRL, uapi.PVTIME_IPA, RAM_IPA + 9 * PAGE)
        made.check()
        assert made.agent.hvc(0xC500_0021)[0] == RAM_IPA + 9 * PAGE
        made.model.add(9)
        made.check()


def bits(made: Logged) -> set[int]:
    """The log, asked for."""
    assert made.request() == 0
    found = int.from_bytes(made.bitmap.read(0, PAGES // 8), "little")
    return {page for page in range(PAGES) if found >> page & 1}


def clear(made: Logged, first: int, npages: int, pages: set[int], slot: int = SLOT) -> int:
    """KVM_CLEAR_DIRTY_LOG of `pages` among [first, first + npages); the errno."""
    bitmap = sum(1 << page - first for page in pages)
    made.bitmap.write(0, bitmap.to_bytes(PAGES // 8, "little"))
    argument = bytearray(uapi.CLEAR_DIRTY_LOG.pack(slot, npages, first, made.bitmap.address))
    return errno_of(made.kvm.kernel.ioctl, made.vm.fd, uapi.Ioctl.CLEAR_DIRTY_LOG, argument)


@pytest.mark.parametrize("misalign", [False, True], ids=["blocks", "pages"])
def test_a_log_that_is_cleared_by_hand(misalign: bool) -> None:
    cap = uapi.Cap.MANUAL_DIRTY_LOG_PROTECT2
    with logged(misalign=misalign) as made:
        for value in (2, 4, 1 << 63):
            assert errno_of(made.vm.enable_cap, cap, 0, (value,)) == errno.EINVAL
        assert errno_of(made.vm.enable_cap, cap, 1, (1,)) == errno.EINVAL
        made.vm.enable_cap(cap, 0, (uapi.DIRTY_LOG_MANUAL_PROTECT_ENABLE,))
        made.log(True)
        for page in (0, 70, 600):
            made.store(page, 1)
        assert bits(made) == bits(made) == {0, 70, 600}
        assert clear(made, 64, 64, {70, 71}) == 0
        assert bits(made) == {0, 600}
        made.store(70, 2)
        made.store(71, 2)
        assert bits(made) == {0, 70, 71, 600}
        assert clear(made, 576, PAGES - 576, {600}) == clear(made, 0, 64, set()) == 0
        assert bits(made) == {0, 70, 71}
        for first, npages in ((1, 64), (0, 63), (64, PAGES), (PAGES + 64, 0), ((1 << 63), 64)):
            assert clear(made, first, npages, set()) == errno.EINVAL
        for slot in (1, 9):
            assert clear(made, 0, 64, set(), slot) == errno.ENOENT
        assert check_hyp(made.system.hyp) == []


@pytest.mark.parametrize("misalign", [False, True], ids=["blocks", "pages"])
def test_a_log_that_begins_with_every_page(misalign: bool) -> None:
    both = uapi.DIRTY_LOG_MANUAL_PROTECT_ENABLE | uapi.DIRTY_LOG_INITIALLY_SET
    with logged(misalign=misalign) as made:
        made.store(5, 1)
        made.vm.enable_cap(uapi.Cap.MANUAL_DIRTY_LOG_PROTECT2, 0, (both,))
        made.log(True)
        assert bits(made) == set(range(PAGES))
        assert clear(made, 0, PAGES, set(range(10, PAGES))) == 0
        assert bits(made) == set(range(10))
        for page in (5, 11, 513):
            made.store(page, 2)
        assert bits(made) == {*range(10), 11, 513}
        assert check_hyp(made.system.hyp) == []


TOUCHED = (0, 1, 511, 512)
acts = st.one_of(
    st.tuples(st.sampled_from(["load", "store", "store"]), st.sampled_from(TOUCHED)),
    st.tuples(st.just("ask"), st.just(0)),
    st.tuples(st.just("log"), st.integers(0, 1)),
)


@pytest.mark.parametrize("misalign", [False, True], ids=["blocks", "pages"])
@settings(
    max_examples=25, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(todo=st.lists(acts, min_size=15, max_size=30))
def test_the_log_is_what_the_guest_wrote(misalign: bool, todo: list[tuple[str, int]]) -> None:
    """Whatever happens in between; the memory keeps what was stored."""
    contents = dict.fromkeys(range(PAGES), 0)
    with logged(misalign=misalign) as made:
        made.log(True)
        for number, (act, value) in enumerate(todo, 1):
            if act == "store":
                made.store(value, number)
                contents[value] = number
            elif act == "load":
                made.load(value)
            elif act == "log":
                made.log(bool(value))
            else:
                made.check()
        made.check()
        for page in TOUCHED:
            assert made.agent.load(RAM_IPA + page * PAGE + 8) == contents[page]
