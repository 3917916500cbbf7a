# SPDX-License-Identifier: GPL-2.0-or-later
"""List registers from the host, and the interface's state across a world switch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import a64
from fakes.el2_rig import INCREMENT_PC, PAGE, RAM_IPA, El2, Guest
from pkvm.arm64 import gic as g
from pkvm.arm64 import registers as r
from pkvm.arm64.psci import Affinity, Function
from pkvm.hyp.abi import ExitCode, HostCall, HostVcpu, RunResult

DAIFCLR_IRQ = 0xD503_42FF
ERET = a64.ERET
VECTORS = RAM_IPA + 0x1000
IRQ = 0x280
SENTINEL = 0x5E_5E5E_5E5E_5E5E
WORDS = (
    HostVcpu.VGIC_HCR,
    HostVcpu.VGIC_VMCR,
    HostVcpu.VGIC_MISR,
    *range(HostVcpu.VGIC_LR, HostVcpu.VGIC_LR + 0x80, 8),
)
"""All that EL2 ever writes of the interface."""
OPEN = [
    *a64.mov(0, VECTORS), a64.msr(r.VBAR_EL1, 0),
    *a64.mov(0, 0xF8), a64.msr(r.ICC_PMR_EL1, 0),
    *a64.mov(0, 1), a64.msr(r.ICC_IGRPEN1_EL1, 0),
]  # fmt: skip
"""A guest's first instructions: vectors, and the interface lets group 1 through."""
WAIT = [a64.WFI, 0x17FF_FFFF]
"""WFI for ever."""
LEAVE = [a64.msr(r.ICC_SGI1R_EL1, 31), 0x17FF_FFFF]
"""An exit to the host, for ever; WFI goes on when an interrupt is pending, masked or not."""
HANDLER = [
    a64.mrs(10, r.ICC_IAR1_EL1),
    a64.ISB,
    a64.msr(r.ICC_EOIR1_EL1, 10),
    ERET,
]


@pytest.fixture
def el2() -> Iterator[El2]:
    made = El2()
    yield made
    made.machine.close()


def pending(intid: int, priority: int = 0x80, *, eoi: bool = False) -> int:
    word = g.LR.encode(State=1, Group=1, Priority=priority, vINTID=intid)
    return word | (g.LR_EOI if eoi else 0)


def make(el2: El2, words: list[int], *, handler: list[int] = HANDLER, **options: bool) -> Guest:
    """A guest with `words` and an IRQ handler."""
    guest = Guest(el2, words + [a64.NOP] * ((0x1000 + IRQ) // 4 - len(words)) + handler, **options)
    for offset in WORDS:
        guest.set(offset, SENTINEL)
    return guest


def give(guest: Guest, *lrs: int, hcr: int = 0, index: int = 0) -> None:
    """The host puts list registers into its page."""
    guest.set(HostVcpu.VGIC_HCR, hcr, index)
    for number, lr in enumerate(lrs):
        guest.set(HostVcpu.VGIC_LR + 8 * number, lr, index)


def lrs(guest: Guest, count: int = 4) -> list[int]:
    return [guest.word(HostVcpu.VGIC_LR + 8 * number) for number in range(count)]


def states(guest: Guest, count: int = 4) -> list[int]:
    return [lr >> 62 for lr in lrs(guest, count)]


def wfi(guest: Guest, *, nr_lrs: int = 0, again: bool = True, index: int = 0) -> None:
    """Run to the next WFI."""
    flags = INCREMENT_PC if again else 0
    assert guest.run(index, flags=flags, nr_lrs=nr_lrs) == ExitCode.TRAP
    assert guest.ec() == 1


def leave(guest: Guest, *, nr_lrs: int = 0) -> None:
    """Run to the next exit of LEAVE's kind."""
    assert guest.run(flags=INCREMENT_PC, nr_lrs=nr_lrs) == ExitCode.TRAP
    assert guest.ec() == 0x18


def test_config(el2: El2) -> None:
    vtr = el2.call(HostCall.GIC_CONFIG)
    found = {name: field.get(vtr) for name, field in g.VTR.fields.items()}
    assert (found["ListRegs"], found["PRIbits"], found["PREbits"]) == (3, 4, 4)
    assert (found["IDbits"], found["A3V"], found["SEIS"]) == (0, 0, 0)


@pytest.mark.parametrize("protected", [True, False])
def test_an_interrupt_reaches_the_guest_and_its_end_the_host(el2: El2, protected: bool) -> None:
    guest = make(el2, [*OPEN, DAIFCLR_IRQ, *WAIT], protected=protected)
    wfi(guest, again=False)
    give(guest, pending(40), pending(41, 0x40))
    wfi(guest, nr_lrs=2)
    assert el2.engine.x[10] == 40
    assert lrs(guest, 3) == [pending(40) ^ 1 << 62, pending(41, 0x40) ^ 1 << 62, SENTINEL]
    vmcr = guest.word(HostVcpu.VGIC_VMCR)
    assert g.VMCR["VPMR"].get(vmcr) == 0xF8
    assert (g.VMCR["VENG1"].get(vmcr), g.VMCR["VENG0"].get(vmcr)) == (1, 0)


@pytest.mark.parametrize("nr_lrs", [5, 16, 1 << 40, (1 << 64) - 1, -1])
def test_more_list_registers_than_there_are(el2: El2, nr_lrs: int) -> None:
    guest = make(el2, [*OPEN, DAIFCLR_IRQ, *WAIT])
    wfi(guest, again=False)
    give(guest, *(pending(32 + number) for number in range(16)))
    wfi(guest, nr_lrs=nr_lrs)
    assert states(guest, 16) == [0] * 4 + [1] * 12


def test_a_number_beyond_64_bits_is_cut(el2: El2) -> None:
    guest = make(el2, [*OPEN, DAIFCLR_IRQ, *WAIT])
    wfi(guest, again=False)
    give(guest, pending(40))
    wfi(guest, nr_lrs=1 << 64)
    assert (states(guest, 1), guest.word(HostVcpu.VGIC_HCR)) == ([1], 0)


@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.integers(0, (1 << 64) - 1), max_size=4), hcr=st.integers(0, (1 << 64) - 1))
def test_what_the_host_has_no_say_in_is_cleared(words: list[int], hcr: int) -> None:
    el2, guest = _idle()
    give(guest, *words, hcr=hcr)
    guest.run(nr_lrs=len(words))
    for given_, taken in zip(words, el2.engine.gic.lr, strict=False):
        expected = given_ & (g.LR_STATE | g.LR_GROUP1 | 0xF8 << 48 | g.LR_EOI | 0xFFFF)
        if given_ & g.LR_HW:
            expected &= ~g.LR_EOI
        assert taken == expected
    assert lrs(guest, len(words)) == el2.engine.gic.lr[: len(words)]
    interface = el2.engine.gic.hcr
    assert interface & ~g.HCR_EN == (hcr & 0xFE if words else 0)
    assert interface & g.HCR_EN


