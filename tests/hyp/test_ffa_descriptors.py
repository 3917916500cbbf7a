# SPDX-License-Identifier: GPL-2.0-or-later
"""Descriptors, fragments and handles that lie to the FF-A proxy."""

from __future__ import annotations

import pytest

from fakes.doors import OTHER_SP, SP
from fakes.el2_rig import PAGE
from fakes.ffa_rig import COMPOSITE, ENDPOINT, FIRST, HEADER, SHARE, VERSIONS, FfaRig, begin, edit
from pkvm.arm64 import ffa
from pkvm.arm64.ffa import Function, Registers, Status
from pkvm.arm64.ffa_memory import Constituent
from pkvm.host.ffa import FfaCallError
from pkvm.hyp.ffa import MAX_BYTES


@pytest.fixture
def rig() -> FfaRig:
    return FfaRig()


# Descriptors that lie


@pytest.mark.parametrize(
    ("offset", "size", "value", "check"),
    [
        (HEADER, 2, 1, "ffa_sender"),
        (HEADER, 2, OTHER_SP, "ffa_sender"),
        (28, 4, 0, "ffa_endpoints"),
        (28, 4, 2, "ffa_endpoints"),
        (28, 4, 0xFFFF_FFFF, "ffa_endpoints"),
        (32, 4, 0xFFFF_FFF0, "ffa_descriptor"),
        (32, 4, 4096, "ffa_descriptor"),
        (ENDPOINT + 4, 4, 0, "ffa_composite"),
        (ENDPOINT + 4, 4, 48, "ffa_composite"),
        (ENDPOINT + 4, 4, 0xFFFF_FFF8, "ffa_descriptor"),
        (ENDPOINT + 4, 4, 4090, "ffa_descriptor"),
        (ENDPOINT + 4, 4, 88, "ffa_length"),
        (COMPOSITE + 4, 4, 0, "ffa_length"),
        (COMPOSITE + 4, 4, 1, "ffa_length"),
        (COMPOSITE + 4, 4, 0x1000_0000, "ffa_length"),
        (FIRST + 8, 4, 0xFFFF_FFFF, "pfn_range"),
        (FIRST + 8, 4, 0x10_0000, "ram_range"),
    ],
)
def test_descriptors_that_lie(rig: FfaRig, offset: int, size: int, value: int, check: str) -> None:
    data = edit(rig.transaction((rig.page(0), 1), (rig.page(2), 1)), offset, size, value)
    status = Status.DENIED if check.endswith("_range") else Status.INVALID_PARAMETERS
    with rig.refused(status, check):
        rig.host.send(data, SHARE)
    assert all(registers[0] != SHARE for registers in rig.seen)


def test_registers_that_lie(rig: FfaRig) -> None:
    data = rig.transaction((rig.page(0), 1))
    rig.bus.write(rig.host.tx, data)
    size = len(data)
    bad = Status.INVALID_PARAMETERS
    for status, arguments in (
        (bad, (size, size, rig.host.tx, 1)),
        (bad, (size, size, 0, 1)),
        (bad, (size, size + 16)),
        (bad, (size, size - 8)),
        (bad, (size + 16, size)),
        (bad, (0, 0)),
        (bad, (8192, 8192)),
        (bad, (1 << 32, 1 << 32)),
        (Status.NO_MEMORY, (MAX_BYTES + 16, size)),
    ):
        with rig.refused(status):
            rig.host.call(SHARE, *arguments)


def test_the_secure_worlds_no_is_handed_on_and_nothing_is_shared(rig: FfaRig) -> None:
    data = edit(rig.transaction((rig.page(0), 1)), COMPOSITE, 4, 5)
    with rig.refused(Status.INVALID_PARAMETERS):
        rig.host.send(data, SHARE)
    data = edit(rig.transaction((rig.page(0), 1)), ENDPOINT, 2, 0x8009)
    with rig.refused(Status.INVALID_PARAMETERS):
        rig.host.send(data, SHARE)


def test_the_host_may_rewrite_its_buffer_at_any_moment(rig: FfaRig) -> None:
    """What the secure world gets is EL2's copy."""
    guest = rig.guest()
    el3 = rig.machine.firmware.call

    def late(cpu: object, registers: Registers) -> Registers:
        rig.bus.write(rig.host.tx, rig.transaction((guest.ram, 1)))
        return el3(cpu, registers)  # type: ignore[arg-type]

    rig.machine.firmware.call = late  # type: ignore[method-assign]
    handle = rig.give((rig.page(0), 1))
    assert rig.secure.grants.pages() == {rig.page(0) >> 12}
    rig.sound()
    rig.host.reclaim(handle)


