# SPDX-License-Identifier: GPL-2.0-or-later
"""Loads and stores where there is no memory: KVM_EXIT_MMIO, and what the guest gets (KVM API 5)."""

from __future__ import annotations

from pkvm.check.scenarios.bench import CODE, DEVICE, FREE, PAGE, RAM, Bench, Guest
from pkvm.guests.protocol import Op

TITLE = "MMIO of every size and sign"
_ANSWER = 0x8182_8384_8586_8788
"""Every byte of it has the sign bit."""
_POSITIVE = 0x0102_0304_0506_0708
_LOADS = (
    Op.LDRB,
    Op.LDRH,
    Op.LDR_W,
    Op.LDR_X,
    Op.LDRSB_W,
    Op.LDRSB_X,
    Op.LDRSH_W,
    Op.LDRSH_X,
    Op.LDRSW,
)
_STORES = (Op.STRB, Op.STRH, Op.STR_W, Op.STR_X)


def _load(guest: Guest, operation: Op, ipa: int, answer: int) -> None:
    guest.op(operation, ipa)
    guest.answer(answer)
    guest.resume(show=2)


def good_loads(bench: Bench) -> None:
    """Each load instruction gets as many bytes of the answer as it asks for, extended."""
    guest = bench.vm().agent()
    for operation in _LOADS:
        _load(guest, operation, DEVICE, _ANSWER)
        _load(guest, operation, DEVICE + 8, _POSITIVE)


def good_stores(bench: Bench) -> None:
    """Each store instruction shows as many bytes as it stores."""
    guest = bench.vm().agent()
    for operation in _STORES:
        guest.op(operation, DEVICE, _ANSWER)
        guest.resume(show=1)


def good_zero_register(bench: Bench) -> None:
    """XZR: a load's answer goes nowhere, a store is of 0."""
    guest = bench.vm().agent()
    guest.op(Op.LDR_XZR, DEVICE, 5)
    guest.answer(_ANSWER)
    guest.resume(show=2)
    guest.op(Op.STR_XZR, DEVICE, 5)
    guest.resume(show=2)


def good_not_protected(bench: Bench) -> None:
    """The same of a guest that is not protected."""
    guest = bench.vm(protected=False).agent()
    for operation in (Op.LDRB, Op.LDRSB_W, Op.LDRSB_X, Op.LDRSW, Op.LDR_X):
        _load(guest, operation, DEVICE, _ANSWER)
    for operation in _STORES:
        guest.op(operation, DEVICE, _ANSWER)
        guest.resume(show=1)


def good_places(bench: Bench) -> None:
    """Any address that no slot has: at the ends of slots, of the address space, at 0."""
    guest = bench.vm().agent()
    for ipa in (0, RAM - 8, RAM + 16 * PAGE, FREE, CODE - 8, (1 << 40) - 8):
        _load(guest, Op.LDR_X, ipa, _POSITIVE)


def good_unaligned(bench: Bench) -> None:
    """Addresses that are no multiple of the access's size."""
    for protected in (True, False):
        guest = bench.vm(protected=protected, name="" if protected else "other ").agent()
        for operation, offset in ((Op.LDR_X, 4), (Op.LDR_W, 2), (Op.LDR_W, 1), (Op.LDRH, 3)):
            _load(guest, operation, DEVICE + offset, _POSITIVE)
        guest.op(Op.STR_X, DEVICE + 3, _POSITIVE)
        guest.resume(show=1)


def good_acquire_release(bench: Bench) -> None:
    """LDAR and STLR are loads and stores like any other."""
    guest = bench.vm().agent()
    _load(guest, Op.LDAR, DEVICE, _POSITIVE)
    guest.op(Op.STLR, DEVICE, _POSITIVE)
    guest.resume(show=1)


def good_not_answered(bench: Bench) -> None:
    """A VMM that does not answer a load: the guest gets what kvm_run held."""
    guest = bench.vm().agent()
    _load(guest, Op.LDR_X, DEVICE, _POSITIVE)
    guest.op(Op.LDR_X, DEVICE)
    guest.resume(show=2)


def good_answered_later(bench: Bench) -> None:
    """`immediate_exit` while the load waits: the answer counts, the guest goes on later."""
    guest = bench.vm().agent()
    guest.op(Op.LDR_X, DEVICE)
    guest.answer(_POSITIVE)
    guest.vcpu.kick()
    bench.call("KVM_RUN", "immediate_exit", guest.vcpu.run)
    guest.resume(show=2)


def good_memory_appears(bench: Bench) -> None:
    """A slot made where the guest met MMIO is memory from then on."""
    vm = bench.vm()
    guest = vm.agent()
    _load(guest, Op.LDR_X, FREE, _POSITIVE)
    memory = bench.memory("free", 1)
    memory.write(0, b"\x42")
    vm.slot(2, FREE, memory)
    guest.load(FREE)
    guest.load(FREE + PAGE)
    guest.resume(show=2)


def bad_crossing(bench: Bench) -> None:
    """An access that crosses into another page, out of memory, and into it."""
    for protected in (True, False):
        vm = bench.vm(protected=protected, name="" if protected else "other ")
        guest = vm.agent()
        guest.op(Op.LDR_X, DEVICE + PAGE - 4)
        guest.answer(_POSITIVE)
        guest.resume(show=2)
        guest.store(RAM + 16 * PAGE - 8, 0x1111_2222_3333_4444)
        guest.op(Op.LDR_X, RAM + 16 * PAGE - 4)
        guest.answer(_POSITIVE)
        guest.resume(show=2)


def bad_beyond(bench: Bench) -> None:
    """Addresses beyond the guest's address space."""
    for protected in (True, False):
        guest = bench.vm(protected=protected, name="" if protected else "other ").agent()
        for ipa in (1 << 44, 1 << 47, 1 << 48, (1 << 48) - 8, 1 << 52):
            guest.load(ipa)
            guest.store(ipa, 1)