_IDLE: list[tuple[El2, Guest]] = []


def _idle() -> tuple[El2, Guest]:
    """A guest that waits with all interrupts masked; the same for every example."""
    if not _IDLE:
        el2 = El2()
        guest = make(el2, WAIT)
        wfi(guest, again=False)
        _IDLE.append((el2, guest))
    return _IDLE[0]


def test_a_run_without_interrupts_writes_nothing(el2: El2) -> None:
    guest = make(el2, [*WAIT])
    for again in (False, True, True):
        wfi(guest, again=again)
    assert [guest.word(offset) for offset in WORDS] == [SENTINEL] * len(WORDS)


def test_without_list_registers_only_news_is_told(el2: El2) -> None:
    guest = make(el2, [a64.WFI, *a64.mov(0, 0xF0), a64.msr(r.ICC_PMR_EL1, 0), *WAIT])
    wfi(guest, again=False)
    assert guest.word(HostVcpu.VGIC_VMCR) == SENTINEL
    wfi(guest)
    assert guest.word(HostVcpu.VGIC_VMCR) == g.VMCR.encode(VFIQEn=1, VBPR0=2, VBPR1=3, VPMR=0xF0)
    assert lrs(guest) == [SENTINEL] * 4
    guest.set(HostVcpu.VGIC_VMCR, SENTINEL)
    wfi(guest)
    assert guest.word(HostVcpu.VGIC_VMCR) == SENTINEL


def test_list_registers_of_the_run_before_are_gone(el2: El2) -> None:
    guest = make(el2, [*OPEN, a64.WFI, DAIFCLR_IRQ, *WAIT])
    wfi(guest, again=False)
    give(guest, pending(40))
    wfi(guest, nr_lrs=0)
    assert el2.engine.x[10] == 0
    give(guest, pending(40))
    wfi(guest, nr_lrs=1)
    assert (states(guest, 1), el2.engine.x[10]) == ([0], 40)


def test_eoi_count_is_told_once(el2: El2) -> None:
    eoi = [*a64.mov(0, 0b11), a64.msr(r.ICC_AP1R0_EL1, 0), *a64.mov(0, 50),
           a64.msr(r.ICC_EOIR1_EL1, 0), a64.msr(r.ICC_EOIR1_EL1, 0)]  # fmt: skip
    guest = make(el2, [*eoi, *WAIT])
    wfi(guest, again=False)
    assert guest.word(HostVcpu.VGIC_HCR) == 2 << 27
    give(guest, pending(40), hcr=guest.word(HostVcpu.VGIC_HCR))
    wfi(guest, nr_lrs=1)
    assert guest.word(HostVcpu.VGIC_HCR) == 0


