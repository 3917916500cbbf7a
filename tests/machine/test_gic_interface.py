# SPDX-License-Identifier: GPL-2.0-or-later
"""The virtual CPU interface against a plain model, and what the architecture says by example."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fakes.gic_model import Interrupt, Model, empty
from pkvm.arm64 import gic as g
from pkvm.arm64 import registers as r
from pkvm.machine.gic import VirtualCpuInterface

ALLOW_ALL = g.VMCR.encode(VENG0=1, VENG1=1, VPMR=0xF8)
SPURIOUS = 1023
CONDITIONS = ("U", "LRENP", "NP", "0E", "0D", "1E", "1D")


class Rig:
    """An interface, its lines, and a guest's register accesses."""

    def __init__(self, vmcr: int = ALLOW_ALL) -> None:
        self.lines = (False, False)
        self.maintenance = 0
        self.gic = VirtualCpuInterface(self._drive, self._maintain)
        self._registers = {entry.register: entry for entry in self.gic.guest_registers()}
        self.gic.load_context(vmcr, 0, 0)

    def _drive(self, irq: bool, fiq: bool) -> None:
        self.lines = (irq, fiq)

    def _maintain(self) -> None:
        self.maintenance += 1

    def read(self, register: r.SysReg) -> int:
        read = self._registers[register].read
        assert read is not None
        return read()

    def write(self, register: r.SysReg, value: int) -> None:
        write = self._registers[register].write
        assert write is not None
        write(value)

    def states(self) -> list[int]:
        return [lr >> 62 for lr in self.gic.lr]


def pending(intid: int, priority: int = 0x80, group: int = 1, *, eoi: bool = False) -> int:
    return Interrupt(True, False, False, group, priority, eoi, intid).word()


# The model

INTIDS = st.one_of(
    st.integers(0, 6), st.sampled_from([1019, 1020, 1021, 1022, 1023, 1024, 8191, 8192, 0xFFFF])
)
PRIORITIES = st.sampled_from([0, 8, 0x38, 0x40, 0x78, 0x80, 0x88, 0xC0, 0xF0, 0xF8])
INTERRUPTS = st.builds(
    Interrupt,
    pending=st.booleans(),
    active=st.booleans(),
    hw=st.booleans(),
    group=st.integers(0, 1),
    priority=PRIORITIES,
    eoi=st.booleans(),
    intid=INTIDS,
)
WORDS = st.one_of(st.integers(0, (1 << 64) - 1), st.integers(0, 0xFF))


