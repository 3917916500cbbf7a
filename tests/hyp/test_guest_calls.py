# SPDX-License-Identifier: GPL-2.0-or-later
"""What a protected guest can ask of EL2, with good, bad and random arguments."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes import a64
from fakes.el2_rig import INCREMENT_PC, RAM_IPA, El2, Guest
from pkvm.arm64 import psci, smccc
from pkvm.arm64.smccc import INVALID_PARAMETER, NOT_SUPPORTED, Function
from pkvm.events import GuestHypercall, GuestTrap, Refusal, Transition
from pkvm.hyp.abi import ExitCode, RunResult
from pkvm.hyp.vmemmap import HOST_OWNED
from pkvm.machine.stage2 import Stage2Fault

PAGE = 4096
Results = tuple[int, int, int, int]


class Caller:
    """A guest that executes `wfi; hvc` (or `smc`) for ever, with registers that the test sets."""

    def __init__(self, *, instruction: int = a64.HVC, block: bool = False, tables: int = 8) -> None:
        self.el2 = El2()
        code = [a64.WFI, instruction, 0x17FF_FFFE]
        self.guest = Guest(self.el2, code, block=block, tables=tables)
        assert self.guest.run() == ExitCode.TRAP

    def start(self, *args: int) -> ExitCode:
        engine = self.el2.engine
        for number, value in enumerate((*args, 0, 0, 0)[:4]):
            engine.x[number] = value
        return self.guest.run(flags=INCREMENT_PC)

    def call(self, *args: int) -> Results:
        """X0-X3 of a call that EL2 answers by itself, feeding it table pages if it wants some."""
        code = self.start(*args)
        while code == ExitCode.HYP_REQ:
            self.guest.feed()
            code = self.guest.run()
        assert (code, self.guest.ec()) == (ExitCode.TRAP, 1)
        return self.results()

    def results(self) -> Results:
        x0, x1, x2, x3 = self.el2.engine.args()
        return x0, x1, x2, x3

    def reachable(self, page: int) -> bool:
        """Whether the host can read the guest's page."""
        try:
            self.el2.bus.read(self.guest.ram + page * PAGE, 8)
        except Stage2Fault:
            return False
        return True


@pytest.fixture
def caller() -> Caller:
    return Caller()


def test_version_and_identity(caller: Caller) -> None:
    assert caller.call(Function.SMCCC_VERSION) == (0x1_0002, 0, 0, 0)
    assert caller.call(Function.VENDOR_UID) == smccc.VENDOR_HYP_UID
    assert caller.call(Function.KVM_FEATURES) == (0b11101, 0, 0, 0)


def test_features_are_the_calls_that_work(caller: Caller) -> None:
    (bitmap, *_) = caller.call(Function.KVM_FEATURES)
    for bit in range(1, 128):
        for form in (0x8600_0000, 0xC600_0000):
            result = caller.call(form | bit, 1, 1, 1)[0]
            works = form == 0xC600_0000 and bitmap >> bit & 1
            assert (result != NOT_SUPPORTED) == bool(works), hex(form | bit)


@pytest.mark.parametrize("function", [Function.SMCCC_VERSION, Function.SMCCC_ARCH_FEATURES])
def test_arch_features_of_what_is_there(caller: Caller, function: int) -> None:
    assert caller.call(Function.SMCCC_ARCH_FEATURES, function) == (0, 0, 0, 0)


@pytest.mark.parametrize("function", [0x8000_8000, 0x8000_7FFF, 0x8000_3FFF, 0x8000_0002, 0])
def test_arch_features_of_workarounds_that_are_not_there(caller: Caller, function: int) -> None:
    assert caller.call(Function.SMCCC_ARCH_FEATURES, function)[0] == NOT_SUPPORTED


def test_meminfo(caller: Caller) -> None:
    assert caller.call(Function.HYP_MEMINFO) == (PAGE, 1, 0, 0)
    for args in ((1, 0, 0), (0, 1, 0), (0, 0, 1 << 63)):
        assert caller.call(Function.HYP_MEMINFO, *args) == (INVALID_PARAMETER, 0, 0, 0)


@pytest.mark.parametrize(
    "function",
    [0x8600_0002, 0x8600_0003, 0xC600_0000, 0xC000_0000, 0xC400_0000, 0x0600_0002, 0x8600_0001,
     0xC600_0005, 0xC400_0050, 0, (1 << 32) - 1],
)  # fmt: skip
def test_forms_are_exact(caller: Caller, function: int) -> None:
    assert caller.call(function) == (NOT_SUPPORTED, 0, 0, 0)


def test_sve_hint_and_upper_half_are_ignored(caller: Caller) -> None:
    assert caller.call(0xDEAD_0000_0000_0000 | 1 << 16 | Function.HYP_MEMINFO)[0] == PAGE


def test_the_immediate_of_an_hvc_is_ignored() -> None:
    caller = Caller(instruction=a64.HVC | 0x123 << 5)
    assert caller.call(Function.HYP_MEMINFO)[0] == PAGE


@pytest.mark.parametrize("function", [Function.HYP_MEMINFO, psci.Function.SYSTEM_OFF, 0])
def test_smc_is_not_supported_and_goes_on_behind(function: int) -> None:
    caller = Caller(instruction=a64.SMC)
    assert caller.call(function, 1, 2, 3) == (NOT_SUPPORTED, 1, 2, 3)
    assert caller.el2.events(GuestTrap)[-1].reason == "smc"


def test_other_registers_are_preserved(caller: Caller) -> None:
    engine = caller.el2.engine
    for number in range(4, 31):
        engine.x[number] = 0x1000 + number
    caller.call(Function.MEM_SHARE, RAM_IPA)
    assert [engine.x[number] for number in range(4, 31)] == [0x1000 + n for n in range(4, 31)]


