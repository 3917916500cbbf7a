# SPDX-License-Identifier: GPL-2.0-or-later
"""Instructions fetched from where there are none: an abort that the guest takes."""

from __future__ import annotations

from pkvm.check.scenarios.bench import CODE, DEVICE, FREE, PAGE, RAM, Bench

TITLE = "Instruction fetch from nowhere"
_NOWHERE = (0, DEVICE, FREE, RAM - 4, RAM + 16 * PAGE, (1 << 40) - 4)
_BEYOND = (1 << 40, 1 << 44, 1 << 48)
_RET = bytes.fromhex("c0035fd6")
_HVC_RET = bytes.fromhex("020000d4") + _RET


def _branches(bench: Bench, *, protected: bool) -> None:
    guest = bench.vm(protected=protected).agent()
    for ipa in _NOWHERE + _BEYOND:
        guest.branch(ipa)
    guest.load(CODE, 4)


def bad_protected(bench: Bench) -> None:
    """A protected guest branches to where it has no memory."""
    _branches(bench, protected=True)


def bad_not_protected(bench: Bench) -> None:
    """So does one that is not protected."""
    _branches(bench, protected=False)


def bad_unaligned(bench: Bench) -> None:
    """An address that no instruction has."""
    guest = bench.vm().agent()
    for offset in (1, 2, 3):
        guest.branch(RAM + offset)
    guest.branch(DEVICE + 2)


def good_from_ram(bench: Bench) -> None:
    """Code that the host put into RAM runs, and is the guest's from then on."""
    for protected in (True, False):
        name = "" if protected else "other "
        vm = bench.vm(protected=protected, name=name)
        vm.ram.write(0, _RET)
        vm.ram.write(PAGE, _HVC_RET)
        guest = vm.agent()
        guest.branch(RAM, 5)
        vm.load(0, 4)
        guest.branch(RAM + PAGE, 0x8400_0000)
        vm.load(PAGE, 4)


def bad_empty_page(bench: Bench) -> None:
    """A page of zeroes is memory: UDF, and not an abort."""
    vm = bench.vm()
    guest = vm.agent()
    guest.branch(RAM)
    vm.load(0)
    guest.branch(RAM + 15 * PAGE + 0xFFC)


def bad_runs_out(bench: Bench) -> None:
    """NOPs up to the end of the last page, and nothing behind it."""
    vm = bench.vm()
    nop = bytes.fromhex("1f2003d5")
    vm.ram.write(16 * PAGE - 8, nop + nop)
    guest = vm.agent()
    guest.branch(RAM + 16 * PAGE - 8)
    vm.load(16 * PAGE - 8)
    guest.branch(RAM + 16 * PAGE - 4)


def bad_first_instruction(bench: Bench) -> None:
    """A vCPU that starts where nothing is: the abort's vector is nowhere too."""
    for protected in (True, False):
        vm = bench.vm(protected=protected, name="" if protected else "other ")
        vcpu = vm.vcpu()
        vcpu.set_reg("pc", FREE)
        bench.kick_after(0.02, vcpu, stuck=True)
        bench.call("KVM_RUN", f"vCPU at an empty address, protected {protected}", vcpu.run)