@pytest.mark.parametrize("protected", [True, False])
def test_maintenance_is_an_interrupt_of_the_hosts(el2: El2, protected: bool) -> None:
    guest = make(el2, [*OPEN, DAIFCLR_IRQ, *WAIT], protected=protected)
    wfi(guest, again=False)
    give(guest, pending(40, eoi=True), hcr=g.HCR_NPIE)
    assert guest.run(flags=INCREMENT_PC, nr_lrs=1) == ExitCode.IRQ
    assert guest.shown[2:] == (0,) * 6
    assert guest.word(HostVcpu.VGIC_MISR) == g.MISR_NP
    assert states(guest, 1) == [2]
    give(guest, lrs(guest, 1)[0], hcr=0)
    assert guest.run(nr_lrs=1) == ExitCode.IRQ
    assert guest.word(HostVcpu.VGIC_MISR) == g.MISR_EOI
    assert states(guest, 1) == [0]
    wfi(guest, again=False)


def test_hypercall_of_el2s_with_an_interrupt_pending(el2: El2) -> None:
    """EL2 answers and goes on: the guest has its answer and its interrupt."""
    call = [*a64.mov(0, 0x8400_0000), a64.HVC, a64.move(5, 0)]
    guest = make(el2, [*OPEN, *call, DAIFCLR_IRQ, *WAIT])
    give(guest, pending(40))
    guest.load()
    el2.call(HostCall.VCPU_RUN, 0, 0, 1)
    assert (el2.engine.x[5], el2.engine.x[10]) == (0x1_0001, 40)


@pytest.mark.parametrize("register", [r.ICC_SGI1R_EL1, r.ICC_ASGI1R_EL1, r.ICC_SGI0R_EL1])
def test_sgi_is_the_hosts(el2: El2, register: r.SysReg) -> None:
    word = g.SGIR.encode(TargetList=3, INTID=5, Aff1=1)
    guest = make(el2, [*a64.mov(4, word), a64.msr(register, 4), *WAIT])
    assert guest.run() == ExitCode.TRAP
    assert (guest.ec(), guest.esr() & 0x3F_FC1F) == (0x18, register.iss)
    assert guest.shown[RunResult.X0] == word
    wfi(guest)


def test_sre_is_answered_by_el2(el2: El2) -> None:
    words = [a64.mrs(1, r.ICC_SRE_EL1), a64.msr(r.ICC_SRE_EL1, 31), a64.mrs(2, r.ICC_SRE_EL1)]
    guest = make(el2, [*words, a64.mrs(3, r.ID_AA64PFR0_EL1), *WAIT])
    wfi(guest, again=False)
    assert (el2.engine.x[1], el2.engine.x[2]) == (7, 7)
    assert el2.engine.x[3] >> 24 & 0xF == 1


# World switch

ACKNOWLEDGE = [a64.mrs(10, r.ICC_IAR1_EL1)]
LOOK = [a64.mrs(1, r.ICC_RPR_EL1), a64.mrs(2, r.ICC_PMR_EL1), a64.mrs(3, r.ICC_IGRPEN1_EL1),
        a64.mrs(4, r.ICC_AP1R0_EL1), a64.mrs(5, r.ICC_BPR1_EL1), a64.mrs(6, r.ICC_CTLR_EL1),
        a64.mrs(7, r.ICC_HPPIR1_EL1)]  # fmt: skip
"""What a guest sees of the interface, to X1-X7."""
RESET = [0xFF, 0, 0, 0, 3, 0x400, 1023]


def seen(el2: El2) -> list[int]:
    return list(el2.engine.x[1:8])


def test_active_priorities_and_masks_survive_another_vm(el2: El2) -> None:
    set_up = [
        *a64.mov(0, 6),
        a64.msr(r.ICC_BPR1_EL1, 0),
        *a64.mov(0, 2),
        a64.msr(r.ICC_CTLR_EL1, 0),
    ]
    first = make(el2, [*OPEN, *set_up, a64.WFI, *ACKNOWLEDGE, a64.WFI, *LOOK, *LEAVE])
    other = make(el2, [*LOOK, *WAIT])
    wfi(first, again=False)
    give(first, pending(40, 0x50))
    wfi(first, nr_lrs=1)
    wfi(other, again=False)
    assert seen(el2) == RESET
    give(first, lrs(first, 1)[0], pending(41, 0x48), pending(42, 0x30))
    leave(first, nr_lrs=3)
    assert seen(el2) == [0x40, 0xF8, 1, 1 << 8, 6, 0x402, 42]
    page = el2.bus.read(first.vcpus[0], PAGE)
    assert (1 << 8).to_bytes(8, "little") not in page[HostVcpu.VGIC_HCR : HostVcpu.VGIC_LR]