class Comparison(RuleBasedStateMachine):
    """Any accesses in any order: values read, lines, and all that EL2 sees are the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(0)
        self.model = Model()

    @initialize(mask=st.sampled_from([0xFF, 0xF0, 0x80, 0]), enable=st.integers(0, 3))
    def open(self, mask: int, enable: int) -> None:
        """Most guests let interrupts through."""
        self.pmr(mask)
        for group in (0, 1):
            self.igrpen(group, enable >> group)

    @rule(
        lrs=st.lists(INTERRUPTS, max_size=4),
        wants=st.sets(st.sampled_from(CONDITIONS)),
    )
    def load(self, lrs: list[Interrupt], wants: set[str]) -> None:
        words = [lr.word() for lr in lrs]
        enables = sum(2 << CONDITIONS.index(name) for name in wants)
        self.rig.maintenance = 0
        self.rig.gic.load(words, enables)
        self.model.lrs = [Interrupt.of(word) for word in words]
        self.model.lrs += [empty() for _ in range(4 - len(words))]
        self.model.wants = wants
        self.model.eoicount = 0
        assert bool(self.rig.maintenance) == bool(self.model.misr())
        assert self.rig.gic.changed == bool(self.model.misr())

    @rule()
    def fetch(self) -> None:
        self.rig.gic.fetched()
        self.model.eoicount = 0

    @rule()
    def move_to_another_cpu(self) -> None:
        """EL2 keeps a vCPU's state in three words, list registers aside."""
        old, self.rig = self.rig.gic, Rig(0)
        self.rig.gic.load_context(old.vmcr, old.ap0r, old.ap1r)
        self.model.lrs = [empty() for _ in range(4)]
        self.model.wants = set()
        self.model.eoicount = 0

    @rule(group=st.integers(0, 1))
    def iar(self, group: int) -> None:
        register = (r.ICC_IAR0_EL1, r.ICC_IAR1_EL1)[group]
        assert self.rig.read(register) == self.model.iar(group)

    @rule(group=st.integers(0, 1), intid=INTIDS, dirt=st.integers(0, 1 << 40))
    def eoir(self, group: int, intid: int, dirt: int) -> None:
        self._ending((r.ICC_EOIR0_EL1, r.ICC_EOIR1_EL1)[group], intid | dirt << 24)
        self.model.eoir(group, intid | dirt << 24)
        self._told()

    @rule(group=st.integers(0, 1))
    def eoir_of_what_is_active(self, group: int) -> None:
        active = [lr.intid for lr in self.model.lrs if lr.active and lr.group == group]
        if active:
            self.eoir(group, active[0], 0)

    @rule(intid=INTIDS)
    def dir(self, intid: int) -> None:
        self._ending(r.ICC_DIR_EL1, intid)
        self.model.dir(intid)
        self._told()

    def _ending(self, register: r.SysReg, value: int) -> None:
        self.rig.maintenance = 0
        before = self.rig.gic.lr[:], self.rig.gic.eoicount, self.rig.gic.ap0r, self.rig.gic.ap1r
        self.rig.write(register, value)
        after = self.rig.gic.lr[:], self.rig.gic.eoicount, self.rig.gic.ap0r, self.rig.gic.ap1r
        self.changed = before != after

    def _told(self) -> None:
        """What changed is asked for by EL2's flag, and announced if EL2 wants to know."""
        if self.changed:
            assert self.rig.gic.changed
            assert bool(self.rig.maintenance) == bool(self.model.misr())

    @rule(value=WORDS)
    def pmr(self, value: int) -> None:
        self.rig.write(r.ICC_PMR_EL1, value)
        self.model.mask = value & 0xF8
        assert self.rig.gic.changed

    @rule(group=st.integers(0, 1), value=WORDS)
    def igrpen(self, group: int, value: int) -> None:
        self.rig.maintenance = 0
        self.rig.write((r.ICC_IGRPEN0_EL1, r.ICC_IGRPEN1_EL1)[group], value)
        self.model.enable[group] = bool(value & 1)
        assert bool(self.rig.maintenance) == bool(self.model.misr())

    @rule(value=WORDS)
    def bpr0(self, value: int) -> None:
        self.rig.write(r.ICC_BPR0_EL1, value)
        self.model.set_bpr0(value)

    @rule(value=WORDS)
    def bpr1(self, value: int) -> None:
        self.rig.write(r.ICC_BPR1_EL1, value)
        self.model.set_bpr1(value)

    @rule(value=WORDS)
    def ctlr(self, value: int) -> None:
        self.rig.write(r.ICC_CTLR_EL1, value)
        self.model.set_ctlr(value)

    @rule(group=st.integers(0, 1), value=WORDS)
    def ap(self, group: int, value: int) -> None:
        self.rig.write((r.ICC_AP0R0_EL1, r.ICC_AP1R0_EL1)[group], value)
        self.model.set_ap(group, value & 0xFFFF_FFFF)

    @invariant()
    def alike(self) -> None:
        rig, gic, model = self.rig, self.rig.gic, self.model
        assert rig.lines == model.lines()
        assert gic.lr == [lr.word() for lr in model.lrs]
        assert gic.vmcr == model.vmcr()
        assert (gic.ap0r, gic.ap1r) == (model.ap(0), model.ap(1))
        assert gic.misr == model.misr()
        assert gic.eisr == sum(bit << n for n, bit in enumerate(model.eisr()))
        assert gic.elrsr == sum(bit << n for n, bit in enumerate(model.elrsr()))
        assert gic.eoicount == model.eoicount
        assert rig.read(r.ICC_RPR_EL1) == model.running_priority()
        assert rig.read(r.ICC_HPPIR0_EL1) == model.hppir(0)
        assert rig.read(r.ICC_HPPIR1_EL1) == model.hppir(1)
        assert rig.read(r.ICC_BPR0_EL1) == model.binary_point[0]
        assert rig.read(r.ICC_BPR1_EL1) == model.bpr1()
        assert rig.read(r.ICC_CTLR_EL1) == model.ctlr()
        assert rig.read(r.ICC_PMR_EL1) == model.mask
        assert rig.read(r.ICC_AP1R0_EL1) == model.ap(1)