def test_each_call_is_announced(caller: Caller) -> None:
    caller.call(Function.HYP_MEMINFO, 1)
    event = caller.el2.events(GuestHypercall)[-1]
    assert event == GuestHypercall(caller.guest.handle, 0, Function.HYP_MEMINFO, INVALID_PARAMETER)


# Sharing


def test_share_and_unshare(caller: Caller) -> None:
    ipa = RAM_IPA + PAGE
    assert not caller.reachable(1)
    assert caller.call(Function.MEM_SHARE, ipa) == (0, 1, 0, 0)
    assert caller.reachable(1)
    assert [caller.reachable(page) for page in (0, 2)] == [False, False]
    assert caller.call(Function.MEM_SHARE, ipa)[0] == INVALID_PARAMETER
    assert caller.el2.events(Refusal)[-1].op == "mem_share"
    assert caller.call(Function.MEM_UNSHARE, ipa) == (0, 1, 0, 0)
    assert not caller.reachable(1)
    assert caller.call(Function.MEM_UNSHARE, ipa)[0] == INVALID_PARAMETER
    caller.el2.sound()


@pytest.mark.parametrize("function", [Function.MEM_SHARE, Function.MEM_UNSHARE])
@pytest.mark.parametrize(
    "args",
    [
        (RAM_IPA + 1, 1, 0),
        (RAM_IPA, 1, 1),
        (RAM_IPA, 5, 0),
        (RAM_IPA, (1 << 64) - 1, 0),
        (RAM_IPA, 1 << 52, 0),
        (0x900_0000, 1, 0),
        (1 << 40, 1, 0),
        ((1 << 64) - PAGE, 1, 0),
        ((1 << 64) - PAGE, 2, 0),
    ],
)
def test_bad_ranges(caller: Caller, function: int, args: tuple[int, int, int]) -> None:
    with caller.el2.unchanged():
        caller.guest.vcpu()
    assert caller.call(function, *args) == (INVALID_PARAMETER, 0, 0, 0)
    assert not caller.reachable(0)
    caller.el2.sound()


def test_a_block_is_split_with_table_pages_that_the_host_gives() -> None:
    caller = Caller(block=True, tables=3)
    guest, engine = caller.guest, caller.el2.engine
    pc = engine.pc
    assert caller.start(Function.MEM_SHARE, RAM_IPA + 7 * PAGE, 2) == ExitCode.HYP_REQ
    for _ in range(2):
        assert engine.pc == pc + 4, "the HVC is executed again"
        assert caller.results() == (Function.MEM_SHARE, RAM_IPA + 7 * PAGE, 2, 0)
        assert guest.shown[RunResult.REQ_TYPE : RunResult.REQ_PAGES + 1] == (1, 1)
        assert guest.run() == ExitCode.HYP_REQ, "the host gave nothing"
    assert not any(event.op == "guest_share_host" for event in caller.el2.events(Transition))
    guest.feed()
    assert guest.run() == ExitCode.TRAP
    assert caller.results() == (0, 2, 0, 0)
    assert [caller.reachable(page) for page in range(5, 11)] == [False] * 2 + [True] * 2 + [
        False
    ] * 2
    caller.el2.sound()


def test_long_ranges_are_done_in_parts() -> None:
    caller = Caller(block=True)
    assert caller.call(Function.MEM_SHARE, RAM_IPA, 512) == (0, 256, 0, 0)
    assert caller.call(Function.MEM_SHARE, RAM_IPA + 256 * PAGE, 256) == (0, 256, 0, 0)
    assert caller.reachable(0)
    assert caller.reachable(511)
    assert caller.call(Function.MEM_UNSHARE, RAM_IPA, 300) == (0, 256, 0, 0)
    assert [caller.reachable(page) for page in (0, 255, 256, 511)] == [False, False, True, True]
    caller.el2.sound()


FUNCTIONS = st.one_of(
    st.sampled_from([*Function, *psci.Function]).map(int),
    st.builds(
        lambda fast, form, owner, number: fast << 31 | form << 30 | owner << 24 | number,
        st.booleans(),
        st.booleans(),
        st.integers(0, 63),
        st.integers(0, 0x1_FFFF),
    ),
    st.integers(0, (1 << 64) - 1),
)
ARGUMENTS = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 600),
    st.integers(-2, 513).map(lambda page: RAM_IPA + page * PAGE),
    st.sampled_from([0x900_0000, 1 << 40, (1 << 64) - PAGE, (1 << 52) - 1]),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(FUNCTIONS, ARGUMENTS, ARGUMENTS, st.sampled_from([0, 0, 1])), max_size=30)
)
def test_random_calls_leave_el2_alive_and_memory_sound(
    calls: list[tuple[int, int, int, int]],
) -> None:
    caller = Caller(block=True, tables=3)
    try:
        for args in calls:
            code = caller.start(*args)
            while code == ExitCode.HYP_REQ:
                caller.guest.feed()
                code = caller.guest.run()
            assert code == ExitCode.TRAP
            if caller.guest.ec() == 0x16:
                if args[0] & 0xFFFE_FFFF == psci.Function.CPU_OFF:
                    break
                assert caller.guest.run() == ExitCode.TRAP
            caller.el2.sound()
        caller.guest.end()
        caller.el2.sound()
        first = (caller.guest.ram >> 12) - (0x8000_0000 >> 12)
        assert (caller.el2.hyp.mem.vmemmap.states[first : first + 512] == HOST_OWNED).all()
    finally:
        caller.el2.machine.close()
