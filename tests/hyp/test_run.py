# SPDX-License-Identifier: GPL-2.0-or-later
"""Load, put, run: one vCPU at a time, and no vCPU finds anything of another."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from fakes import a64
from fakes.el2_rig import INCREMENT_PC, PAGE, RAM_IPA, El2, Guest
from pkvm.arm64 import registers as r
from pkvm.events import HostHypercall
from pkvm.hyp.abi import HOST_CALL_BASE, ExitCode, HostCall, HostVcpu
from pkvm.hyp.errors import HypBug

COUNT = [a64.NOP, 0x9100_0694, a64.WFI, 0x17FF_FFFE]
"""nop; loop: add x20, x20, #1; wfi; b loop."""


class Bare(Guest):
    """A protected VM to which nothing was donated."""

    def _donate(self) -> None:
        return


@pytest.fixture
def el2() -> El2:
    return El2()


def test_running_wants_a_loaded_vcpu(el2: El2) -> None:
    guest = Guest(el2)
    el2.assert_refused(errno.EINVAL, HostCall.VCPU_RUN, check_name="loaded")
    el2.call(HostCall.VCPU_PUT)
    guest.load()
    assert el2.call(HostCall.VCPU_RUN) == ExitCode.TRAP
    el2.call(HostCall.VCPU_PUT)
    el2.call(HostCall.VCPU_PUT)
    el2.assert_refused(errno.EINVAL, HostCall.VCPU_RUN, check_name="loaded")


@pytest.mark.parametrize(
    ("handle", "index"),
    [(0, 0), (0x1001, 0), (0x1000 | 1 << 32, 0), (0x1000, 1), (0x1000, (1 << 64) - 1),
     (0x1000, 2), (0xFFF, 0)],
)  # fmt: skip
def test_what_cannot_be_loaded_is_silently_not(el2: El2, handle: int, index: int) -> None:
    Guest(el2, created_vcpus=2)
    with el2.unchanged():
        assert el2.call(HostCall.VCPU_LOAD, handle, index, 0) == 0
    assert el2.refusals()[-1].op == "vcpu_load"
    assert el2.x1(HostCall.VCPU_RUN) == -errno.EINVAL


def test_a_second_load_leaves_the_first(el2: El2) -> None:
    first, second = Guest(el2), Guest(el2)
    first.load()
    with el2.unchanged():
        second.load()
    assert (first.vm.users, second.vm.users) == (1, 0)
    el2.call(HostCall.VCPU_PUT)
    assert first.vm.users == 0


def test_the_host_decides_two_bits_of_hcr(el2: El2) -> None:
    guest = Guest(el2, [a64.WFI, a64.LOOP])
    for hcr in (0, (1 << 64) - 1, 1 << 13, 1 << 14):
        guest.load(hcr=hcr)
        el2.engine.interrupt()
        el2.call(HostCall.VCPU_RUN)
        value = el2.engine.read_sysreg(r.HCR_EL2)
        assert value & (3 << 13) == hcr & (3 << 13)
        assert value & ~(3 << 13) & 0xFFFF_FFFF == 0x807D_063F | 1 << 19
        el2.call(HostCall.VCPU_PUT)


def test_an_untrapped_wfi_goes_on(el2: El2) -> None:
    guest = Guest(el2, [a64.WFI, *a64.mov(0, RAM_IPA), a64.SMC, a64.LDP_X0_X1_X2])
    guest.load(hcr=0)
    assert el2.call(HostCall.VCPU_RUN) == ExitCode.TRAP
    assert guest.ec() == 0x24


def test_vcpus_and_vms_take_turns_with_their_own_registers(el2: El2) -> None:
    guests = [Guest(el2, COUNT) for _ in range(3)]
    engine = el2.engine
    seen = {guest.handle: 0 for guest in guests}
    order = [guests[n] for n in (0, 1, 0, 2, 2, 1, 0, 1, 2, 0, 1)]
    for guest in order:
        assert guest.run(flags=INCREMENT_PC) == ExitCode.TRAP
        seen[guest.handle] += 1
        assert engine.x[20] == seen[guest.handle]
        if seen[guest.handle] == 1:
            engine.write_sysreg(r.TPIDR_EL1, guest.handle)
            engine.set_sp(0, guest.handle)
            engine.set_fp_registers(bytes([guest.handle & 0xFF]) * 512 + bytes(8))
        assert engine.read_sysreg(r.TPIDR_EL1) == guest.handle
        assert engine.sp(0) == guest.handle
        assert engine.fp_registers()[:512] == bytes([guest.handle & 0xFF]) * 512
        assert engine.read_sysreg(r.VTTBR_EL2) == guest.vm.stage2.vttbr
    el2.sound()


def test_a_saved_context_is_where_the_host_cannot_read_it(el2: El2) -> None:
    guest, other = Guest(el2, COUNT), Guest(el2, COUNT)
    guest.run()
    el2.engine.x[5] = 0x5EC2_E75E_C2E7
    other.run()
    area = el2.machine.memory.read(guest.areas[0], 4 * PAGE)
    assert (0x5EC2_E75E_C2E7).to_bytes(8, "little") in area
    for page in range(4):
        with pytest.raises(Exception, match="refused by stage 2"):
            el2.bus.read(guest.areas[0] + page * PAGE, 8)


