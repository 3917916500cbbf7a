# SPDX-License-Identifier: GPL-2.0-or-later
"""Ownership of memory at EL2: what its changes cost, and what it costs to check them all.

Guests run on a machine without devices that reach memory by themselves, and so without an SMMU.

The units: the bare exception hook of `exits`, a call of a Python function that
does nothing, a count of the ownership records by state in one numpy pass, and a
transition itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

import exits
from common import Result, median_ratio
from pkvm.arm64.smccc import Function
from pkvm.check.invariants import Scratch, check
from pkvm.check.watch import Watch
from pkvm.events import Event, NullRecorder, Transition
from pkvm.hyp.abi import (
    HOST_CALL_BASE,
    VCPU_AREA_BYTES,
    VM_AREA_BYTES,
    HostCall,
    HostVcpu,
    HostVm,
)
from pkvm.hyp.hypervisor import Hypervisor
from pkvm.hyp.mem_protect import carveout_bytes
from pkvm.hyp.vm import Vm
from pkvm.machine.machine import Machine
from pkvm.system import System
from pkvm.vmm import board
from pkvm.vmm.loader import load_image
from pkvm.vmm.vmm import Vmm

PAIRS = 7
SHARES = 5_000
PAGES = 4_000
CALLS = 200_000
TOUCHES = 6_000
VMS = 50
VM_PAGES = (64 << 20) >> 12
GFN = 0x40000
PAGE = 4096

_HVC = 0xD400_0002
_SUBS_X9 = 0xF100_0529  # subs x9, x9, #1
_STR_X9_X10 = 0xF900_0149  # str x9, [x10]
_ADD_PAGE_X10 = 0x9140_054A  # add x10, x10, #1, lsl #12


class Host:
    """A machine with EL2, and a host that does no more than its hypercalls."""

    def __init__(self, ram_bytes: int) -> None:
        self.recorder = Announcer()
        self.machine = Machine(ram_bytes, recorder=self.recorder)
        memory = self.machine.memory
        size = carveout_bytes(ram_bytes)
        self.hyp = Hypervisor(self.machine, self.recorder, carveout=(memory.ram_end - size, size))
        self.hyp.initialise()
        self.bus = self.machine.host_bus
        self.next = memory.ram_base
        """PA of the first page that nobody has used yet."""

    def call(self, call: HostCall, *args: int) -> int:
        """A hypercall that EL2 must not refuse."""
        _, result, *_ = self.hyp.host_call(HOST_CALL_BASE + call, *args)
        if result < 0:
            raise RuntimeError(f"EL2 answered {result} to {call.name}")
        return result

    def pages(self, npages: int, align: int = 1) -> int:
        """PA of pages."""
        size = align * PAGE
        base = -(-self.next // size) * size
        self.next = base + npages * PAGE
        return base

    def shared_page(self, words: dict[int, int]) -> int:
        """PA of a page shared with EL2, with these words."""
        pa = self.pages(1)
        self.bus.write(pa, bytes(PAGE))
        for offset, value in words.items():
            self.bus.write_u64(pa + offset, value)
        self.call(HostCall.HOST_SHARE_HYP, pa >> 12)
        return pa

    def make_vm(self, tables: int) -> Vm:
        """A protected VM with a vCPU, and `tables` pages for its stage-2."""
        handle = self.call(HostCall.RESERVE_VM)
        page = self.shared_page(
            {HostVm.HANDLE: handle, HostVm.PROTECTED: 1, HostVm.CREATED_VCPUS: 1}
        )
        root = self.call(HostCall.PGD_INFO) // PAGE
        area = self.pages(VM_AREA_BYTES // PAGE)
        self.call(HostCall.INIT_VM, page, area, self.pages(root, root))
        vcpu = self.shared_page({HostVcpu.VCPU_ID: 0, HostVcpu.VCPU_IDX: 0})
        self.call(HostCall.INIT_VCPU, handle, vcpu, self.pages(VCPU_AREA_BYTES // PAGE))
        pas = [self.pages(1) for _ in range(tables)]
        for pa, following in zip(pas, [*pas[1:], 0], strict=True):
            self.bus.write_u64(pa, following)
        self.call(HostCall.TOPUP_MEMCACHE, handle, pas[0], tables)
        return self.hyp.table.get(handle)

    def close(self) -> None:
        """Free the engine."""
        self.machine.close()


class Announcer:
    """A recorder that keeps the last transition."""

    def __init__(self) -> None:
        self.last: Transition | None = None

    def record(self, event: Event, /) -> None:
        """Keep it if it is one."""
        if type(event) is Transition:
            self.last = event


def _function(x: int, y: int, z: int) -> int:
    return x


def _bare_call() -> float:
    """Seconds of a call of a Python function that does nothing."""
    call = _function
    start = time.process_time()
    for number in range(CALLS):
        call(number, 1, 2)
    return (time.process_time() - start) / CALLS


def _life_of_a_page() -> float:
    """Seconds of a page's way to a guest and back: donation and reclaim through the host's door,
    the VM's end counted in."""
    host = Host(64 << 20)
    vm = host.make_vm(16)
    first = host.pages(PAGES) >> 12
    call, donate, reclaim = (
        host.hyp.host_call,
        HOST_CALL_BASE + HostCall.HOST_DONATE_GUEST,
        HOST_CALL_BASE + HostCall.RECLAIM_DYING_GUEST_PAGE,
    )
    host.call(HostCall.VCPU_LOAD, vm.handle, 0, 0)
    start = time.process_time()
    for number in range(PAGES):
        call(donate, first + number, GFN + number, 1)
    host.call(HostCall.VCPU_PUT)
    host.call(HostCall.START_TEARDOWN_VM, vm.handle)
    for number in range(PAGES):
        call(reclaim, vm.handle, GFN + number)
    host.call(HostCall.FINALIZE_TEARDOWN_VM, vm.handle)
    seconds = time.process_time() - start
    host.close()
    return seconds / PAGES