# Fragments


@pytest.mark.parametrize("fragment", [112, 160, 1040, PAGE])
@pytest.mark.parametrize("version", VERSIONS)
def test_fragments(version: int, fragment: int) -> None:
    rig = FfaRig(version)
    many = rig.pages(700)
    ranges = [(many + 2 * at * PAGE, 1) for at in range(300)]
    handle = rig.host.give(ranges, SP, fragment=fragment)
    assert rig.secure.grants.pages() == {pa >> 12 for pa, _ in ranges}
    rig.sound()
    rig.host.reclaim(handle)
    assert rig.secure.grants.pages() == frozenset()
    rig.sound()


@pytest.mark.parametrize(
    ("length", "content"),
    [(0, b""), (7, b""), (64, b""), (5000, b""), (32, bytes(32)), (16, b"\1" * 16)],
    ids=range(6),
)
def test_a_fragment_that_lies_ends_the_transaction(
    rig: FfaRig, length: int, content: bytes
) -> None:
    with rig.nothing_changes():
        data, handle = begin(rig, [(rig.page(2 * at), 1) for at in range(4)], 2)
        rig.bus.write(rig.host.tx, content or data[FIRST + 32 :])
        with pytest.raises(FfaCallError):
            rig.host.call(Function.FFA_MEM_FRAG_TX, *ffa.handle_words(handle), length)
    with rig.refused(Status.INVALID_PARAMETERS, "ffa_handle"):
        rig.host.call(Function.FFA_MEM_FRAG_TX, *ffa.handle_words(handle), 32)


def test_the_secure_worlds_no_to_a_fragment(rig: FfaRig) -> None:
    """The last one makes the number of pages wrong."""
    with rig.nothing_changes():
        data, handle = begin(rig, [(rig.page(2 * at), 1) for at in range(4)], 2)
        rest = edit(data[FIRST + 32 :], 8, 4, 2)
        rig.bus.write(rig.host.tx, rest)
        with pytest.raises(FfaCallError) as error:
            rig.host.call(Function.FFA_MEM_FRAG_TX, *ffa.handle_words(handle), len(rest))
        assert error.value.status in (Status.INVALID_PARAMETERS, Status.DENIED)


def test_one_transaction_waits_for_fragments(rig: FfaRig) -> None:
    ranges = [(rig.page(2 * at), 1) for at in range(4)]
    with rig.nothing_changes():
        data, handle = begin(rig, ranges, 2)
        with rig.refused(Status.INVALID_PARAMETERS, "ffa_handle"):
            rig.host.call(Function.FFA_MEM_FRAG_TX, handle & 0xFFFF_FFFF, 0, 32)
        with rig.refused(Status.INVALID_PARAMETERS, "ffa_handle"):
            words = ffa.handle_words(handle)
            rig.host.call(Function.FFA_MEM_FRAG_TX, *words, 32, 1 << 16)
        rig.bus.write(rig.host.tx, data[: FIRST + 32])
        with rig.refused(Status.BUSY, "ffa_pending"):
            rig.host.call(SHARE, len(data), FIRST + 32)
        other = rig.give((rig.page(20), 1))
        rig.host.reclaim(other)
        rig.host.reclaim(handle)
    with rig.refused(Status.INVALID_PARAMETERS):
        rig.host.reclaim(handle)


# Reclaim


def test_only_what_was_given_comes_back(rig: FfaRig) -> None:
    handle = rig.give((rig.page(0), 1))
    for wrong in (handle + 1, handle & 0xFFFF_FFFF, 0, (1 << 64) - 1):
        with rig.refused(Status.INVALID_PARAMETERS):
            rig.host.reclaim(wrong)
    rig.host.reclaim(handle)
    with rig.refused(Status.INVALID_PARAMETERS):
        rig.host.reclaim(handle)


def test_a_secure_world_that_lies_about_what_it_has(rig: FfaRig) -> None:
    """It is trusted; but EL2 unshares no page that is not shared."""
    handle = rig.give((rig.page(0), 1))
    grant = rig.secure.grants.by_handle[handle]
    grant.ranges[0] = Constituent(rig.page(1), 1)
    with rig.unchanged(), pytest.raises(FfaCallError) as error:
        rig.host.reclaim(handle)
    assert error.value.status == Status.DENIED
    assert handle in rig.secure.grants.by_handle
    grant.ranges[0] = Constituent(rig.page(0), 1)
    rig.host.reclaim(handle)
    rig.sound()
