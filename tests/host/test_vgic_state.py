# SPDX-License-Identifier: GPL-2.0-or-later
"""The interrupt controller against a plain model: whatever guests, VMM and devices do, the list
registers hold the interrupts that they should, no other, and none is lost."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from fakes.gic_machine import GicMachine
from pkvm.arm64 import gicv3 as g
from pkvm.arm64.gic import (
    HCR_EOICOUNT_SHIFT,
    HCR_LRENPIE,
    HCR_NPIE,
    LR,
    LR_ACTIVE,
    LR_EOI,
    LR_PENDING,
    LR_STATE,
)
from pkvm.host.vgic.cpu import GicCpu
from pkvm.host.vgic.gic import Gic
from pkvm.host.vgic.registers import Frame
from pkvm.hyp.abi import HostVcpu

CPUS = 2
LRS = 4
PRIVATE = (0, 1, 15, 16, 31)
SPIS = (32, 33, 34, 63, 64, 127)
KEYS = [(cpu, intid) for cpu in range(CPUS) for intid in PRIVATE] + [(0, spi) for spi in SPIS]
keys = st.sampled_from(KEYS)
cpus = st.integers(0, CPUS - 1)
flags = st.booleans()


@dataclass
class Model:
    """What the architecture says of one interrupt."""

    intid: int
    target: int | None
    enabled: bool = False
    edge: bool = False
    group: int = 1
    priority: int = 0
    latch: bool = False
    level: bool = False
    active: bool = False
    active_on: int | None = None

    @property
    def pending(self) -> bool:
        return self.latch or (self.level and not self.edge)

    def settle(self) -> None:
        if not self.active:
            self.active_on = None
        elif self.active_on is None:
            self.active_on = self.target


class VgicAgainstModel(RuleBasedStateMachine):
    machine: GicMachine

    @initialize()
    def make(self) -> None:
        self.machine = GicMachine(*[lambda vcpu: iter(())] * CPUS, protected=False)
        [vm] = self.machine.rig.kernel._host.vms
        assert vm.gic is not None
        self.gic: Gic = vm.gic
        self.models = {
            (cpu, intid): Model(
                intid,
                0 if intid >= 32 else cpu,
                enabled=intid < 16,
                edge=intid < 16 or intid >= 32,
            )
            for cpu, intid in KEYS
        }
        self.groups = [False, False]
        # Most sequences would never get there otherwise.
        self.enable_groups(True, True)
        for key in KEYS[::2]:
            self.enable(key, True)

    def teardown(self) -> None:
        if hasattr(self, "machine"):
            self.machine.close()

    # What guests and the VMM do

    def write(self, key: tuple[int, int], register: int, width: int, value: int) -> None:
        """Write the field of one interrupt with the smallest access that has it."""
        cpu, intid = key
        size = 1 if width == 8 else 4
        bit = intid * width
        offset = register + bit // (8 * size) * size
        value <<= bit % (8 * size)
        if intid < 32:
            Frame(self.gic, self.gic.cpus[cpu]).write(g.SGI_FRAME + offset, size, value)
        else:
            Frame(self.gic, None).write(offset, size, value)
        self.models[key].settle()

    @rule(key=keys, on=flags)
    def enable(self, key: tuple[int, int], on: bool) -> None:
        self.models[key].enabled = on
        self.write(key, g.ISENABLER if on else g.ICENABLER, 1, 1)

    @rule(key=keys, on=flags)
    def pend(self, key: tuple[int, int], on: bool) -> None:
        self.models[key].latch = on
        self.write(key, g.ISPENDR if on else g.ICPENDR, 1, 1)

    @rule(key=keys, on=flags)
    def activate(self, key: tuple[int, int], on: bool) -> None:
        model = self.models[key]
        if on and not model.active:
            held = model.pending and model.enabled and self.groups[model.group]
            model.active_on = model.target if held else None
        model.active = on
        self.write(key, g.ISACTIVER if on else g.ICACTIVER, 1, 1)

    @rule(key=keys, priority=st.integers(0, 255))
    def prioritise(self, key: tuple[int, int], priority: int) -> None:
        self.models[key].priority = priority & 0xF8
        self.write(key, g.IPRIORITYR, 8, priority)

    @rule(key=keys, edge=flags)
    def configure(self, key: tuple[int, int], edge: bool) -> None:
        if key[1] >= 32:
            self.models[key].edge = edge
        cpu, intid = key
        frame = Frame(self.gic, self.gic.cpus[cpu] if intid < 32 else None)
        offset = g.ICFGR + intid // 16 * 4 + (g.SGI_FRAME if intid < 32 else 0)
        word = frame.read(offset, 4) & ~(3 << intid % 16 * 2)
        frame.write(offset, 4, word | edge << intid % 16 * 2 + 1)
        self.models[key].settle()

    @rule(spi=st.sampled_from(SPIS), where=st.sampled_from([0, 1, 2, 0x101]))
    def route(self, spi: int, where: int) -> None:
        model = self.models[0, spi]
        model.target = where if where < CPUS else None
        Frame(self.gic, None).write(g.GICD_IROUTER + 8 * spi, 8, where)
        model.settle()

    @rule(group0=flags, group1=flags)
    def enable_groups(self, group0: bool, group1: bool) -> None:
        self.groups = [group0, group1]
        Frame(self.gic, None).write(g.GICD_CTLR, 4, group0 | group1 << 1)

    @rule(key=keys, group=flags)
    def regroup(self, key: tuple[int, int], group: bool) -> None:
        cpu, intid = key
        self.models[key].group = int(group)
        frame = Frame(self.gic, self.gic.cpus[cpu] if intid < 32 else None)
        offset = g.IGROUPR + intid // 32 * 4 + (g.SGI_FRAME if intid < 32 else 0)
        word = frame.read(offset, 4) & ~(1 << intid % 32)
        frame.write(offset, 4, word | group << intid % 32)

    @rule(level=flags, some=st.lists(keys, max_size=6, unique=True))
    def drive_some(self, level: bool, some: list[tuple[int, int]]) -> None:
        for key in some:
            self.drive(key, level)

    @rule(key=keys, level=flags)
    def drive(self, key: tuple[int, int], level: bool) -> None:
        model = self.models[key]
        cpu, intid = key
        if not model.edge:
            model.level = level
        elif level:
            model.latch = True
        self.gic.inject(self.gic.cpus[cpu], intid, level)
        model.settle()

    @rule(sender=cpus, mask=st.integers(0, 7), irm=flags, sgi=st.sampled_from([0, 1, 15]), g1=flags)
    def send(self, sender: int, mask: int, irm: bool, sgi: int, g1: bool) -> None:
        for cpu in range(CPUS):
            if cpu != sender if irm else mask >> cpu & 1:
                model = self.models[cpu, sgi]
                if g1 or not model.group:
                    model.latch = True
        self.gic.send_sgi(self.gic.cpus[sender], irm << 40 | sgi << 24 | mask, g1)

    # What the CPU interface does

    def expected(self, cpu: int) -> list[Model]:
        found = []
        for model in self.models.values():
            wanted = model.pending and model.enabled and self.groups[model.group]
            if model.active_on == cpu if model.active else wanted and model.target == cpu:
                found.append(model)
        return found

    def state(self, model: Model) -> int:
        may_pend = model.pending and model.enabled and self.groups[model.group]
        state = LR_ACTIVE if model.active else 0
        if may_pend and (model.edge or not model.active):
            state |= LR_PENDING
        return state

    def model_of(self, cpu: int, intid: int) -> Model:
        return self.models[cpu if intid < 32 else 0, intid]

    @rule(cpu=cpus, acts=st.lists(st.sampled_from(["take", "take", "end", "outside"]), max_size=6))
    def run(self, cpu: int, acts: list[str]) -> None:
        """Enter the guest: the list registers are right; the guest takes and ends interrupts."""
        gic_cpu = self.gic.cpus[cpu]
        number = gic_cpu.flush() if gic_cpu.vcpu.irqs else 0
        at = gic_cpu.vcpu.page + HostVcpu.VGIC_LR
        bus = self.machine.rig.bus
        words = [bus.read_u64(at + 8 * n) for n in range(number)]
        self.check(cpu, gic_cpu, words)
        for act in acts:
            if act == "take":
                self.take(cpu, words)
            elif act == "end":
                if self.end(cpu, words):
                    break
            elif number and self.end_outside(cpu, gic_cpu, words):
                break
        for n, word in enumerate(words):
            bus.write_u64(at + 8 * n, word)
        if number:
            gic_cpu.fold(number)
        for model in self.models.values():
            model.settle()

    def check(self, cpu: int, gic_cpu: GicCpu, words: list[int]) -> None:
        expected = {model.intid: model for model in self.expected(cpu)}
        shown = {LR["vINTID"].get(word): word for word in words}
        assert len(shown) == len(words) == min(len(expected), LRS)
        for intid, word in shown.items():
            model = expected[intid]
            assert word & LR_STATE == self.state(model)
            assert LR["Priority"].get(word) == model.priority
            assert LR["Group"].get(word) == model.group
            assert bool(word & LR_EOI) == (model.level and not model.edge)
        if not words:
            return
        missing = [model for intid, model in expected.items() if intid not in shown]
        control = gic_cpu.vcpu.word(HostVcpu.VGIC_HCR)
        assert bool(control & HCR_LRENPIE) == any(model.active for model in missing)
        assert bool(control & HCR_NPIE) == any(not model.active for model in missing)
        waiting = [model for model in missing if not model.active]
        if waiting:
            best = min(model.priority for model in waiting)
            there = [expected[intid].priority for intid in shown if not expected[intid].active]
            assert min(there) <= best

    def take(self, cpu: int, words: list[int]) -> None:
        pending = [n for n, word in enumerate(words) if word & LR_STATE == LR_PENDING]
        if pending:
            n = min(pending, key=lambda n: LR["Priority"].get(words[n]))
            words[n] ^= LR_STATE
            model = self.model_of(cpu, LR["vINTID"].get(words[n]))
            model.latch = False
            model.active, model.active_on = True, cpu

    def end(self, cpu: int, words: list[int]) -> bool:
        """End the most urgent active one; True for a maintenance interrupt."""
        active = [n for n, word in enumerate(words) if word & LR_ACTIVE]
        if not active:
            return False
        n = min(active, key=lambda n: LR["Priority"].get(words[n]))
        words[n] &= ~LR_ACTIVE
        model = self.model_of(cpu, LR["vINTID"].get(words[n]))
        model.active = False
        return bool(words[n] & LR_EOI) and not words[n] & LR_STATE

    def end_outside(self, cpu: int, gic_cpu: GicCpu, words: list[int]) -> bool:
        shown = {LR["vINTID"].get(word) for word in words}
        others = [
            model
            for model in self.models.values()
            if model.active and model.active_on == cpu and model.intid not in shown
        ]
        if not others or any(word & LR_ACTIVE for word in words):
            return False
        control = gic_cpu.vcpu.word(HostVcpu.VGIC_HCR)
        gic_cpu.vcpu.set_word(HostVcpu.VGIC_HCR, control | 1 << HCR_EOICOUNT_SHIFT)
        min(others, key=lambda model: (model.priority, model.intid)).active = False
        return True

    # What the registers say

    @precondition(lambda self: hasattr(self, "models"))
    @invariant()
    def registers_say_it(self) -> None:
        for (cpu, intid), model in self.models.items():
            frame = Frame(self.gic, self.gic.cpus[cpu] if intid < 32 else None)
            base = g.SGI_FRAME if intid < 32 else 0
            word = intid // 32 * 4

            def bit(
                register: int, frame: Frame = frame, at: int = base + word, n: int = intid % 32
            ) -> bool:
                return bool(frame.read(register + at, 4) >> n & 1)

            assert bit(g.ISENABLER) == bit(g.ICENABLER) == model.enabled
            assert bit(g.ISPENDR) == bit(g.ICPENDR) == model.pending
            assert bit(g.ISACTIVER) == bit(g.ICACTIVER) == model.active
            assert bit(g.IGROUPR) == bool(model.group)
            assert frame.read(base + g.IPRIORITYR + intid, 1) == model.priority


TestVgicAgainstModel = VgicAgainstModel.TestCase
TestVgicAgainstModel.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


class Cpu:
    """vCPU 0 of a VM whose interrupts are all enabled, edge-triggered and more urgent the lower
    their number; what the guest does to its list registers."""

    def __init__(self) -> None:
        self.machine = GicMachine(lambda vcpu: iter(()), protected=False)
        [vm] = self.machine.rig.kernel._host.vms
        assert vm.gic is not None
        self.gic = vm.gic
        self.cpu = self.gic.cpus[0]
        self.frame = Frame(self.gic, None)
        self.frame.write(g.GICD_CTLR, 4, 3)
        for word in range(1, 4):
            self.frame.write(g.ICFGR + 8 * word, 4, 0xAAAA_AAAA)
            self.frame.write(g.ICFGR + 8 * word + 4, 4, 0xAAAA_AAAA)
            self.frame.write(g.ISENABLER + 4 * word, 4, 0xFFFF_FFFF)
        for intid in range(32, 64):
            self.frame.write(g.IPRIORITYR + intid, 1, (intid - 32) * 8)

    @property
    def page(self) -> int:
        return self.cpu.vcpu.page

    def inject(self, *intids: int) -> None:
        for intid in intids:
            self.gic.inject(None, intid, True)

    def enter(self) -> list[int]:
        number = self.cpu.flush() if self.cpu.vcpu.irqs else 0
        at = self.page + HostVcpu.VGIC_LR
        return [self.machine.rig.bus.read_u64(at + 8 * n) for n in range(number)]

    def leave(self, words: list[int], eoicount: int = 0) -> None:
        for n, word in enumerate(words):
            self.machine.rig.bus.write_u64(self.page + HostVcpu.VGIC_LR + 8 * n, word)
        control = self.cpu.vcpu.word(HostVcpu.VGIC_HCR) | eoicount << HCR_EOICOUNT_SHIFT
        self.cpu.vcpu.set_word(HostVcpu.VGIC_HCR, control)
        self.cpu.fold(len(words))

    def active(self) -> list[int]:
        return [irq.intid for irq in self.gic.spis if irq.active]


def test_the_end_of_interrupts_that_are_in_no_list_register() -> None:
    guest = Cpu()
    for intid in range(40, 34, -1):
        # Each preempts the one before.
        guest.inject(intid)
        words = guest.enter()
        first = next(n for n, word in enumerate(words) if word & LR_STATE == LR_PENDING)
        words[first] ^= LR_STATE
        guest.leave(words)
    assert guest.active() == list(range(35, 41))
    guest.inject(34)
    assert [LR["vINTID"].get(word) for word in guest.enter()] == [34, 35, 36, 37]
    # It took 34, and ended 34 to 37 and then two that only EL2's counter knows of.
    guest.leave([0] * 4, eoicount=2)
    assert guest.active() == [40]
    # The counter counts from 0 again.
    [word] = guest.enter()
    assert LR["vINTID"].get(word) == 40
    assert guest.cpu.vcpu.word(HostVcpu.VGIC_HCR) == 0
    guest.machine.close()


def test_the_counter_starts_again_at_each_entry_while_there_are_too_many() -> None:
    guest = Cpu()
    guest.inject(*range(40, 50))
    for eoicount in (0, 3):
        words = guest.enter()
        assert guest.cpu.vcpu.word(HostVcpu.VGIC_HCR) == HCR_NPIE
        guest.leave(words, eoicount)
    guest.enter()
    assert guest.cpu.vcpu.word(HostVcpu.VGIC_HCR) == HCR_NPIE
    guest.machine.close()


def test_an_active_interrupt_is_not_pending_while_disabled() -> None:
    guest = Cpu()
    guest.inject(40)
    [word] = guest.enter()
    guest.leave([word ^ LR_STATE])
    guest.inject(40)
    assert guest.enter()[0] & LR_STATE == LR_STATE
    guest.leave(guest.enter())
    guest.frame.write(g.ICENABLER + 4, 4, 1 << 8)
    assert guest.enter()[0] & LR_STATE == LR_ACTIVE
    guest.leave([0])
    assert guest.enter() == []
    guest.frame.write(g.ISENABLER + 4, 4, 1 << 8)
    assert guest.enter()[0] & LR_STATE == LR_PENDING
    guest.machine.close()


def test_an_unchanged_list_register_is_not_written_again() -> None:
    guest = Cpu()
    guest.inject(40)
    guest.leave(guest.enter())
    guest.machine.rig.bus.write_u64(guest.page + HostVcpu.VGIC_LR, 0x1234)
    assert guest.enter() == [0x1234]
    guest.machine.close()


def test_nothing_is_lost_when_everything_comes_at_once() -> None:
    """Far more interrupts than list registers, all taken, each once, the most urgent first."""
    guest = Cpu()
    for intid in range(64, 128):
        guest.frame.write(g.IPRIORITYR + intid, 1, intid * 8)
    guest.inject(*range(32, 128))
    taken: list[int] = []
    while guest.cpu.vcpu.irqs:
        words = guest.enter()
        # Until none is pending there: then NP asks for more.
        for word in sorted(words, key=LR["Priority"].get):
            assert word & LR_STATE == LR_PENDING
            taken.append(LR["vINTID"].get(word))
        guest.leave([0] * len(words))
    assert sorted(taken) == list(range(32, 128))
    assert [intid * 8 & 0xF8 for intid in taken] == sorted(intid * 8 & 0xF8 for intid in taken)
    guest.machine.close()
