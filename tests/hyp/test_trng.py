# SPDX-License-Identifier: GPL-2.0-or-later
"""TRNG 1.0: EL2 checks the call, of the host comes the entropy and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import a64
from fakes.el2_rig import INCREMENT_PC, PENDING_EXCEPTION, RAM_IPA, El2, Guest
from pkvm.arm64.smccc import NOT_SUPPORTED, Function
from pkvm.hyp.abi import ExitCode, HostVcpu, RunResult
from pkvm.hyp.policy import UPSTREAM
from pkvm.hyp.trng import UUID

INVALID = -2 & (1 << 64) - 1
NO_ENTROPY = -3 & (1 << 64) - 1
NOISE = (0x1111_2222_3333_4444, 0x5555_6666_7777_8888, 0x9999_AAAA_BBBB_CCCC)
Results = tuple[int, int, int, int]


class Caller:
    def __init__(self) -> None:
        self.el2 = El2()
        self.guest = Guest(self.el2, [a64.WFI, a64.HVC, 0x17FF_FFFE])
        assert self.guest.run() == ExitCode.TRAP
        self.engine = self.el2.engine

    def call(self, function: int, x1: int = 0) -> ExitCode:
        assert self.guest.run() == ExitCode.TRAP
        assert self.engine.pc == RAM_IPA
        for number, value in enumerate((function, x1, 0x22, 0x33)):
            self.engine.x[number] = value
        return self.guest.run(flags=INCREMENT_PC)

    def answered(self, function: int, x1: int = 0) -> Results:
        assert self.call(function, x1) == ExitCode.TRAP
        assert self.guest.ec() == 1
        return self.engine.args()

    def random(
        self, function: int, bits: int, *, x0: int = 0, words: tuple[int, ...] = NOISE
    ) -> Results:
        """X0-X3 of a call that the host answers with X0 and these words."""
        assert self.call(function, bits) == ExitCode.TRAP
        shown = self.guest.shown
        assert shown[RunResult.X0 : RunResult.X1 + 1] == (function, bits)
        assert shown[RunResult.X2 :] == (0, 0, 0)
        for number, word in enumerate(words):
            self.guest.set(HostVcpu.ENTROPY + 8 * number, word)
        self.guest.run(flags=INCREMENT_PC | PENDING_EXCEPTION, x0=x0)
        return self.engine.args()


@pytest.fixture(scope="module")
def caller() -> Caller:
    return Caller()


def test_what_is_there(caller: Caller) -> None:
    assert caller.answered(Function.TRNG_VERSION) == (0x1_0000, 0, 0, 0)
    assert caller.answered(Function.TRNG_UUID) == UUID
    assert UUID[0] != 0xFFFF_FFFF
    for number in range(0x50, 0x60):
        for form in (0x8400_0000, 0xC400_0000):
            function = form | number
            there = function in (
                Function.TRNG_VERSION, Function.TRNG_FEATURES, Function.TRNG_UUID,
                Function.TRNG_RND32, Function.TRNG_RND64,
            )  # fmt: skip
            result = 0 if there else NOT_SUPPORTED
            assert caller.answered(Function.TRNG_FEATURES, function | 5 << 32)[0] == result
            if not there:
                assert caller.answered(function, 1)[0] == NOT_SUPPORTED


def test_words_go_where_the_specification_says(caller: Caller) -> None:
    assert caller.random(Function.TRNG_RND64, 192) == (0, *NOISE)
    assert caller.random(Function.TRNG_RND64, 65) == (0, 0, NOISE[1] & 1, NOISE[2])
    assert caller.random(Function.TRNG_RND64, 1) == (0, 0, 0, NOISE[2] & 1)
    assert caller.random(Function.TRNG_RND32, 96) == (0, 0x3333_4444, 0x7777_8888, 0xBBBB_CCCC)
    assert caller.random(Function.TRNG_RND32, 33) == (0, 0, 0, 0xBBBB_CCCC)


@pytest.mark.parametrize(
    ("function", "bits"),
    [
        (Function.TRNG_RND64, 0), (Function.TRNG_RND64, 193), (Function.TRNG_RND64, 1 << 63),
        (Function.TRNG_RND32, 0), (Function.TRNG_RND32, 97), (Function.TRNG_RND32, 1 << 32),
    ],
)  # fmt: skip
def test_a_number_of_bits_that_cannot_be(caller: Caller, function: int, bits: int) -> None:
    assert caller.answered(function, bits) == (INVALID, 0, 0, 0)


def test_a_host_without_entropy(caller: Caller) -> None:
    for x0 in (1, NO_ENTROPY, 1 << 63):
        assert caller.random(Function.TRNG_RND64, 192, x0=x0) == (NO_ENTROPY, 0, 0, 0)


@settings(max_examples=100, deadline=None)
@given(
    wide=st.booleans(),
    bits=st.integers(1, 192),
    words=st.tuples(*[st.integers(0, (1 << 64) - 1)] * 3),
)
def test_no_more_bits_than_were_asked_for(
    caller: Caller, wide: bool, bits: int, words: tuple[int, ...]
) -> None:
    width = 64 if wide else 32
    bits = min(bits, 3 * width)
    function = Function.TRNG_RND64 if wide else Function.TRNG_RND32
    x0, high, middle, low = caller.random(function, bits, words=words)
    assert x0 == 0
    assert max(high, middle, low) < 1 << width
    number = high << 2 * width | middle << width | low
    assert number < 1 << bits


def test_where_the_host_has_the_registers_it_has_the_call() -> None:
    el2 = El2(policy=UPSTREAM)
    guest = Guest(el2, [a64.HVC, a64.WFI])
    guest.set(HostVcpu.X, Function.TRNG_RND64)
    assert guest.run() == ExitCode.TRAP
    assert guest.ec() == 0x16
    assert guest.x(0) == Function.TRNG_RND64
