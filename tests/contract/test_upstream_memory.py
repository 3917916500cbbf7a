# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory of a guest's that its VMM changes meanwhile, in the `upstream` dialect: nothing leaks, and
what EL2 knows of every page stays true.

What each call returns, the scenarios and the record of a real kernel say.
"""

from __future__ import annotations

import errno
from contextlib import suppress

import pytest

from fakes.contract_rig import PAGE, RAM_IPA, errno_of
from fakes.dialect_rig import CODE_IPA, FREE_IPA, host, party
from pkvm import guests
from pkvm.check.invariants import check
from pkvm.guests.agent import Agent
from pkvm.kvm import Kvm, Vcpu
from pkvm.kvm.kernel import Memory
from pkvm.system import System
from pkvm.uapi import kvm as uapi
from pkvm.uapi.errors import ProtectedPageError
from pkvm.uapi.memory import Backing, Change, Forced, SystemCall

SECRET = 0x5EC2_E75E_C2E7


def guest_on(kvm: Kvm, ram: Memory, *, protected: bool = True) -> tuple[Agent, Vcpu]:
    """The agent in a VM whose RAM is `ram`, and its vCPU."""
    vm = kvm.create_vm(uapi.TYPE_PROTECTED * protected)
    code = kvm.mmap(2 << 20)
    code.write(0, guests.image("agent"))
    vm.set_user_memory_region(0, CODE_IPA, code)
    vm.set_user_memory_region(1, RAM_IPA, ram)
    vcpu = vm.create_vcpu(0)
    vcpu.init()
    vcpu.set_reg("pc", CODE_IPA)
    agent = Agent(vcpu)
    agent.start()
    return agent, vcpu


def sees_nothing(system: System, memory: Memory, offset: int) -> None:
    """The host gets no byte of the secret out of this page, by whatever it does."""
    for read in (memory.read, memory.syscall_read):
        seen = bytes(8)
        with suppress(OSError):
            seen = read(offset, 8)
        assert seen == bytes(8)
    for call in SystemCall:
        if not call.writes:
            assert errno_of(memory.system_call, call, offset, 8) in (0, errno.EFAULT, errno.ENOENT)
    assert check(system.hyp.mem, system.hyp.vms()) == []


@pytest.mark.parametrize("what", Change)
@pytest.mark.parametrize("backing", [Backing.ANONYMOUS, Backing.MEMFD, Backing.MEMFD_PRIVATE])
def test_no_change_shows_a_private_page(backing: Backing, what: Change) -> None:
    with host("upstream") as (system, kvm):
        ram = kvm.kernel.mmap(4 * PAGE, backing)
        agent, _ = guest_on(kvm, ram)
        agent.store(RAM_IPA, SECRET)
        agent.store(RAM_IPA + PAGE, SECRET)
        errno_of(ram.change, what, 0, PAGE)
        for page in range(2):
            sees_nothing(system, ram, page * PAGE)
            assert agent.load(RAM_IPA + page * PAGE) == SECRET
        if backing.has_file:
            alias = ram.alias()
            sees_nothing(system, alias, PAGE)
            assert alias.forced_read(PAGE, 8, Forced.FILE) == bytes(8)
            sees_nothing(system, alias, PAGE)


def test_what_was_moved_and_mapped_over_comes_back_wiped() -> None:
    with host("upstream") as (system, kvm):
        free = system.host.free_pages
        ram = kvm.mmap(4 * PAGE)
        agent, vcpu = guest_on(kvm, ram)
        agent.store(RAM_IPA, SECRET)
        moved = ram.move(0, PAGE)
        with pytest.raises(ProtectedPageError) as refused:
            moved.read(16, 8)
        assert refused.value.address == moved.address + 16
        ram.change(Change.REPLACE, 0, PAGE)
        ram.write(0, b"another page")
        assert agent.load(RAM_IPA) == SECRET
        vcpu.close()
        vcpu.vm.close()
        assert moved.read(0, 8) == bytes(8)
        assert ram.read(0, 12) == b"another page"
        ram.close()
        moved.close()
        assert check(system.hyp.mem, system.hyp.vms()) == []
        assert system.host.free_pages > free - 1024


def test_fork_takes_what_children_get_and_no_more() -> None:
    with party("upstream") as made:
        agent = made.agent()
        for page in range(4):
            agent.store(RAM_IPA + page * PAGE, SECRET)
        made.kvm.kernel.fork()
        assert agent.load(RAM_IPA) == SECRET
        made.ram.change(Change.DOFORK, PAGE, 2 * PAGE)
        made.kvm.kernel.fork()
        assert made.ram.read(PAGE, 2 * PAGE) == bytes(2 * PAGE)
        for page in (0, 3):
            assert agent.load(RAM_IPA + page * PAGE) == SECRET
        assert errno_of(agent.load, RAM_IPA + PAGE) == errno.EFAULT
        assert check(made.system.hyp.mem, made.system.hyp.vms()) == []


def test_a_plain_guest_follows_its_vmm() -> None:
    with host("upstream") as (system, kvm):
        ram = kvm.mmap(4 << 20)
        agent, _ = guest_on(kvm, ram, protected=False)
        agent.store(RAM_IPA, 1)
        agent.store(RAM_IPA + (2 << 20), 2)
        ram.change(Change.REPLACE, 0, PAGE)
        assert agent.load(RAM_IPA) == 0
        assert agent.load(RAM_IPA + (2 << 20)) == 2
        ram.change(Change.READ_ONLY, 0, PAGE)
        assert agent.load(RAM_IPA) == 0
        assert errno_of(agent.store, RAM_IPA, 3) == errno.EFAULT
        ram.change(Change.READ_WRITE, 0, PAGE)
        agent.resume()
        assert ram.read(0, 1) == b"\3"
        assert check(system.hyp.mem, system.hyp.vms()) == []


def test_the_limit_of_locked_memory_goes_back_to_what_it_was() -> None:
    with party("upstream", memlock=64 * PAGE) as made:
        agent = made.agent()
        kernel = made.kvm.kernel
        kernel.limit_memlock(0)
        assert errno_of(agent.load, RAM_IPA) == errno.ENOMEM
        kernel.limit_memlock(None)
        assert made.system.host.memlock.limit == 64 * PAGE
        assert agent.resume().results[0] == RAM_IPA


def test_a_second_slot_on_the_same_memory_is_no_way_round() -> None:
    with party("upstream") as made:
        made.vm.set_user_memory_region(5, FREE_IPA, made.ram)
        agent = made.agent()
        agent.store(RAM_IPA, SECRET)
        made.ram.change(Change.DONTNEED, 0, PAGE)
        assert agent.load(FREE_IPA) == 0, "the page that is there now"
        assert agent.load(RAM_IPA) == SECRET
        assert check(made.system.hyp.mem, made.system.hyp.vms()) == []