TestComparison = Comparison.TestCase
TestComparison.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


# By example


def test_reset_state_lets_nothing_through() -> None:
    rig = Rig(0)
    rig.gic.load([pending(40, 0), pending(41, 0, 0)], 0)
    assert rig.lines == (False, False)
    assert rig.read(r.ICC_IAR1_EL1) == SPURIOUS
    assert rig.read(r.ICC_RPR_EL1) == 0xFF
    assert (rig.read(r.ICC_BPR0_EL1), rig.read(r.ICC_BPR1_EL1)) == (2, 3)
    assert rig.gic.vmcr == g.VMCR.encode(VFIQEn=1, VBPR0=2, VBPR1=3)


def test_the_life_of_an_interrupt() -> None:
    rig = Rig()
    rig.gic.load([pending(40)], 0)
    assert rig.lines == (True, False)
    assert rig.read(r.ICC_HPPIR1_EL1) == 40
    assert rig.read(r.ICC_IAR1_EL1) == 40
    assert (rig.lines, rig.states()[0], rig.read(r.ICC_RPR_EL1)) == ((False, False), 2, 0x80)
    assert rig.read(r.ICC_IAR1_EL1) == SPURIOUS
    rig.write(r.ICC_EOIR1_EL1, 40)
    assert (rig.states()[0], rig.read(r.ICC_RPR_EL1)) == (0, 0xFF)
    assert rig.gic.elrsr == 0xF


def test_group_0_is_virtual_fiq() -> None:
    rig = Rig()
    rig.gic.load([pending(40, 0x80, 1), pending(41, 0x40, 0)], 0)
    assert rig.lines == (False, True)
    assert rig.read(r.ICC_IAR1_EL1) == SPURIOUS
    assert rig.read(r.ICC_IAR0_EL1) == 41
    rig.write(r.ICC_EOIR0_EL1, 41)
    assert rig.lines == (True, False)


def test_preemption_by_group_priority() -> None:
    rig = Rig()
    rig.write(r.ICC_BPR1_EL1, 7)  # only bit 7 decides
    rig.gic.load([pending(40, 0xC0)], 0)
    assert rig.read(r.ICC_IAR1_EL1) == 40
    nested = [rig.gic.lr[0], pending(41, 0x90)]
    rig.gic.load(nested, 0)
    assert rig.lines == (False, False)
    rig.gic.load([nested[0], pending(42, 0x78)], 0)
    assert rig.lines == (True, False)
    assert rig.read(r.ICC_IAR1_EL1) == 42
    assert rig.gic.ap1r == 1 << 0 | 1 << 16
    rig.write(r.ICC_EOIR1_EL1, 42)
    assert (rig.read(r.ICC_RPR_EL1), rig.states()[:2]) == (0x80, [2, 0])


def test_eoi_mode_1_splits_drop_and_deactivation() -> None:
    rig = Rig()
    rig.write(r.ICC_CTLR_EL1, 2)
    rig.gic.load([pending(40), pending(41)], 0)
    assert rig.read(r.ICC_IAR1_EL1) == 40
    rig.write(r.ICC_EOIR1_EL1, 40)
    assert rig.states()[:2] == [2, 1]
    assert rig.lines == (True, False)
    rig.write(r.ICC_DIR_EL1, 40)
    assert rig.states()[:2] == [0, 1]


def test_dir_without_split_does_nothing() -> None:
    rig = Rig()
    rig.gic.load([pending(40)], 0)
    rig.read(r.ICC_IAR1_EL1)
    rig.gic.fetched()
    rig.write(r.ICC_DIR_EL1, 40)
    rig.write(r.ICC_DIR_EL1, 77)
    assert (rig.states()[0], rig.gic.eoicount, rig.gic.changed) == (2, 0, False)


