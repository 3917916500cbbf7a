# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of a VM at any exit and in the middle of a run; and a host whose other CPUs write to what
it shares with EL2 all the time.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from fakes import a64
from fakes.el2_rig import (
    INCREMENT_PC,
    NOWHERE,
    PAGE,
    RAM_IPA,
    El2,
    Guest,
)
from pkvm.arm64.psci import Function as Psci
from pkvm.arm64.registers import CNTP_CTL_EL0
from pkvm.arm64.smccc import Function
from pkvm.check.census import census
from pkvm.events import Event
from pkvm.hyp.abi import HOST_CALL_BASE, VCPU_AREA_BYTES, ExitCode, HostCall, HostVcpu, HostVm
from pkvm.hyp.policy import ANDROID, RFC, UPSTREAM, Policy
from pkvm.machine.cpu.engine import StopReason

POLICIES = [RFC, ANDROID, UPSTREAM]


def hvc(function: int, *args: int) -> list[int]:
    return [
        *(
            word
            for number, value in enumerate((function, *args))
            for word in a64.mov(number, value)
        ),
        a64.HVC,
    ]


PROGRAMS = {
    "never ran": [],
    "wait": [a64.WFI],
    "load from a device": [*a64.mov(9, NOWHERE), a64.load(1, 9, size=3)],
    "store to a device": [*a64.mov(9, NOWHERE), a64.store(1, 9, size=3)],
    "fetch from nowhere": [*a64.mov(9, NOWHERE), a64.br(9)],
    "trapped register": [a64.mrs(5, CNTP_CTL_EL0)],
    "another vCPU on": hvc(Psci.CPU_ON_64, 1, RAM_IPA, 0),
    "this vCPU off": hvc(Psci.CPU_OFF),
    "suspend": hvc(Psci.CPU_SUSPEND_64),
    "system off": hvc(Psci.SYSTEM_OFF),
    "random numbers": hvc(Function.TRNG_RND64, 64),
    "table pages wanted": hvc(Function.MEM_SHARE, RAM_IPA + 5 * PAGE),
    "memory shared": [*hvc(Function.MEM_SHARE, RAM_IPA + 5 * PAGE), a64.WFI],
    "interrupted": [a64.LOOP],
}
"""What a guest does last."""


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("last", PROGRAMS)
@pytest.mark.parametrize("protected", [True, False], ids=["protected", "plain"])
def test_the_end_after_any_exit(policy: Policy, last: str, protected: bool) -> None:
    el2 = El2(policy=policy)
    block = last == "table pages wanted" and protected
    start = census(el2.hyp.mem, [])
    guest = Guest(
        el2, PROGRAMS[last], vcpus=2, created_vcpus=3, block=block, protected=protected,
        tables=3 if block else 8,
    )  # fmt: skip
    if last != "never ran":
        guest.load()
        if last == "interrupted":
            el2.engine.interrupt()
        assert el2.call(HostCall.VCPU_RUN, 0, 0, 0) >= 0
        el2.assert_refused(errno.EINVAL, HostCall.START_TEARDOWN_VM, guest.handle)
        el2.call(HostCall.VCPU_PUT)
    handle, page = guest.handle, guest.page
    early = [
        (HostCall.FINALIZE_TEARDOWN_VM, handle),
        (HostCall.RECLAIM_DYING_GUEST_PAGE, handle, RAM_IPA >> 12),
        (HostCall.RECLAIM_DYING_GUEST_RANGE, handle, 0, 1 << 28),
    ]
    for call, *args in early:
        el2.assert_refused(errno.EINVAL, HostCall(call), *args, check_name="dying")
    el2.call(HostCall.START_TEARDOWN_VM, handle)
    _nothing_goes_any_more(el2, guest)
    if protected:
        one = (HostCall.RECLAIM_DYING_GUEST_PAGE, handle, (RAM_IPA >> 12) + 2)
        if block:
            el2.assert_refused(errno.ENOMEM, *one, check_name="memcache")
        else:
            el2.call(*one)
        el2.sound()
        el2.assert_refused(errno.EBUSY, HostCall.FINALIZE_TEARDOWN_VM, handle)
        el2.call(HostCall.RECLAIM_DYING_GUEST_RANGE, handle, 0, 1 << 28)
    else:
        el2.assert_refused(errno.EBUSY, HostCall.FINALIZE_TEARDOWN_VM, handle)
        for gfn in range(RAM_IPA >> 12, (RAM_IPA >> 12) + guest.ram_pages):
            el2.call(HostCall.HOST_UNSHARE_GUEST, handle, gfn, 1)
    el2.call(HostCall.FINALIZE_TEARDOWN_VM, handle)
    el2.sound()
    for pa in (page, *guest.vcpus):
        el2.call(HostCall.HOST_UNSHARE_HYP, pa >> 12)
    assert census(el2.hyp.mem, el2.hyp.vms()) == start
    el2.assert_refused(errno.EINVAL, HostCall.FINALIZE_TEARDOWN_VM, handle)
    following = Guest(el2, [a64.WFI])
    assert following.handle == handle
    assert following.run() == ExitCode.TRAP, "nothing of the old one is in its way"
    el2.machine.close()


