# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that do what they should not: the host lives, EL2 lives, no page is lost.

Every test ends with EL2's invariants and a census (see `rig`).
"""

from __future__ import annotations

import errno
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.contract_rig import FIRMWARE_SLOT, PAGE, RAM_IPA, errno_of, rig
from pkvm.arm64.smccc import Function
from pkvm.guests.agent import Agent, AgentExitError, GuestExceptionError
from pkvm.guests.protocol import Op
from pkvm.kvm import Intr, Mmio
from pkvm.uapi import kvm as uapi

NOWHERE = 0x20_0000_0000
EXTERNAL_ABORT = 0x10
FUNCTIONS = [
    *(int(function) for function in Function),
    *(0x8400_0000 + n for n in range(0x20)),
    *(0xC400_0000 + n for n in range(0x20)),
    *(0xC600_0000 + n for n in range(0x48)),
]
ENDS = {0x8400_0001, 0xC400_0001, 0x8400_0002, 0x8400_0008, 0x8400_0009, 0x8400_0012, 0xC400_0012}
"""CPU_SUSPEND, CPU_OFF, SYSTEM_OFF, SYSTEM_RESET, SYSTEM_RESET2: nothing brings the vCPU back."""
addresses = st.one_of(
    st.integers(0, 2**64 - 1),
    st.sampled_from([RAM_IPA + n * PAGE for n in (0, 1, 1023, 1024)]),
    st.sampled_from([NOWHERE, 1 << 40, (1 << 40) - PAGE, (1 << 64) - PAGE, 0]),
)
counts = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2, 256, 257, 512, 1 << 52]))


@given(
    calls=st.lists(
        st.tuples(st.one_of(st.sampled_from(FUNCTIONS), st.integers(0, 2**64 - 1)), addresses,
                  counts, st.one_of(st.just(0), counts), st.booleans()),
        min_size=20, max_size=40,
    )
)  # fmt: skip
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_hypercalls(calls: list[tuple[int, int, int, int, bool]]) -> None:
    with rig() as made:
        agent = made.protected_agent()
        for function, x1, x2, x3, by_smc in calls:
            if function & 0xFFFE_FFFF in ENDS and not by_smc:
                continue
            (agent.smc if by_smc else agent.hvc)(function, x1, x2, x3)
            made.check()
        agent.store(RAM_IPA + 5 * PAGE, 1)
        assert agent.load(RAM_IPA + 5 * PAGE) == 1


def test_share_and_unshare_of_everything_in_ranges() -> None:
    with rig() as made:
        agent = made.protected_agent()
        shared = 0
        while shared < 1024:
            done = agent.hvc(Function.MEM_SHARE, RAM_IPA + shared * PAGE, 1024 - shared, 0)
            assert done[0] == 0
            assert 0 < done[1] <= 1024 - shared
            shared += done[1]
        made.check()
        made.ram.write(0, b"\x11" * PAGE)
        assert agent.load(RAM_IPA) == 0x1111_1111_1111_1111
        assert agent.hvc(Function.MEM_UNSHARE, RAM_IPA, 1, 0)[:2] == (0, 1)
        assert agent.hvc(Function.MEM_UNSHARE, RAM_IPA, 1, 0)[0] == -3 & (1 << 64) - 1
        made.check()


def test_a_guest_that_runs_into_nowhere_takes_an_external_abort() -> None:
    with rig() as made:
        agent = made.protected_agent()
        with pytest.raises(GuestExceptionError) as fetch:
            agent.branch(NOWHERE)
        assert fetch.value.esr & 0x3F == EXTERNAL_ABORT
        assert fetch.value.esr >> 26 == 0x21
        with pytest.raises(GuestExceptionError) as pair:
            agent.op(Op.LDP, NOWHERE)
        assert pair.value.esr & 0x3F == EXTERNAL_ABORT
        assert pair.value.esr >> 26 == 0x25
        with pytest.raises(GuestExceptionError) as beyond:
            agent.load(1 << 40)
        assert beyond.value.esr & 0x3F == EXTERNAL_ABORT
        with pytest.raises(AgentExitError) as load:
            agent.load(NOWHERE)
        assert load.value.exit == Mmio(NOWHERE, 8, 0, False)


def test_page_tables_full_of_rubbish() -> None:
    with rig() as made:
        agent = made.protected_agent()
        for seed in range(20):
            try:
                agent.op(Op.MMU_RUBBISH, seed)
            except (GuestExceptionError, AgentExitError):
                break
            made.check()


def test_a_spinning_guest_is_interrupted_and_goes_on() -> None:
    with rig() as made:
        made.vm.protect(FIRMWARE_SLOT)
        [vcpu] = made.vcpus()
        agent = made.agent(vcpu)
        for attempt in range(3):
            kick = threading.Timer(0.01, vcpu.kick)
            kick.start()
            with pytest.raises(AgentExitError) as stopped:
                agent.op(Op.SPIN) if attempt == 0 else agent.resume()
            kick.join()
            assert isinstance(stopped.value.exit, Intr)
        made.check()


def test_closing_everything_under_a_running_guest() -> None:
    with rig() as made:
        made.vm.protect(FIRMWARE_SLOT)
        [vcpu] = made.vcpus()
        agent = made.agent(vcpu)
        ends: list[BaseException] = []
        thread = threading.Thread(target=_spin, args=(agent, ends))
        thread.start()
        made.vm.close()
        vcpu.close()
        thread.join(20)
        assert not thread.is_alive()
        assert made.system.census().guest == {"owned": 0, "shared_with_host": 0}
        assert len(ends) == 1


def _spin(agent: Agent, ends: list[BaseException]) -> None:
    try:
        agent.op(Op.SPIN)
    except (AgentExitError, OSError) as error:
        ends.append(error)


def test_slots_that_overlap_wrap_or_are_not_aligned() -> None:
    with rig() as made:
        address = made.ram.address

        def region(slot: int, ipa: int, size: int, where: int = address, flags: int = 0) -> int:
            data = bytearray(uapi.MEMORY_REGION.pack(slot, flags, ipa, size, where))
            return errno_of(
                made.system.kernel.ioctl, made.vm.fd, uapi.Ioctl.SET_USER_MEMORY_REGION, data
            )

        assert region(5, RAM_IPA + PAGE, PAGE) == errno.EEXIST
        assert region(5, 0x9000_0001, PAGE) == errno.EINVAL
        assert region(5, 0x9000_0000, PAGE + 1) == errno.EINVAL
        assert region(5, 0x9000_0000, PAGE, address + 1) == errno.EINVAL
        assert region(5, 2**64 - PAGE, 2 * PAGE) == errno.EINVAL
        assert region(5, 0x9000_0000, 2**64 - PAGE) == errno.EINVAL
        assert region(uapi.MEM_SLOTS_NUM, 0x9000_0000, PAGE) == errno.EINVAL
        assert region(5, 0x9000_0000, PAGE, flags=1 << 8) == errno.EINVAL
        made.vm.protect(FIRMWARE_SLOT)