def test_an_interrupt_of_one_vm_is_not_seen_by_another(el2: El2) -> None:
    first = make(el2, [*OPEN, *LEAVE])
    other = make(el2, [*OPEN, DAIFCLR_IRQ, *LOOK, *WAIT])
    leave(first)
    give(first, pending(40))
    leave(first, nr_lrs=1)
    wfi(other, again=False)
    assert el2.engine.x[7] == 1023
    assert el2.engine.x[10] == 0
    give(other, pending(77))
    wfi(other, nr_lrs=1)
    assert el2.engine.x[10] == 77
    assert states(first, 1) == [1]


def test_vcpus_of_one_vm_have_interfaces_of_their_own(el2: El2) -> None:
    guest = Guest(el2, [*OPEN, *LOOK, *WAIT], protected=False, vcpus=2)
    wfi(guest, again=False)
    guest.set(HostVcpu.PC, RAM_IPA + 4 * len(OPEN), 1)
    wfi(guest, again=False, index=1)
    assert seen(el2) == RESET
    wfi(guest)
    assert el2.engine.gic.vmcr == g.VMCR.encode(VENG1=1, VFIQEn=1, VBPR0=2, VBPR1=3, VPMR=0xF8)


def test_cpu_on_starts_with_a_reset_interface(el2: El2) -> None:
    """A vCPU that was off and comes back finds nothing of what it was before."""
    guest = Guest(el2, [0] * 64, vcpus=2)
    second = RAM_IPA + 0x800
    on = [*a64.mov(0, Function.CPU_ON_64), *a64.mov(1, 1), *a64.mov(2, second), a64.HVC]
    primary = [*on, a64.WFI, *on, *WAIT]
    secondary = [*LOOK, a64.WFI, *OPEN, *a64.mov(0, 0xFF), a64.msr(r.ICC_AP1R0_EL1, 0),
                 *a64.mov(0, Function.CPU_OFF), a64.HVC]  # fmt: skip
    memory = el2.machine.memory
    memory.write(guest.ram, a64.code(primary))
    memory.write(guest.ram + 0x800, a64.code(secondary))
    assert guest.run(0) == ExitCode.TRAP
    for _ in range(2):
        wfi(guest, again=False)
        wfi(guest, again=False, index=1)
        assert seen(el2) == RESET
        assert guest.run(1, flags=INCREMENT_PC) == ExitCode.TRAP
        assert el2.engine.gic.ap1r == 0xFF
        guest.run(0, flags=INCREMENT_PC)


def test_an_interrupt_from_before_cpu_off_comes_again_after_cpu_on(el2: El2) -> None:
    """The vCPU stays on the CPU meanwhile, and its list registers are the same."""
    guest = Guest(el2, [0] * 64, vcpus=2)
    second = RAM_IPA + 0x800
    on = [*a64.mov(0, Function.CPU_ON_64), *a64.mov(1, 1), *a64.mov(2, second), a64.HVC]
    off = [*a64.mov(0, Function.CPU_OFF), a64.HVC]
    memory = el2.machine.memory
    memory.write(guest.ram, a64.code([*on, *LEAVE]))
    memory.write(guest.ram + 0x800, a64.code([*OPEN, a64.mrs(7, r.ICC_HPPIR1_EL1), *off]))
    guest.run(0)
    guest.run(0)
    vcpu = guest.vcpu(1)
    give(guest, pending(40), index=1)
    for _ in range(2):
        assert guest.run(1, nr_lrs=1) == ExitCode.TRAP
        assert (guest.ec(), el2.engine.x[7]) == (0x16, 40)
        el2.engine.x[7] = 0
        vcpu.power, vcpu.entry_pc = Affinity.ON_PENDING, second


def test_the_end_of_a_vm_leaves_nothing_in_the_cpu(el2: El2) -> None:
    guest = make(el2, [*OPEN, *a64.mov(0, 0xFF), a64.msr(r.ICC_AP1R0_EL1, 0), *WAIT])
    give(guest, pending(40))
    guest.run(nr_lrs=1)
    guest.end()
    gic = el2.engine.gic
    assert (gic.ap1r, gic.lr, gic.changed) == (0, [0] * 4, False)
    assert gic.vmcr == g.VMCR.encode(VFIQEn=1, VBPR0=2, VBPR1=3)


@pytest.mark.parametrize("end", [Guest.end, lambda guest: None])
def test_next_vm_starts_from_reset(el2: El2, end: Callable[[Guest], None]) -> None:
    guest = make(el2, [*OPEN, *a64.mov(0, 0xFF), a64.msr(r.ICC_AP1R0_EL1, 0), *WAIT])
    wfi(guest, again=False)
    end(guest)
    wfi(make(el2, [*LOOK, *WAIT]), again=False)
    assert seen(el2) == RESET