def test_the_end_of_a_resident_vcpu_wipes_the_cpu(el2: El2) -> None:
    guest = Guest(el2, COUNT)
    guest.run()
    engine = el2.engine
    for number in range(31):
        engine.x[number] = 0x5EC2E7
    engine.write_sysreg(r.TPIDR_EL1, 0x5EC2E7)
    guest.end()
    assert list(engine.x) == [0] * 31
    assert engine.read_sysreg(r.TPIDR_EL1) == 0
    assert engine.read_sysreg(r.VTTBR_EL2) == 0
    after = Guest(el2, COUNT)
    assert after.handle == guest.handle
    after.run()
    assert engine.x[20] == 1


def test_a_vm_that_gets_the_same_handle_is_another_vm(el2: El2) -> None:
    """The second VM has other memory at the same IPA under the same VMID: no stale translation."""
    first = Guest(el2, [*a64.mov(20, 1), a64.WFI])
    first.run()
    assert el2.engine.x[20] == 1
    first.end()
    second = Guest(el2, [*a64.mov(20, 2), a64.WFI])
    second.run()
    assert (second.handle, el2.engine.x[20]) == (first.handle, 2)


def test_an_interrupt_brings_the_cpu_back(el2: El2) -> None:
    guest = Guest(el2, [a64.LOOP])
    guest.load()
    timer = threading.Timer(0.02, el2.engine.interrupt)
    timer.start()
    assert el2.call(HostCall.VCPU_RUN) == ExitCode.IRQ
    timer.join()


def test_other_cpus_of_the_host_while_a_guest_runs(el2: El2) -> None:
    """No vCPU is loaded there, the VM is in use, and what does not concern the guest works."""
    guest = Guest(el2, [a64.LOOP])
    idle = Guest(el2)
    guest.load()
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(el2.x1(HostCall.VCPU_RUN)))
    thread.start()
    try:
        while not el2.hyp.cpu._running:
            time.sleep(0.001)
        for call, *args in (
            (HostCall.VCPU_RUN,),
            (HostCall.HOST_DONATE_GUEST, 0x80000, 0, 1),
            (HostCall.START_TEARDOWN_VM, guest.handle),
            (HostCall.VCPU_SYNC_STATE,),
        ):
            assert el2.x1(call, *args) == -errno.EINVAL
        idle.load()
        el2.call(HostCall.VCPU_PUT)
        assert (guest.vm.users, idle.vm.users) == (1, 0)
        idle.end()
        Guest(el2)
        el2.bus.write(el2.pages(), b"x" * PAGE)
    finally:
        el2.engine.interrupt()
        thread.join(5)
    assert codes == [ExitCode.IRQ]
    el2.call(HostCall.VCPU_PUT)
    guest.end()
    el2.sound()


def test_threads_that_take_the_vm_away_under_a_run(el2: El2) -> None:
    """One thread runs, another tears down and rebuilds: nothing of EL2's lands in host pages."""
    guest = Guest(el2, [a64.WFI, 0x17FF_FFFF])
    area = guest.areas[0]
    over = threading.Event()

    def runs() -> None:
        while not over.is_set():
            guest.load()
            el2.x1(HostCall.VCPU_RUN)

    thread = threading.Thread(target=runs)
    thread.start()
    try:
        while el2.x1(HostCall.START_TEARDOWN_VM, guest.handle):
            el2.engine.interrupt()
            el2.x1(HostCall.VCPU_PUT)
        el2.call(HostCall.RECLAIM_DYING_GUEST_RANGE, guest.handle, 0, 1 << 28)
        el2.call(HostCall.FINALIZE_TEARDOWN_VM, guest.handle)
        content = el2.bus.read(area, 4 * PAGE)
    finally:
        over.set()
        thread.join(5)
    assert all(content[page * PAGE + 8 : (page + 1) * PAGE] == bytes(PAGE - 8) for page in range(4))
    assert el2.bus.read(area, 4 * PAGE) == content
    el2.sound()


def test_a_bug_in_the_vector_comes_out_of_the_door(
    el2: El2, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = Guest(el2, [a64.HVC, a64.LOOP])

    def broken() -> bool:
        raise HypBug("injected")

    el2.engine.interrupt()
    guest.run()
    monkeypatch.setattr(el2.engine, "vector", broken)
    guest.load()
    with pytest.raises(HypBug, match="injected"):
        el2.hyp.host_call(HOST_CALL_BASE + HostCall.VCPU_RUN)
    monkeypatch.undo()
    el2.call(HostCall.VCPU_PUT)


def test_runs_are_announced(el2: El2) -> None:
    guest = Guest(el2)
    guest.run()
    calls = [event.name for event in el2.events(HostHypercall)][-3:]
    assert calls == ["VCPU_LOAD", "VCPU_RUN", "VCPU_PUT"]


def test_without_firmware_in_place_nothing_runs(el2: El2) -> None:
    guest = Bare(el2)
    page = el2.bus.read(guest.vcpus[0], PAGE)
    assert guest.run() == ExitCode.ILLEGAL
    assert el2.refusals()[-1].check == "firmware"
    assert el2.bus.read(guest.vcpus[0], PAGE) == page
    assert not guest.vcpu().started


def test_a_host_page_full_of_noise_starts_no_vcpu_twice(el2: El2) -> None:
    guest = Guest(el2, vcpus=2)
    for index in (0, 1):
        el2.bus.write(guest.vcpus[index], b"\xff" * PAGE)
    guest.set(HostVcpu.X, RAM_IPA)
    assert guest.run(0) == ExitCode.TRAP
    assert guest.run(1) == ExitCode.ILLEGAL
