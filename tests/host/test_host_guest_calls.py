# SPDX-License-Identifier: GPL-2.0-or-later
"""SMCCC and PSCI of guests, as far as the host serves them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from fakes.host_fakes import FakeVcpu, Guest, errno_of
from fakes.host_machine import DEVICE, RAM_IPA, TIMEOUT_S, Machine, dabt
from pkvm.arm64 import psci
from pkvm.arm64.esr import EC, EC_SHIFT, IL
from pkvm.arm64.smccc import VENDOR_HYP_UID, Function
from pkvm.hyp.abi import HostVcpu
from pkvm.uapi import kvm as uapi

EINVAL = 22
HVC = EC.HVC64 << EC_SHIFT | IL
MASK64 = (1 << 64) - 1


def calls(*arguments: tuple[int, ...], esr: int = HVC) -> tuple[Guest, list[tuple[int, ...]]]:
    """A non-protected guest that makes calls, and their results."""
    results: list[tuple[int, ...]] = []

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        for one in arguments:
            words = {f"x{n}": value for n, value in enumerate((*one, 0, 0, 0)[:4])}
            yield vcpu.publish(esr=esr, **words)
            results.append(tuple(vcpu.read(HostVcpu.X + 8 * n) for n in range(4)))

    return guest, results


def test_smccc_and_psci_of_a_non_protected_guest() -> None:
    features = psci.Function.PSCI_FEATURES
    table: list[tuple[tuple[int, ...], tuple[int, ...] | int]] = [
        ((Function.SMCCC_VERSION,), 0x1_0001),
        ((Function.VENDOR_UID,), VENDOR_HYP_UID),
        ((Function.KVM_FEATURES,), 1),
        ((Function.HYP_MEMINFO,), MASK64),
        ((Function.MEM_SHARE, RAM_IPA), MASK64),
        ((0xC600_00FF,), MASK64),
        ((psci.Function.PSCI_VERSION,), 0x1_0001),
        ((psci.Function.PSCI_VERSION | 1 << 40,), 0x1_0001),
        ((features, psci.Function.CPU_ON_64), 0),
        ((features, Function.SMCCC_VERSION), 0),
        ((features, psci.Function.SYSTEM_SUSPEND_64), psci.NOT_SUPPORTED),
        ((psci.Function.MIGRATE_INFO_TYPE,), 2),
        ((psci.Function.AFFINITY_INFO_64, 0), 0),
        ((psci.Function.AFFINITY_INFO_64, 1), 1),
        ((psci.Function.AFFINITY_INFO_64, 0, 3), 0),
        ((psci.Function.AFFINITY_INFO_64, 7), psci.INVALID_PARAMS),
        ((psci.Function.AFFINITY_INFO_64, 0, 4), psci.INVALID_PARAMS),
        ((psci.Function.AFFINITY_INFO_64, 1 << 31), psci.INVALID_PARAMS),
        ((psci.Function.CPU_ON_64, 0, 1, 2), psci.ALREADY_ON),
        ((psci.Function.CPU_ON_64, 9, 1, 2), psci.INVALID_PARAMS),
        ((psci.Function.CPU_ON_64, 1 << 31 | 1, 1, 2), psci.INVALID_PARAMS),
        ((psci.Function.SYSTEM_RESET2_64, 5), psci.INVALID_PARAMS),
    ]
    guest, results = calls(*(arguments for arguments, _ in table))
    machine = Machine(guest, lambda vcpu: iter(()), protected=False)
    assert errno_of(machine.run) == EINVAL
    for (arguments, expected), result in zip(table, results, strict=True):
        wanted = expected if isinstance(expected, tuple) else (expected, 0, 0, 0)
        assert result == wanted, hex(arguments[0])


def test_smc_is_as_hvc_but_for_its_immediate() -> None:
    smc = EC.SMC64 << EC_SHIFT | IL
    for immediate, expected in ((0, 0x1_0001), (1, MASK64)):
        guest, results = calls((Function.SMCCC_VERSION,), esr=smc | immediate)
        machine = Machine(guest, protected=False)
        assert errno_of(machine.run) == EINVAL
        assert results[0][0] == expected


@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize(
    ("function", "kind", "flags"),
    [
        (psci.Function.SYSTEM_OFF, uapi.SystemEvent.SHUTDOWN, 0),
        (psci.Function.SYSTEM_RESET, uapi.SystemEvent.RESET, 0),
        (psci.Function.SYSTEM_RESET2_64, uapi.SystemEvent.RESET, 1),
    ],
)
def test_the_system_ends_and_no_vcpu_runs_any_more(
    function: int, kind: int, flags: int, protected: bool
) -> None:
    guest, results = calls((function,))
    machine = Machine(guest, protected=protected)
    assert machine.run() == uapi.ExitReason.SYSTEM_EVENT
    event = uapi.Run.SYSTEM_EVENT.unpack_from(machine.pages[0].view, 32)
    assert event[:3] == (kind, 1, flags)
    if not protected:
        assert machine.rig.get_reg(machine.vcpus[0], uapi.reg_x(0)) == psci.INTERNAL_FAILURE
    runs = threading.Thread(target=errno_of, args=(machine.run,))
    runs.start()
    runs.join(0.05)
    assert runs.is_alive(), "it waits, as a vCPU that is off does"
    while runs.is_alive():
        machine.rig.kernel.kick(machine.vcpus[0])
        runs.join(0.01)
    assert not results
    machine.close()


@pytest.mark.parametrize("protected", [False, True])
def test_cpu_on_wakes_the_thread_that_waits_in_kvm_run(protected: bool) -> None:
    order: list[str] = []
    seen: list[int] = []

    def first(vcpu: FakeVcpu) -> Iterator[int]:
        yield vcpu.publish(esr=HVC, x0=psci.Function.CPU_ON_64, x1=1, x2=0x5000, x3=77)
        order.append("on")
        seen.append(vcpu.x0 if protected else vcpu.read(HostVcpu.X))
        yield vcpu.publish(esr=HVC, x0=psci.Function.CPU_OFF)
        order.append("never")

    def second(vcpu: FakeVcpu) -> Iterator[int]:
        order.append("second")
        seen.extend(vcpu.read(HostVcpu.PC + at) for at in (0, 8))
        seen.append(vcpu.read(HostVcpu.X))
        yield vcpu.publish(**dabt(DEVICE, 0))

    machine = Machine(first, second, protected=protected)
    done: list[int] = []
    secondary = threading.Thread(target=lambda: done.append(machine.run(1)))
    secondary.start()
    primary = threading.Thread(target=errno_of, args=(machine.run,))
    primary.start()
    secondary.join(TIMEOUT_S)
    assert done == [uapi.ExitReason.MMIO]
    assert sorted(order) == ["on", "second"]
    assert 0 in seen
    if not protected:
        assert {0x5000, 0x3C5, 77} <= set(seen)
    while primary.is_alive():
        machine.rig.kernel.kick(machine.vcpus[0])
        primary.join(0.01)
    state = bytearray(4)
    machine.rig.kernel.ioctl(machine.vcpus[0], uapi.Ioctl.GET_MP_STATE, state)
    assert state[0] == uapi.MpState.STOPPED
    machine.close()
