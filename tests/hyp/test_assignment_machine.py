# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices given, attached, mapped for and taken back in any order, by two VMs and a host; and the
end of a VM whose guest maps and unmaps all the time."""

from __future__ import annotations

import errno
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fakes import a64
from fakes.device_rig import IOVA, PVIOMMU, RW, VSID, DeviceGuest, R
from fakes.el2_rig import INCREMENT_PC, PAGE, RAM_IPA, El2, Guest
from pkvm.arm64.smccc import Function, PviommuOp
from pkvm.arm64.smmu import ABORT_STE, STE2
from pkvm.check.invariants import check_hyp
from pkvm.events import Transition
from pkvm.hyp.abi import ExitCode, HostCall
from pkvm.hyp.assignment import Assignment
from pkvm.hyp.errors import Refused
from pkvm.hyp.policy import ANDROID
from pkvm.machine.machine import DMA_BASE, DMA_STREAM, SG_BASE, SG_STREAM

BASES = (DMA_BASE, SG_BASE)
STREAMS = (DMA_STREAM, SG_STREAM)
VMS = st.integers(0, 1)
DEVICES = st.integers(0, 1)
DOMAINS = st.integers(1, 2)
PAGES = st.integers(0, 3)


class Devices(RuleBasedStateMachine):
    """The model knows who has which device, what it follows, and who maps what."""

    def __init__(self) -> None:
        super().__init__()
        self.el2 = El2(policy=ANDROID, ram_bytes=16 << 20)
        hyp = self.el2.hyp
        assert hyp.mem.smmu is not None
        self.smmu = hyp.mem.smmu
        self.calls = Assignment(hyp.mem, self.smmu, hyp.table, self.el2.recorder)
        self.guests = [self.new(), self.new()]
        self.owner: dict[int, int] = {}
        self.follows: dict[int, int] = {}
        self.domains: set[tuple[int, int]] = set()
        self.maps: dict[tuple[int, int, int], int] = {}
        self.states: dict[tuple[int, int], str] = {}

    def new(self) -> Guest:
        return Guest(self.el2, firmware=False, tables=40)

    def teardown(self) -> None:
        self.el2.machine.close()

    def does(self, good: bool, call: object, *args: object) -> object:
        """The call succeeds if the model says so; else it changes nothing."""
        assert callable(call)
        if good:
            return call(*args)
        with self.el2.unchanged(tables=False):
            try:
                call(*args)
            except Refused:
                return None
        raise AssertionError(f"{call} was not refused")

    @rule(vm=VMS, device=DEVICES)
    def assign(self, vm: int, device: int) -> None:
        good = device not in self.owner
        args = (self.guests[vm].handle, BASES[device], PVIOMMU, VSID + device)
        self.does(good, self.calls.assign, *args)
        if good:
            self.owner[device] = vm

    @rule(vm=VMS)
    def alloc(self, vm: int) -> None:
        if (vm, 2) not in self.domains or (vm, 1) not in self.domains:
            self.domains.add((vm, self.calls.alloc_domain(self.guests[vm].vm)))

    @rule(vm=VMS, domain=DOMAINS)
    def free(self, vm: int, domain: int) -> None:
        attached = any(
            self.owner.get(device) == vm and number == domain
            for device, number in self.follows.items()
        )
        good = (vm, domain) in self.domains and not attached
        self.does(good, self.calls.free_domain, self.guests[vm].vm, domain)
        if good:
            self.domains.discard((vm, domain))
            self.maps = {key: page for key, page in self.maps.items() if key[:2] != (vm, domain)}

    @rule(vm=VMS, device=DEVICES, domain=DOMAINS)
    def attach(self, vm: int, device: int, domain: int) -> None:
        good = self.owner.get(device) == vm and (vm, domain) in self.domains
        good = good and device not in self.follows
        self.does(good, self.calls.attach, self.guests[vm].vm, PVIOMMU, VSID + device, 0, domain)
        if good:
            self.follows[device] = domain

    @rule(vm=VMS, device=DEVICES, domain=DOMAINS)
    def detach(self, vm: int, device: int, domain: int) -> None:
        good = self.owner.get(device) == vm and self.follows.get(device) == domain
        self.does(good, self.calls.detach, self.guests[vm].vm, PVIOMMU, VSID + device, 0, domain)
        if good:
            del self.follows[device]

    @rule(vm=VMS, domain=DOMAINS, slot=PAGES, page=PAGES)
    def map(self, vm: int, domain: int, slot: int, page: int) -> None:
        good = (vm, domain) in self.domains and (vm, domain, slot) not in self.maps
        good = good and self.states.get((vm, page), "own") == "own"
        args = (domain, IOVA + slot * PAGE, RAM_IPA + page * PAGE, PAGE, RW)
        self.does(good, self.calls.map, self.guests[vm].vm, *args)
        if good:
            self.maps[vm, domain, slot] = page

    @rule(vm=VMS, domain=DOMAINS, slot=PAGES, nr=st.integers(1, 3))
    def unmap(self, vm: int, domain: int, slot: int, nr: int) -> None:
        good = (vm, domain) in self.domains
        args = (domain, IOVA + slot * PAGE, nr * PAGE)
        done = self.does(good, self.calls.unmap, self.guests[vm].vm, *args)
        gone = [key for key in self.maps if key[:2] == (vm, domain) and 0 <= key[2] - slot < nr]
        assert not good or done == len(gone) * PAGE
        for key in gone if good else ():
            del self.maps[key]

    def is_mapped(self, vm: int, page: int) -> bool:
        return any(key[0] == vm and mapped == page for key, mapped in self.maps.items())

    @rule(vm=VMS, page=PAGES, share=st.booleans())
    def share(self, vm: int, page: int, share: bool) -> None:
        mem = self.el2.hyp.mem
        wanted = "own" if share else "shared"
        good = self.states.get((vm, page), "own") == wanted and not self.is_mapped(vm, page)
        call = mem.guest_share_host if share else mem.guest_unshare_host
        self.does(good, call, self.guests[vm].vm, RAM_IPA + page * PAGE, 1)
        if good:
            self.states[vm, page] = "shared" if share else "own"

    @rule(vm=VMS, page=PAGES)
    def relinquish(self, vm: int, page: int) -> None:
        state = self.states.get((vm, page), "own")
        if state == "gone":
            return
        good = state == "own" and not self.is_mapped(vm, page)
        call = self.el2.hyp.mem.guest_relinquish_host
        self.does(good, call, self.guests[vm].vm, RAM_IPA + page * PAGE)
        if good:
            self.states[vm, page] = "gone"

    @rule(vm=VMS)
    def end(self, vm: int) -> None:
        """The VM is torn down, and another takes its place."""
        self.guests[vm].end()
        self.guests[vm] = self.new()
        for device in [one for one, owner in self.owner.items() if owner == vm]:
            del self.owner[device]
            self.follows.pop(device, None)
        self.domains = {key for key in self.domains if key[0] != vm}
        self.maps = {key: page for key, page in self.maps.items() if key[0] != vm}
        self.states = {key: state for key, state in self.states.items() if key[0] != vm}

    @rule(device=DEVICES)
    def host_wants_it(self, device: int) -> None:
        """A stream that is a VM's is nobody else's to attach."""
        if device in self.owner:
            self.el2.assert_refused(errno.ENOENT, HostCall.IOMMU_ATTACH, 1, STREAMS[device])

    @invariant()
    def sound(self) -> None:
        assert check_hyp(self.el2.hyp) == []
        for device, stream in enumerate(STREAMS):
            ste = self.smmu.ste(stream)
            number = STE2["S2VMID"].get(ste[2])
            if device in self.follows:
                assert self.el2.hyp.mem.domains[number].vm == self.guests[self.owner[device]].handle
            else:
                assert (ste == ABORT_STE) == (device in self.owner)
                assert not number


TestDevices = Devices.TestCase
TestDevices.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)


def test_the_end_of_a_vm_in_the_middle_of_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest maps and unmaps in a loop; another CPU of the host's tears the VM down."""
    owner = DeviceGuest()
    el2 = owner.el2
    owner.assign()
    domain = owner.alloc()
    assert owner.attach(domain) == 0
    assert owner.map(domain, IOVA, RAM_IPA + PAGE, 2 * PAGE) == (0, 2 * PAGE)
    loop = RAM_IPA + 0x100
    words: list[int] = []
    for op, rest in (
        (PviommuOp.UNMAP, {4: 2 * PAGE}),
        (PviommuOp.MAP, {4: RAM_IPA + PAGE, 5: 2 * PAGE, 6: RW}),
    ):
        values = {0: int(Function.PVIOMMU_OP), 1: int(op), 2: domain, 3: IOVA} | rest
        words += [word for register, value in values.items() for word in a64.mov(register, value)]
        words.append(a64.HVC)
    words.append(0x1400_0000 | -len(words) & 0x3FF_FFFF)
    el2.machine.memory.write(owner.guest.ram + 0x100, a64.code(words))
    owner.engine.invalidate_code(owner.guest.ram + 0x100, 4 * len(words))
    owner.engine.pc = loop - 4
    watch = el2.recorder.watch
    assert watch is not None
    look, mapped = watch.look, threading.Event()

    def look_on(event: Transition) -> list[str]:
        if event.op == "guest_map_dma":
            mapped.set()
        return look(event)

    monkeypatch.setattr(watch, "look", look_on)
    ended: list[int] = []
    stopping = threading.Event()

    def host_cpu() -> None:
        """Runs the vCPU, as a VMM's thread does, until it is stopped or there is none."""
        while not stopping.is_set():
            owner.guest.load()
            result = el2.x1(HostCall.VCPU_RUN, 0 if ended else INCREMENT_PC, 0, 0)
            el2.call(HostCall.VCPU_PUT)
            ended.append(result)
            if result < 0:
                return

    thread = threading.Thread(target=host_cpu)
    thread.start()
    assert mapped.wait(30)
    result = el2.x1(HostCall.START_TEARDOWN_VM, owner.handle)
    stopping.set()
    owner.engine.interrupt()
    thread.join(30)
    assert not thread.is_alive()
    assert set(ended) <= {ExitCode.IRQ, -errno.EINVAL}
    if result:
        assert result == -errno.EINVAL, "the vCPU is loaded"
        el2.call(HostCall.START_TEARDOWN_VM, owner.handle)
    assert not el2.hyp.mem.domains
    el2.sound()
    for gfn, nr in ((RAM_IPA >> 12, 8), (0x1_0000_0000 >> 12, 4)):
        el2.call(HostCall.RECLAIM_DYING_GUEST_RANGE, owner.handle, gfn, nr)
    el2.call(HostCall.FINALIZE_TEARDOWN_VM, owner.handle)
    el2.sound()
    again = DeviceGuest(el2)
    again.assign()
    assert again.map(again.alloc(), IOVA, RAM_IPA, PAGE, R) == (0, PAGE)
    el2.machine.close()