def _share_pair() -> float:
    """Seconds of MEM_SHARE and MEM_UNSHARE of a page, from guest code."""
    body: list[int] = []
    for function in (Function.MEM_SHARE, Function.MEM_UNSHARE):
        body += exits.mov(0, int(function)) + exits.mov(1, board.RAM_BASE + (4 << 20))
        body += [*exits.mov(2, 0), *exits.mov(3, 0), _HVC]
    body.append(_SUBS_X9)
    off = [*exits.mov(0, 0x8400_0008), _HVC]

    def program(count: int) -> bytes:
        return exits.program(*exits.mov(9, count), *body, exits.b_ne(len(body)), *off)

    def seconds(count: int) -> float:
        return exits.guest_seconds(program(count), smmu=False)

    return (seconds(SHARES) - seconds(1)) / (SHARES - 1)


def _demand_fault() -> float:
    """Seconds of a guest's first touch of a page, in the dialect `upstream`: fault, pin, donate,
    retry. What the guest does at the second touch is taken off."""

    def run(rounds: int) -> float:
        touch = [_STR_X9_X10, _ADD_PAGE_X10, _SUBS_X9]
        body: list[int] = []
        for _ in range(rounds):
            body += exits.mov(10, board.RAM_BASE + (4 << 20)) + exits.mov(9, TOUCHES)
            body += [*touch, exits.b_ne(len(touch))]
        image = exits.program(*body, *exits.mov(0, 0x8400_0008), _HVC)
        with System(128 << 20, dialect="upstream", recorder=NullRecorder(), smmu=False) as system:
            words = system.machine.memory.u64
            words[:: PAGE // 8] |= np.uint64(0)  # no page of this process is new to it
            kvm = system.open()
            small = board.Board(ram_bytes=32 << 20)
            vmm = Vmm(kvm, small, load_image(image, small), console=lambda data: None)
            start = time.process_time()
            outcome = vmm.run()
            seconds = time.process_time() - start
            vmm.close()
            if outcome.kind != "powered-off":
                raise RuntimeError(f"the guest did not power off: {outcome}")
            return seconds

    return (run(1) - run(0)) / TOUCHES


def _populated() -> Host:
    """A machine of 4 GiB with 50 VMs of 64 MiB; each shares some memory with the host."""
    host = Host(4 << 30)
    for _ in range(VMS):
        vm = host.make_vm(48)
        first = host.pages(VM_PAGES, 512) >> 12
        host.call(HostCall.VCPU_LOAD, vm.handle, 0, 0)
        host.call(HostCall.HOST_DONATE_GUEST, first, GFN, VM_PAGES)
        host.call(HostCall.VCPU_PUT)
        host.hyp.mem.guest_share_host(vm, (GFN + 600) << 12, 200)
    return host


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    """Seconds of a piece of work."""

    def measure() -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    return measure


def _watched() -> tuple[float, float]:
    """Seconds of four transitions of a page (donated, shared, taken back, reclaimed), and of the
    looks at it after each."""
    host = Host(64 << 20)
    vm = host.make_vm(16)
    mem, recorder = host.hyp.mem, host.recorder
    watch = Watch(mem, host.hyp.table.find, host.hyp.table.vms)
    first = host.pages(PAGES) >> 12
    changing = looking = 0.0
    clock = time.perf_counter
    for number in range(PAGES // 4):
        ipa = (GFN + number) << 12
        for change, args in (
            (mem.host_donate_guest, (vm, first + number, GFN + number, 1)),
            (mem.guest_share_host, (vm, ipa, 1)),
            (mem.guest_unshare_host, (vm, ipa, 1)),
            (mem.reclaim_dying_guest_range, (vm, GFN + number, 1)),
        ):
            start = clock()
            change(*args)
            middle = clock()
            event = recorder.last
            assert event is not None
            if watch.look(event):
                raise RuntimeError("an invariant does not hold")
            looking += clock() - middle
            changing += middle - start
    host.close()
    return changing, looking


def measure() -> Iterator[Result]:
    """All figures of this file."""
    ratio, ours, unit = median_ratio(_share_pair, lambda: 2 * exits.bare_hook(), PAIRS)
    yield Result(
        "mem-share-pair", ratio, 20, f"{ours * 1e6:.2f} us, two bare hooks {unit * 1e6:.2f} us"
    )
    ratio, ours, unit = median_ratio(_life_of_a_page, _bare_call, PAIRS)
    yield Result(
        "donate-and-reclaim", ratio, 400, f"{ours * 1e6:.2f} us a page, call {unit * 1e9:.0f} ns"
    )
    ratio, ours, unit = median_ratio(_demand_fault, exits.bare_hook, PAIRS)
    yield Result("demand-fault", ratio, 60, f"{ours * 1e6:.2f} us, bare hook {unit * 1e6:.2f} us")

    host = _populated()
    mem, scratch = host.hyp.mem, Scratch()
    vms = host.hyp.vms()

    def everything() -> None:
        if check(mem, vms, (), scratch):
            raise RuntimeError("an invariant does not hold")

    def one_pass() -> None:
        np.bincount(mem.vmemmap.states, minlength=256)

    everything()
    ratio, ours, unit = median_ratio(_timed(everything), _timed(one_pass), 5 * PAIRS)
    host.close()
    yield Result(
        "all-invariants", ratio, 20,
        f"{ours * 1e3:.1f} ms for 4 GiB and {VMS} VMs, one pass {unit * 1e3:.2f} ms",
    )  # fmt: skip
    looks: list[float] = []

    def change() -> float:
        changing, looking = _watched()
        looks.append(looking)
        return changing

    ratio, ours, unit = median_ratio(lambda: looks[-1], change, PAIRS)
    yield Result(
        "watch-transition", ratio, 2,
        f"{ours / PAGES * 1e6:.1f} us, the transition {unit / PAGES * 1e6:.1f} us",
    )  # fmt: skip
