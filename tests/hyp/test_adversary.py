# SPDX-License-Identifier: GPL-2.0-or-later
"""Every call of the host's and of a guest's with the numbers that an adversary would choose: the
right error, nothing changed, EL2 alive, every invariant whole, no secret out.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.crowded import BYTES, CALL_IPA, COUNTS, GFN, PAGES, PRIVATE, SECRET, WORDS, Crowd
from fakes.el2_rig import PAGE
from pkvm.arm64 import psci
from pkvm.arm64.smccc import INVALID_PARAMETER, NOT_SUPPORTED, SUCCESS, Function
from pkvm.check.invariants import Snapshot
from pkvm.hyp.abi import HOST_CALL_BASE, ExitCode, HostCall, HypRequest, RunResult
from pkvm.hyp.errors import Errno
from pkvm.hyp.policy import ANDROID, RFC, UPSTREAM, Policy
from pkvm.hyp.vmemmap import GUEST_SHARED_WITH_HOST

E = Errno
SIGNATURES: dict[HostCall, tuple[str, set[Errno]]] = {
    HostCall.GIC_CONFIG: ("", set()),
    HostCall.VCPU_RUN: ("word word word", {E.EINVAL}),
    HostCall.HOST_SHARE_HYP: ("pfn", {E.EPERM, E.EINVAL}),
    HostCall.HOST_UNSHARE_HYP: ("pfn", {E.EPERM, E.EINVAL, E.EBUSY}),
    HostCall.HOST_DONATE_GUEST: (
        "pfn gfn count", {E.EINVAL, E.EPERM, E.ENOMEM},
    ),
    HostCall.HOST_SHARE_GUEST: (
        "pfn gfn count word", {E.EINVAL, E.EPERM, E.ENOMEM},
    ),
    HostCall.HOST_UNSHARE_GUEST: (
        "handle gfn count", {E.EINVAL, E.ENOENT, E.E2BIG, E.EPERM},
    ),
    HostCall.RELAX_PERMS_GUEST: (
        "gfn word", {E.EINVAL, E.ENOENT, E.E2BIG, E.EAGAIN, E.EPERM},
    ),
    HostCall.WRPROTECT_GUEST: (
        "handle gfn count", {E.EINVAL, E.ENOENT, E.E2BIG, E.EPERM},
    ),
    HostCall.TEST_CLEAR_YOUNG_GUEST: (
        "handle gfn count word", {E.EINVAL, E.ENOENT, E.E2BIG, E.EPERM},
    ),
    HostCall.MKYOUNG_GUEST: (
        "gfn", {E.EINVAL, E.ENOENT, E.E2BIG, E.EAGAIN, E.EPERM},
    ),
    HostCall.RESERVE_VM: ("", set()),
    HostCall.UNRESERVE_VM: ("handle", set()),
    HostCall.INIT_VM: ("pa pa pa", {E.EINVAL, E.EPERM, E.ENOMEM, E.EBUSY}),
    HostCall.INIT_VCPU: ("handle pa pa", {E.EINVAL, E.ENOENT, E.ENOMEM, E.EBUSY}),
    HostCall.VCPU_IN_POISON_FAULT: ("", {E.EINVAL}),
    HostCall.FORCE_RECLAIM_GUEST_PAGE: (
        "pa", {E.EINVAL, E.EPERM, E.EFAULT, E.EAGAIN, E.ENOENT, E.ENOMEM},
    ),
    HostCall.RECLAIM_DYING_GUEST_PAGE: (
        "handle gfn", {E.EINVAL, E.ENOENT, E.EPERM, E.ENOMEM},
    ),
    HostCall.START_TEARDOWN_VM: ("handle", {E.EINVAL}),
    HostCall.FINALIZE_TEARDOWN_VM: ("handle", {E.EINVAL, E.EBUSY}),
    HostCall.VCPU_LOAD: ("handle word word", set()),
    HostCall.VCPU_PUT: ("", set()),
    HostCall.VCPU_SYNC_STATE: ("", {E.EINVAL}),
    HostCall.TLB_FLUSH_VMID: ("handle", {E.EINVAL, E.ENOENT}),
    HostCall.TOPUP_MEMCACHE: ("handle pa count", {E.EINVAL, E.ENOENT, E.ENOMEM}),
    HostCall.SET_FIRMWARE: ("handle pa count", {E.EINVAL, E.ENOENT, E.ENOMEM, E.EBUSY}),
    HostCall.DONATE_GUEST_SGLIST: (
        "handle pa count",
        {E.EINVAL, E.ENOENT, E.EPERM, E.ENOMEM},
    ),
    HostCall.RECLAIM_DYING_GUEST_RANGE: ("handle gfn count", {E.EINVAL, E.EPERM}),
    HostCall.PGD_INFO: ("", set()),
    HostCall.FIRMWARE_INFO: ("", set()),
    HostCall.VCPU_TIMER: ("handle word", {E.ENOENT}),
    HostCall.SPLIT_GUEST: (
        "gfn count", {E.EINVAL, E.ENOENT, E.E2BIG, E.ENOMEM, E.EPERM},
    ),
    HostCall.VCPU_FEATURES: ("", set()),
    HostCall.IOMMU_ALLOC_DOMAIN: ("domain pa", {E.EINVAL, E.EEXIST, E.ENOMEM}),
    HostCall.IOMMU_FREE_DOMAIN: ("domain", {E.ENOENT, E.EBUSY}),
    HostCall.IOMMU_TOPUP: ("domain pa count", {E.EINVAL, E.ENOENT, E.ENOMEM}),
    HostCall.IOMMU_ATTACH: ("domain stream", {E.ENOENT, E.EBUSY, E.EPERM}),
    HostCall.IOMMU_DETACH: ("domain stream", {E.ENOENT, E.EINVAL, E.EPERM}),
    HostCall.IOMMU_MAP: (
        "domain pa pa bytes word",
        {E.EINVAL, E.ENOENT, E.EPERM, E.EEXIST, E.EBUSY, E.ENOMEM},
    ),
    HostCall.IOMMU_UNMAP: ("domain pa bytes", {E.EINVAL, E.ENOENT}),
    HostCall.IOMMU_EVENTS: ("pa", {E.EINVAL, E.EPERM, E.EBUSY}),
    HostCall.ASSIGN_DEVICE: (
        "handle pa word word", {E.EINVAL, E.ENOENT, E.EPERM, E.EEXIST, E.EBUSY},
    ),
    HostCall.MAP_DEVICE_GUEST: (
        "handle pa gfn", {E.EINVAL, E.ENOENT, E.EPERM, E.EEXIST, E.ENOMEM},
    ),
}  # fmt: skip
"""What each argument is, and every errno that the call may give."""

GIVES_FIRST = (
    HostCall.INIT_VM, HostCall.INIT_VCPU, HostCall.TOPUP_MEMCACHE, HostCall.DONATE_GUEST_SGLIST,
    HostCall.IOMMU_ALLOC_DOMAIN, HostCall.IOMMU_TOPUP,
)  # fmt: skip
"""Undoing what the host has given leaves its tables in another shape."""
POLICIES = [RFC, ANDROID, UPSTREAM]
RUNS = settings(
    max_examples=12, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
Move = tuple[HostCall, list[int]]
moves = st.tuples(st.sampled_from(HostCall), st.lists(st.integers(0, 4095), min_size=5, max_size=5))
"""A call, and which of the numbers for each of its arguments."""


def test_every_call_is_known() -> None:
    assert set(SIGNATURES) == set(HostCall)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@RUNS
@given(
    todo=st.lists(moves, min_size=15, max_size=25),
    loaded=st.sampled_from([None, "mine", "plain", "other"]),
)
def test_the_host(policy: Policy, todo: list[Move], loaded: str | None) -> None:
    crowd = Crowd(policy, loaded)
    el2 = crowd.el2
    numbers = crowd.numbers()
    absent = {
        call
        for call, there in (
            (HostCall.FORCE_RECLAIM_GUEST_PAGE, policy.memory.force_reclaim),
            (HostCall.SPLIT_GUEST, policy.memory.split_call),
            (HostCall.SET_FIRMWARE, policy is not UPSTREAM),
            (HostCall.ASSIGN_DEVICE, policy.device_calls),
            (HostCall.MAP_DEVICE_GUEST, policy.device_calls),
        )
        if not there
    }
    try:
        for call, choice in todo:
            signature, errnos = SIGNATURES[call]
            args = []
            for name, number in zip(signature.split(), choice, strict=False):
                good, bad = numbers[name]
                args.append(good[number % len(good)] if number & 64 else bad[number % len(bad)])
            before, words = Snapshot(el2.hyp.mem, el2.hyp.vms()), el2._words()
            states, known = el2._states(), len(el2.refusals())
            el2.engine.interrupt()
            x0, x1, *_ = el2.hyp.host_call(HOST_CALL_BASE + call, *args)
            assert x0 == (-1 if call in absent else 0)
            if x1 < 0:
                assert -x1 in errnos, (call.name, Errno(-x1).name)
                assert el2.refusals()[known:][-1].errno == -x1
                assert (el2._words(), el2._states()) == (words, states)
                if call not in GIVES_FIRST:
                    assert before.differences(Snapshot(el2.hyp.mem, el2.hyp.vms())) == []
            el2.sound()
            assert crowd.readable_secrets() == set()
    finally:
        crowd.close()


def test_other_guests_live_on_after_it_all() -> None:
    """A fixed storm: each call with each number in each place, the others being good ones; the
    guest that nobody may touch still has what it had, and runs."""
    crowd = Crowd(RFC)
    el2 = crowd.el2
    mine = {crowd.mine.handle, crowd.dying.handle, crowd.plain.handle}
    kinds = {
        "pfn": crowd.frames(), "gfn": crowd.gfns(), "count": COUNTS, "pa": crowd.addresses(),
        "handle": [handle for handle in crowd.handles() if handle in mine or handle >= 1 << 32],
        "word": WORDS, "domain": WORDS, "stream": WORDS, "bytes": BYTES,
    }  # fmt: skip
    good = {"pfn": crowd.free >> 12, "gfn": GFN, "count": 1, "pa": crowd.free, "word": 0,
            "domain": 1, "stream": 1, "bytes": PAGE, "handle": crowd.mine.handle}  # fmt: skip
    ours = {crowd.other.ram + page * PAGE for page in range(PAGES)}
    for call, (signature, _) in SIGNATURES.items():
        names = signature.split()
        for place, name in enumerate(names):
            for number in kinds[name]:
                if call == HostCall.FORCE_RECLAIM_GUEST_PAGE and number in ours:
                    continue  # a page can be destroyed, in this dialect
                args = [good[other] for other in names]
                args[place] = number
                el2.engine.interrupt()
                el2.hyp.host_call(HOST_CALL_BASE + call, *args)
        el2.sound()
    assert crowd.readable_secrets() == set()
    el2.call(HostCall.VCPU_PUT)
    assert [el2.machine.memory.read_u64(pa) for pa in sorted(ours)[PRIVATE : PAGES - 1]] == [
        SECRET
    ] * (PAGES - 1 - PRIVATE)
    assert crowd.other.run() == ExitCode.IRQ
    assert crowd.other.run() == ExitCode.TRAP
    crowd.close()


# Guests

FUNCTIONS = (*Function, *psci.Function)
calls = st.tuples(
    st.one_of(st.sampled_from(FUNCTIONS), st.integers(0, (1 << 64) - 1)),
    *[st.integers(0, 4095)] * 3,
)
LEAVES = frozenset(
    int(function) & ~(1 << 30)
    for function in (psci.Function.CPU_OFF, psci.Function.SYSTEM_OFF, psci.Function.SYSTEM_RESET,
                     psci.Function.SYSTEM_RESET2_64)
)  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@RUNS
@given(todo=st.lists(calls, min_size=15, max_size=25))
def test_a_guest(policy: Policy, todo: list[tuple[int, int, int, int]]) -> None:
    """What it is refused changes nothing, and of the others' memory nothing ever changes."""
    crowd = Crowd(policy)
    el2, guest = crowd.el2, crowd.mine
    engine, hyp = el2.engine, el2.hyp
    frames = [frame << 12 & (1 << 64) - 1 for frame in crowd.gfns()]
    all_ = (
        *frames,
        *(ipa + 8 for ipa in frames[:4]),
        crowd.other.ram,
        *COUNTS,
        *WORDS,
        0xC400_0003,
    )
    likely = (frames[:10], (0, 1, 2), (0,))
    others = [vm for vm in hyp.vms() if vm.handle != guest.handle]
    guest.load()
    try:
        for function, *choice in todo:
            if function & 0xBFFF_FFFF & ~(1 << 16) in LEAVES:
                continue
            _at_the_call(crowd)
            args = [
                good[number % len(good)] if number & 64 else all_[number % len(all_)]
                for good, number in zip(likely, choice, strict=True)
            ]
            for number, value in enumerate((int(function), *args)):
                engine.x[number] = value
            before, theirs = Snapshot(hyp.mem, hyp.vms()), Snapshot(hyp.mem, others)
            states = el2._states()
            code = el2.call(HostCall.VCPU_RUN, 0, 0, 0)
            refused = _answer(crowd, code)
            if refused:
                assert el2._states() == states
                assert before.differences(Snapshot(hyp.mem, hyp.vms())) == []
            mine = ("carve-out", "pool")
            assert [
                name
                for name in theirs.differences(Snapshot(hyp.mem, others))
                if name not in mine and "TLB" not in name
            ] == []
            el2.sound()
            assert crowd.readable_secrets() <= _shared(crowd)
    finally:
        crowd.close()


