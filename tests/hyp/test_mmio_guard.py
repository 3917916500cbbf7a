# SPDX-License-Identifier: GPL-2.0-or-later
"""The MMIO guard and the other calls of the Android dialect: good, bad and random arguments."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes import a64
from fakes.el2_rig import INCREMENT_PC, NOWHERE, PENDING_EXCEPTION, RAM_IPA, El2, Guest
from pkvm.arm64 import registers as r
from pkvm.arm64.esr import EC, ISV
from pkvm.arm64.smccc import INVALID_PARAMETER, NOT_SUPPORTED, Function
from pkvm.arm64.stage2 import ANNOTATION_MMIO
from pkvm.hyp.abi import ExitCode, HostCall, HypRequest, RunResult
from pkvm.hyp.exits import ExitClass
from pkvm.hyp.policy import ANDROID, RFC, UPSTREAM, Policy

PAGE = 4096
INVALID = (INVALID_PARAMETER, 0, 0, 0)
DONE = (0, 0, 0, 0)
Results = tuple[int, int, int, int]
LOAD = RAM_IPA + 0x40
IPA_END = 1 << 40


class Caller:
    """A guest at a WFI, which makes the calls and the accesses that the test wants."""

    def __init__(
        self, policy: Policy = ANDROID, *, firmware: bool = False, tables: int = 8
    ) -> None:
        self.el2 = El2(policy=policy)
        code = [a64.WFI, a64.HVC, 0x17FF_FFFE]
        code += [0] * (16 - len(code)) + [a64.load(7, 9, size=3), a64.LOOP]
        self.guest = Guest(self.el2, code, vcpus=2, firmware=firmware, tables=tables)
        assert self.guest.run() == ExitCode.TRAP
        self.engine = self.el2.engine

    def start(self, *args: int) -> ExitCode:
        for number, value in enumerate((*args, 0, 0, 0)[:4]):
            self.engine.x[number] = value
        return self.guest.run(flags=INCREMENT_PC)

    def call(self, *args: int) -> Results:
        """X0-X3 of a call, feeding EL2 table pages if it wants some."""
        code = self.start(*args)
        while code == ExitCode.HYP_REQ:
            self.guest.feed()
            code = self.guest.run()
        if self.guest.ec() == EC.HVC64:
            # The host is told of a page that it got back.
            assert self.guest.shown[RunResult.X0] == Function.MEM_RELINQUISH
            code = self.guest.run()
        assert (code, self.guest.ec()) == (ExitCode.TRAP, 1)
        x0, x1, x2, x3 = self.engine.args()
        return x0, x1, x2, x3

    def read(self, address: int) -> ExitClass:
        """Load a doubleword at `address`; the class of the exit. The guest is at its WFI again
        after it."""
        self.engine.pc, self.engine.x[9] = LOAD, address
        assert self.guest.run() == ExitCode.TRAP
        kind = ExitClass(self.guest.vcpu().exit_class)
        assert bool(self.guest.esr() & ISV) == (kind == ExitClass.MMIO_READ)
        self.engine.pc = RAM_IPA
        self.el2.engine.interrupt()
        self.guest.run()
        self.engine.pc = RAM_IPA
        self.guest.run()
        return kind


@pytest.fixture
def caller() -> Caller:
    return Caller()


def test_features(caller: Caller) -> None:
    assert caller.call(Function.KVM_FEATURES) == (0xFFD, 0, 0, 0)
    assert Caller(RFC, firmware=True).call(Function.KVM_FEATURES) == (0x1D, 0, 0, 0)
    assert Caller(UPSTREAM).call(Function.KVM_FEATURES) == (0x1D, 0, 0, 0)


def test_features_are_the_calls_that_work(caller: Caller) -> None:
    (bitmap, *_) = caller.call(Function.KVM_FEATURES)
    for bit in range(1, 128):
        result = caller.call(0xC600_0000 | bit, 1, 1, 1)[0]
        unreported = 0xC600_0000 | bit in ANDROID.device_calls
        assert (result != NOT_SUPPORTED) == (bool(bitmap >> bit & 1) or unreported), bit
        assert caller.call(0x8600_0000 | bit, 1, 1, 1)[0] == NOT_SUPPORTED


def test_info(caller: Caller) -> None:
    assert caller.call(Function.MMIO_GUARD_INFO) == (PAGE, 1, 0, 0)
    assert caller.call(Function.MMIO_GUARD_INFO, 1) == INVALID


def test_without_the_guard_every_hole_is_a_device(caller: Caller) -> None:
    assert caller.read(NOWHERE) == ExitClass.MMIO_READ
    for function in (
        Function.MMIO_GUARD_MAP, Function.MMIO_GUARD_UNMAP, Function.MMIO_RGUARD_MAP,
        Function.MMIO_RGUARD_UNMAP,
    ):  # fmt: skip
        assert caller.call(function, NOWHERE, 1) == INVALID


def test_with_the_guard_a_device_is_where_the_guest_says(caller: Caller) -> None:
    assert caller.read(NOWHERE) == ExitClass.MMIO_READ
    assert caller.call(Function.MMIO_GUARD_ENROLL, 1, 2, 3) == DONE
    assert caller.read(NOWHERE) == ExitClass.DABT
    assert caller.call(Function.MMIO_GUARD_MAP, NOWHERE, 7, 7) == DONE
    assert caller.read(NOWHERE + 8) == ExitClass.MMIO_READ
    assert caller.read(NOWHERE + PAGE) == ExitClass.DABT
    assert caller.call(Function.MMIO_GUARD_ENROLL) == DONE
    assert caller.call(Function.MMIO_GUARD_MAP, NOWHERE) == DONE
    assert caller.guest.vm.stage2.leaf(NOWHERE) == (ANNOTATION_MMIO, 3)
    caller.el2.sound()


def test_all_vcpus_have_the_guard(caller: Caller) -> None:
    caller.call(Function.MMIO_GUARD_ENROLL)
    caller.start(0xC400_0003, 1, LOAD, 0)
    assert caller.guest.run(1) in (ExitCode.TRAP, ExitCode.IRQ)
    assert caller.guest.vcpu(1).exit_class == ExitClass.DABT
    assert not caller.guest.esr() & ISV


def test_an_access_that_crosses_a_page_needs_both(caller: Caller) -> None:
    caller.call(Function.MMIO_GUARD_ENROLL)
    caller.call(Function.MMIO_GUARD_MAP, NOWHERE)
    assert caller.read(NOWHERE + PAGE - 4) == ExitClass.DABT
    caller.call(Function.MMIO_GUARD_MAP, NOWHERE + PAGE)
    assert caller.read(NOWHERE + PAGE - 4) == ExitClass.MMIO_READ


def test_the_host_can_only_fail_an_access_that_is_no_devices(caller: Caller) -> None:
    caller.call(Function.MMIO_GUARD_ENROLL)
    caller.engine.pc, caller.engine.x[9], caller.engine.x[7] = LOAD, NOWHERE, 5
    caller.guest.run()
    assert caller.guest.run(flags=INCREMENT_PC, x0=0x666) == ExitCode.TRAP
    assert (caller.engine.pc, caller.engine.x[7]) == (LOAD, 5)
    caller.engine.write_sysreg(r.VBAR_EL1, RAM_IPA - 0x200)
    assert caller.guest.run(flags=PENDING_EXCEPTION) == ExitCode.TRAP
    assert caller.engine.read_sysreg(r.FAR_EL1) == NOWHERE
    assert caller.engine.read_sysreg(r.ESR_EL1) == 0x9600_0010


def test_a_device_is_never_memory(caller: Caller) -> None:
    caller.call(Function.MMIO_GUARD_ENROLL)
    caller.call(Function.MMIO_GUARD_MAP, NOWHERE)
    assert caller.call(Function.MMIO_GUARD_UNMAP, NOWHERE) == DONE
    page = caller.el2.pages()
    caller.guest.load()
    caller.el2.assert_refused(1, HostCall.HOST_DONATE_GUEST, page >> 12, NOWHERE >> 12, 1)
    caller.el2.call(HostCall.VCPU_PUT)
    assert caller.read(NOWHERE) == ExitClass.MMIO_READ
    for function in (Function.MEM_SHARE, Function.MEM_UNSHARE):
        assert caller.call(function, NOWHERE) == INVALID
    assert caller.call(Function.MEM_RELINQUISH, NOWHERE) == DONE
    assert caller.read(NOWHERE) == ExitClass.MMIO_READ
    caller.el2.sound()


def test_memory_is_never_a_device(caller: Caller) -> None:
    caller.call(Function.MMIO_GUARD_ENROLL)
    with caller.el2.unchanged():
        assert caller.call(Function.MMIO_GUARD_MAP, RAM_IPA + PAGE) == INVALID
    assert caller.call(Function.MEM_RELINQUISH, RAM_IPA + PAGE) == DONE
    assert caller.call(Function.MMIO_GUARD_MAP, RAM_IPA + PAGE) == DONE


@pytest.mark.parametrize("ipa", [NOWHERE + 1, NOWHERE + 2048, IPA_END, (1 << 64) - PAGE])
def test_bad_addresses(caller: Caller, ipa: int) -> None:
    caller.call(Function.MMIO_GUARD_ENROLL)
    for function in (Function.MMIO_GUARD_MAP, Function.MMIO_RGUARD_MAP):
        with caller.el2.unchanged():
            assert caller.call(function, ipa, 1) == INVALID


def test_ranges(caller: Caller) -> None:
    caller.call(Function.MMIO_GUARD_ENROLL)
    assert caller.call(Function.MMIO_RGUARD_MAP, NOWHERE, 3) == (0, 3, 0, 0)
    assert caller.read(NOWHERE + 2 * PAGE) == ExitClass.MMIO_READ
    assert caller.read(NOWHERE + 3 * PAGE) == ExitClass.DABT
    assert caller.call(Function.MMIO_RGUARD_MAP, NOWHERE, 1000) == (0, 256, 0, 0)
    assert caller.call(Function.MMIO_RGUARD_MAP, NOWHERE, 0) == INVALID
    assert caller.call(Function.MMIO_RGUARD_MAP, NOWHERE, 1, 1) == INVALID
    assert caller.call(Function.MMIO_RGUARD_MAP, NOWHERE, 1 << 52) == INVALID
    assert caller.call(Function.MMIO_RGUARD_MAP, RAM_IPA - PAGE, 2) == INVALID
    assert caller.call(Function.MMIO_RGUARD_UNMAP, NOWHERE, 9) == (0, 9, 0, 0)
    assert caller.call(Function.MMIO_RGUARD_UNMAP, NOWHERE, 9, 1) == INVALID


def test_table_pages_are_asked_for_and_the_call_goes_on() -> None:
    caller = Caller(tables=4)
    caller.call(Function.MMIO_GUARD_ENROLL)
    pc = caller.engine.pc
    assert caller.start(Function.MMIO_GUARD_MAP, NOWHERE) == ExitCode.HYP_REQ
    assert caller.guest.shown[RunResult.REQ_PAGES] >= 1
    assert caller.engine.pc == pc + 4
    assert caller.guest.vm.stage2.leaf(NOWHERE)[0] == 0
    caller.guest.feed()
    assert caller.guest.run() == ExitCode.TRAP
    assert caller.engine.args() == DONE


def test_the_end_of_a_vm_with_devices(caller: Caller) -> None:
    caller.call(Function.MMIO_GUARD_ENROLL)
    caller.call(Function.MMIO_RGUARD_MAP, NOWHERE, 100)
    caller.guest.end()
    caller.el2.sound()


def test_firmware_enrolls() -> None:
    caller = Caller(firmware=True)
    assert caller.read(NOWHERE) == ExitClass.DABT
    assert not Caller(firmware=False).guest.vm.mmio_guard


def test_relinquish(caller: Caller) -> None:
    ipa, pa = RAM_IPA + PAGE, caller.guest.ram + PAGE
    caller.el2.machine.memory.write(pa, b"secret")
    assert caller.call(Function.MEM_RELINQUISH, ipa, 1) == INVALID
    assert caller.call(Function.MEM_RELINQUISH, ipa) == DONE
    assert caller.el2.bus.read(pa, PAGE) == bytes(PAGE)
    assert caller.call(Function.MEM_RELINQUISH, ipa) == DONE
    assert caller.call(Function.MEM_RELINQUISH, ipa + 1) == INVALID
    assert caller.call(Function.MEM_SHARE, ipa + PAGE)[0] == 0
    assert caller.call(Function.MEM_RELINQUISH, ipa + PAGE) == INVALID
    caller.el2.sound()


def test_share_of_a_page_that_is_not_there_is_a_request(caller: Caller) -> None:
    ipa = RAM_IPA + PAGE
    caller.call(Function.MEM_RELINQUISH, ipa)
    assert caller.start(Function.MEM_SHARE, ipa) == ExitCode.HYP_REQ
    shown = caller.guest.shown
    assert shown[RunResult.REQ_TYPE] == HypRequest.MAP
    assert shown[RunResult.REQ_IPA] == ipa
    caller.guest.load()
    caller.el2.call(HostCall.HOST_DONATE_GUEST, caller.el2.pages() >> 12, ipa >> 12, 1)
    assert caller.el2.x1(HostCall.VCPU_RUN, 0, 0, 0) == ExitCode.TRAP
    caller.el2.call(HostCall.VCPU_PUT)
    assert caller.engine.args() == (0, 1, 0, 0)


def test_upstream_asks_by_a_fault() -> None:
    caller = Caller(UPSTREAM)
    ipa = RAM_IPA + 0x100_0000
    for number, value in enumerate((Function.MEM_SHARE, ipa, 0, 0)):
        caller.engine.x[number] = value
    pc = caller.engine.pc
    assert caller.guest.run(flags=INCREMENT_PC) == ExitCode.TRAP
    assert caller.guest.shown[RunResult.ESR] == 0x9200_0047
    assert caller.guest.shown[RunResult.HPFAR] == ipa >> 8
    assert caller.guest.shown[RunResult.FAR] == 0
    assert caller.engine.pc == pc + 4
    caller.guest.load()
    caller.el2.call(HostCall.HOST_DONATE_GUEST, caller.el2.pages() >> 12, ipa >> 12, 1)
    assert caller.el2.x1(HostCall.VCPU_RUN, 0, 0, 0) == ExitCode.TRAP
    caller.el2.call(HostCall.VCPU_PUT)
    assert caller.engine.args() == DONE
    assert caller.call(Function.MEM_UNSHARE, ipa, 1) == INVALID
    assert caller.call(Function.MEM_UNSHARE, ipa) == DONE
    assert caller.call(Function.HYP_MEMINFO) == (PAGE, 0, 0, 0)


def test_what_upstream_asks_for_outlasts_another_vcpu() -> None:
    caller = Caller(UPSTREAM)
    for number, value in enumerate((Function.MEM_SHARE, RAM_IPA + 0x10_0000, 0, 0)):
        caller.engine.x[number] = value
    caller.guest.run(flags=INCREMENT_PC)
    Guest(caller.el2, [a64.HVC]).run()
    caller.guest.load()
    assert caller.el2.call(HostCall.VCPU_IN_POISON_FAULT) == 0
    caller.el2.call(HostCall.VCPU_PUT)
    assert caller.guest.run(flags=PENDING_EXCEPTION) == ExitCode.TRAP
    assert caller.engine.read_sysreg(r.ESR_EL1) >> 26 == 0x25


WORDS = st.one_of(
    st.sampled_from([0, 1, PAGE, NOWHERE, RAM_IPA, IPA_END, IPA_END - PAGE, (1 << 64) - PAGE]),
    st.integers(0, 64).map(lambda page: RAM_IPA + page * PAGE),
    st.integers(0, (1 << 64) - 1),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    calls=st.lists(
        st.tuples(st.sampled_from(sorted(ANDROID.vendor_calls)), WORDS, WORDS, WORDS), max_size=30
    )
)
def test_random_calls(calls: list[tuple[int, int, int, int]]) -> None:
    caller = Caller()
    mapped = {RAM_IPA: True}
    for function, *args in calls:
        if function == Function.MEM_RELINQUISH and args[0] in mapped:
            continue  # the page that the guest runs in
        code = caller.start(function, *args)
        for _ in range(4):
            asked = caller.guest.shown[RunResult.REQ_TYPE] if code == ExitCode.HYP_REQ else 0
            if not asked:
                break
            if asked == HypRequest.MAP:
                gfn = caller.guest.shown[RunResult.REQ_IPA] >> 12
                caller.guest.load()
                caller.el2.x1(HostCall.HOST_DONATE_GUEST, caller.el2.pages() >> 12, gfn, 1)
                caller.el2.call(HostCall.VCPU_PUT)
            else:
                caller.guest.feed()
            code = caller.guest.run()
        if code == ExitCode.HYP_REQ:
            caller.engine.pc = RAM_IPA
            caller.guest.run()
        caller.el2.sound()