def _nothing_goes_any_more(el2: El2, guest: Guest) -> None:
    """Of a VM that dies."""
    handle, free = guest.handle, el2.pages(8)
    el2.call(HostCall.VCPU_LOAD, handle, 0, 0)
    el2.assert_refused(errno.EINVAL, HostCall.VCPU_RUN)
    el2.assert_refused(errno.EINVAL, HostCall.START_TEARDOWN_VM, handle)
    gone = [
        (HostCall.TOPUP_MEMCACHE, handle, free, 1),
        (HostCall.INIT_VCPU, handle, el2.shared_page({HostVcpu.VCPU_ID: 2}), free),
    ]
    if guest.protected:
        gone.append((HostCall.DONATE_GUEST_SGLIST, handle, el2.list_page((free, 0, 1)), 1))
    for call, *args in gone:
        tables = call != HostCall.INIT_VCPU
        el2.assert_refused(errno.ENOENT, HostCall(call), *args, tables=tables)
    for pa in (guest.page, *guest.vcpus):
        el2.assert_refused(errno.EBUSY, HostCall.HOST_UNSHARE_HYP, pa >> 12)
    page = gone[1][2]
    el2.call(HostCall.HOST_UNSHARE_HYP, page >> 12)


# Another CPU of the host's, while one of its CPUs is in the guest


@contextmanager
def while_it_runs(el2: El2, act: Callable[[], None]) -> Iterator[None]:
    """`act` whenever the CPU is about to execute guest code: EL2's lock is free then."""
    engine, run = el2.engine, el2.engine.run

    def interleaved() -> StopReason:
        act()
        return run()

    engine.run = interleaved  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.run = run  # type: ignore[method-assign]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_calls_in_the_middle_of_a_run(policy: Policy) -> None:
    el2 = El2(policy=policy)
    guest = Guest(el2, [*a64.mov(9, 0x5EC2E7), a64.WFI], vcpus=2)
    free = el2.pages(8)
    handle, ram = guest.handle, guest.ram
    refused = [
        (errno.EINVAL, HostCall.VCPU_RUN),
        (errno.EINVAL, HostCall.START_TEARDOWN_VM, handle),
        (errno.EINVAL, HostCall.FINALIZE_TEARDOWN_VM, handle),
        (errno.EINVAL, HostCall.RECLAIM_DYING_GUEST_PAGE, handle, RAM_IPA >> 12),
        (errno.EINVAL, HostCall.RECLAIM_DYING_GUEST_RANGE, handle, RAM_IPA >> 12, 1),
        (errno.EINVAL, HostCall.HOST_DONATE_GUEST, free >> 12, (RAM_IPA >> 12) + 100, 1),
        (errno.EINVAL, HostCall.HOST_SHARE_GUEST, free >> 12, (RAM_IPA >> 12) + 100, 1, 7),
        (errno.EINVAL, HostCall.VCPU_SYNC_STATE),
        (errno.EINVAL, HostCall.VCPU_IN_POISON_FAULT),
        (errno.EBUSY, HostCall.HOST_UNSHARE_HYP, guest.page >> 12),
        (errno.EBUSY, HostCall.HOST_UNSHARE_HYP, guest.vcpus[0] >> 12),
        (errno.EPERM, HostCall.HOST_SHARE_HYP, ram >> 12),
    ]
    acted = 0

    def act() -> None:
        nonlocal acted
        acted += 1
        for number, call, *args in refused:
            el2.assert_refused(number, HostCall(call), *args)
        with el2.unchanged():
            el2.call(HostCall.VCPU_PUT)
            el2.call(HostCall.VCPU_LOAD, handle, 1, 0)
        assert el2.call(HostCall.TOPUP_MEMCACHE, handle, el2.link([el2.pages()]), 1) == 1

    with while_it_runs(el2, act):
        assert guest.run() == ExitCode.TRAP
    assert acted == 1
    assert el2.engine.x[9] == 0x5EC2E7
    el2.sound()
    guest.end()
    el2.machine.close()


@dataclass
class Scribbler:
    """Writes noise over pages of the host's whenever EL2 says something, and while guests run."""

    el2: El2
    rng: random.Random
    pages: list[int]
    inner: Callable[[Event], None]
    busy: bool = False

    def record(self, event: Event, /) -> None:
        self.inner(event)
        self.scribble()

    def scribble(self) -> None:
        if not self.busy:
            self.busy = True
            for pa in self.pages:
                self.el2.machine.memory.write(pa, self.rng.randbytes(PAGE))
            self.busy = False