def test_pending_and_active_becomes_pending() -> None:
    rig = Rig()
    rig.gic.load([pending(40) | g.LR_ACTIVE], 0)
    assert rig.lines == (False, False)
    rig.write(r.ICC_AP1R0_EL1, 1 << 16)
    rig.write(r.ICC_EOIR1_EL1, 40)
    assert rig.states()[0] == 1
    assert rig.lines == (True, False)


def test_lpi_is_never_active() -> None:
    rig = Rig()
    rig.gic.load([pending(8200)], 0)
    assert rig.read(r.ICC_IAR1_EL1) == 8200
    assert (rig.states()[0], rig.read(r.ICC_RPR_EL1)) == (0, 0x80)
    rig.write(r.ICC_EOIR1_EL1, 8200)
    assert (rig.read(r.ICC_RPR_EL1), rig.gic.eoicount) == (0xFF, 0)


def test_the_mask_lets_higher_priorities_through_only() -> None:
    rig = Rig()
    rig.gic.load([pending(40, 0x80)], 0)
    for mask, level in ((0x80, False), (0x87, False), (0x88, True), (0x78, False)):
        rig.write(r.ICC_PMR_EL1, mask)
        assert rig.lines == (level, False)


def test_end_of_what_no_list_register_holds_counts() -> None:
    rig = Rig()
    rig.gic.load([], g.HCR_LRENPIE)
    rig.write(r.ICC_AP1R0_EL1, 0b11)
    assert rig.maintenance == 0
    rig.write(r.ICC_EOIR1_EL1, 50)
    rig.write(r.ICC_EOIR1_EL1, 51)
    assert (rig.gic.eoicount, rig.maintenance) == (2, 2)
    assert rig.gic.misr == g.MISR_LRENP
    assert rig.gic.hcr == g.HCR_EN | g.HCR_LRENPIE | 2 << 27
    rig.write(r.ICC_EOIR1_EL1, 52)  # nothing is active any more
    assert rig.gic.eoicount == 2
    rig.gic.fetched()
    assert rig.gic.misr == 0


@pytest.mark.parametrize(
    ("enable", "lrs", "reason"),
    [
        (g.HCR_UIE, [pending(40)], g.MISR_U),
        (g.HCR_UIE, [pending(40), pending(41)], 0),
        (g.HCR_NPIE, [pending(40)], 0),
        (g.HCR_NPIE, [pending(40) ^ g.LR_STATE], g.MISR_NP),
        (g.HCR_VGRP1EIE, [], g.MISR_VGRP1E),
        (g.HCR_VGRP0DIE, [], 0),
    ],
)
def test_maintenance_at_entry(enable: int, lrs: list[int], reason: int) -> None:
    rig = Rig()
    rig.gic.load(lrs, enable)
    assert (rig.gic.misr, rig.maintenance) == (reason, int(reason != 0))


def test_maintenance_when_an_interrupt_ends() -> None:
    rig = Rig()
    rig.gic.load([pending(40, eoi=True), pending(41, 0x90)], 0)
    rig.read(r.ICC_IAR1_EL1)
    assert rig.maintenance == 0
    rig.write(r.ICC_EOIR1_EL1, 40)
    assert (rig.maintenance, rig.gic.misr, rig.gic.eisr, rig.gic.elrsr) == (1, 1, 1, 0b1100)


def test_nothing_is_enabled_before_el2_programs_it() -> None:
    rig = Rig()
    gic = VirtualCpuInterface(rig._drive, rig._maintain)
    assert gic.hcr == 0
    gic.lr[0] = pending(40)
    assert not any(entry.read() == 40 for entry in gic.guest_registers() if entry.read)


@given(value=st.integers(0, (1 << 32) - 1))
def test_vmcr_keeps_what_it_has_and_nothing_else(value: int) -> None:
    rig = Rig(value)
    known = sum(field.mask for field in g.VMCR.fields.values()) & ~(7 << 24)
    clamp = g.VMCR.encode(VBPR0=7, VBPR1=7)
    assert rig.gic.vmcr & ~clamp == (value | 1 << 3) & known & ~clamp
    assert g.VMCR["VBPR0"].get(rig.gic.vmcr) == max(2, value >> 21 & 7)
    again = Rig(rig.gic.vmcr)
    assert again.gic.vmcr == rig.gic.vmcr