def _at_the_call(crowd: Crowd) -> None:
    """Put the guest's PC on its HVC."""
    crowd.el2.engine.pc = CALL_IPA


def _answer(crowd: Crowd, code: int) -> bool:
    """Whether a call was refused; whatever the guest asks of the host it gets nothing."""
    el2 = crowd.el2
    if code == ExitCode.HYP_REQ:
        assert el2.shown[RunResult.REQ_TYPE] in (HypRequest.MEMCACHE, HypRequest.MAP)
        return True
    if code != ExitCode.TRAP or el2.shown[RunResult.ESR] >> 26 != 1:
        return False
    x0 = el2.engine.args()[0]
    assert el2.engine.pc == CALL_IPA + 4
    return x0 in (INVALID_PARAMETER, NOT_SUPPORTED) and x0 != SUCCESS


def _shared(crowd: Crowd) -> set[int]:
    """PAs of pages that the guest itself has shared: no secrets any more."""
    mem, mine = crowd.el2.hyp.mem, crowd.mine
    shared = mem.vmemmap.states == GUEST_SHARED_WITH_HOST
    return {
        pa
        for pa in crowd.secrets
        if mine.ram <= pa < mine.ram + PAGES * PAGE and shared[(pa - mem.memory.ram_base) >> 12]
    }