@contextmanager
def scribbling(el2: El2, seed: int, *pages: int) -> Iterator[Scribbler]:
    scribbler = Scribbler(el2, random.Random(seed), [*pages], el2.recorder.record)
    el2.recorder.record = scribbler.record  # type: ignore[method-assign]
    with while_it_runs(el2, scribbler.scribble):
        yield scribbler
    el2.recorder.record = scribbler.inner  # type: ignore[method-assign]


WORK = [
    *a64.mov(20, RAM_IPA + PAGE),
    *a64.mov(5, 0x1111),
    a64.WFI,
    a64.store(5, 20, size=3),
    *hvc(Function.MEM_SHARE, RAM_IPA + 2 * PAGE, 1, 0),
    a64.store(0, 20, size=3),
    a64.WFI,
    *hvc(Function.MEM_SHARE, RAM_IPA + 2 * PAGE, 1, 0),
    a64.store(0, 20, size=2),
    *hvc(Psci.AFFINITY_INFO_64, 1, 0),
    a64.store(0, 20, size=2),
    *hvc(Function.MEM_UNSHARE, RAM_IPA + 2 * PAGE, 1, 0),
    *a64.mov(21, RAM_IPA + PAGE + 64),
    a64.store(0, 21, size=3),
    a64.store(5, 21, size=3),
    a64.WFI,
    a64.LOOP,
]
"""Waits three times, and leaves results in its second page."""


def _work(policy: Policy, seed: int | None) -> bytes:
    """The guest's second page and registers after its work, with or without scribbling."""
    el2 = El2(policy=policy)
    guest = Guest(el2, WORK, vcpus=2)
    code = guest.run()
    pages = (guest.page, *guest.vcpus) if seed is not None else ()
    with scribbling(el2, seed or 0, *pages):
        for _ in range(2):
            assert code == ExitCode.TRAP
            code = guest.run(flags=INCREMENT_PC)
            el2.sound()
    memory = el2.machine.memory.read(guest.ram + PAGE, PAGE)
    registers = el2.engine.x[:31].tobytes()
    el2.machine.close()
    return memory + registers


@pytest.mark.parametrize("policy", [RFC, ANDROID], ids=lambda policy: policy.name)
def test_a_guest_does_not_notice_who_writes_to_the_hosts_pages(policy: Policy) -> None:
    quiet = _work(policy, None)
    assert quiet[:8] != bytes(8)
    for seed in range(5):
        assert _work(policy, seed) == quiet


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("seed", range(8))
def test_el2_lives_with_pages_that_change_under_its_hands(policy: Policy, seed: int) -> None:
    """VMs and vCPUs are made, loaded, run and ended from pages that change all the time: each call
    does what its words said at one moment, or is refused."""
    el2 = El2(policy=policy)
    rng = random.Random(seed)
    start = census(el2.hyp.mem, [])
    handles = [el2.call(HostCall.RESERVE_VM) for _ in range(3)]
    root = el2.call(HostCall.PGD_INFO)
    shared: list[int] = []
    made: list[int] = []
    with scribbling(el2, seed) as scribbler:
        for handle in handles:
            words = {HostVm.HANDLE: handle, HostVm.PROTECTED: 1, HostVm.CREATED_VCPUS: 2}
            page = el2.shared_page(words)
            shared.append(page)
            scribbler.pages.append(page)
            area, pgd = el2.pages(), el2.pages(root // PAGE, align=root)
            assert el2.x1(HostCall.INIT_VM, page, area, pgd) == 0, "it had been read before"
            vm = el2.vm(handle)
            assert (vm.protected, len(vm.vcpus)) == (True, 2)
            made.append(handle)
            for index in range(2):
                pa = el2.shared_page({HostVcpu.VCPU_ID: index, HostVcpu.VCPU_IDX: index})
                shared.append(pa)
                scribbler.pages.append(pa)
                area = el2.pages(VCPU_AREA_BYTES // PAGE)
                el2.x1(HostCall.INIT_VCPU, handle, pa, area)
                el2.sound()
        for handle in made * 2:
            el2.x1(HostCall.VCPU_LOAD, handle, rng.randrange(2), 0)
            el2.engine.interrupt()
            result = el2.hyp.host_call(HOST_CALL_BASE + HostCall.VCPU_RUN, 12, 0, 0)[1]
            assert result in (*ExitCode, -errno.EINVAL)
            el2.call(HostCall.VCPU_PUT)
            el2.sound()
        for handle in made:
            el2.call(HostCall.START_TEARDOWN_VM, handle)
            el2.call(HostCall.FINALIZE_TEARDOWN_VM, handle)
    for pa in shared:
        el2.call(HostCall.HOST_UNSHARE_HYP, pa >> 12)
    assert census(el2.hyp.mem, el2.hyp.vms()) == start
    el2.sound()
    el2.machine.close()
