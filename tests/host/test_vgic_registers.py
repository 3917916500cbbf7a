# SPDX-License-Identifier: GPL-2.0-or-later
"""Registers of the distributor and the redistributors: what they say, and that any access is
harmless."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.gic_machine import GicMachine
from pkvm.arm64 import gicv3 as g
from pkvm.arm64.registers import mpidr_of_vcpu_id
from pkvm.host.vgic.gic import Gic
from pkvm.host.vgic.registers import Frame
from pkvm.uapi import kvm as uapi

SGI = g.SGI_FRAME


@pytest.fixture
def gic() -> Iterator[Gic]:
    """Of a VM with three vCPUs and 128 interrupts."""
    machine = GicMachine(*[lambda vcpu: iter(())] * 3)
    [vm] = machine.rig.kernel._host.vms
    assert vm.gic is not None
    yield vm.gic
    machine.close()


def test_distributor_identifies_itself(gic: Gic) -> None:
    frame = Frame(gic, None)
    assert frame.read(g.GICD_TYPER, 4) == 9 << 19 | 3
    assert frame.read(g.GICD_IIDR, 4) == 0x4B00_343B
    assert frame.read(g.PIDR2, 4) == 0x3B
    assert frame.read(g.GICD_TYPER2, 4) == frame.read(g.GICD_STATUSR, 4) == 0
    assert frame.read(g.GICD_CTLR, 4) == 0x50
    frame.write(g.GICD_CTLR, 4, 0xFFFF_FFFF)
    assert frame.read(g.GICD_CTLR, 4) == 0x53
    frame.write(g.GICD_TYPER, 4, 0)
    assert frame.read(g.GICD_TYPER, 4) == 9 << 19 | 3


def test_redistributors_identify_themselves(gic: Gic) -> None:
    for number, cpu in enumerate(gic.cpus):
        frame = Frame(gic, cpu)
        affinity = mpidr_of_vcpu_id(number) & 0xFF_FFFF
        typer = affinity << 32 | number << 8 | (number == 2) << 4
        assert frame.read(g.GICR_TYPER, 8) == typer
        assert frame.read(g.GICR_TYPER, 4) == typer & 0xFFFF_FFFF
        assert frame.read(g.GICR_TYPER + 4, 4) == affinity
        assert frame.read(g.GICR_IIDR, 4) == 0x4B00_043B
        assert frame.read(g.PIDR2, 4) == 0x3B
        frame.write(g.GICR_WAKER, 4, 2)
        assert frame.read(g.GICR_WAKER, 4) == 0


def test_reset_state(gic: Gic) -> None:
    cpu = Frame(gic, gic.cpus[1])
    assert cpu.read(SGI + g.ISENABLER, 4) == 0xFFFF
    assert cpu.read(SGI + g.IGROUPR, 4) == 0xFFFF_FFFF
    assert cpu.read(SGI + g.ICFGR, 4) == 0xAAAA_AAAA
    assert cpu.read(SGI + g.ICFGR + 4, 4) == 0
    distributor = Frame(gic, None)
    assert distributor.read(g.IGROUPR + 4, 4) == 0xFFFF_FFFF
    for register in (g.ISENABLER, g.ISPENDR, g.ISACTIVER, g.IPRIORITYR + 28):
        assert distributor.read(register + 4, 4) == 0
    assert distributor.read(g.ICFGR + 8, 4) == 0xAAAA_AAAA
    assert distributor.read(g.GICD_IROUTER + 8 * 40, 8) == 0


def test_the_distributor_has_no_private_interrupts(gic: Gic) -> None:
    frame = Frame(gic, None)
    for register in (g.IGROUPR, g.ISENABLER, g.ISPENDR, g.ISACTIVER, g.IPRIORITYR, g.ICFGR):
        frame.write(register, 4, 0xFFFF_FFFF)
        assert frame.read(register, 4) == 0
    frame.write(g.GICD_IROUTER + 8 * 31, 8, 1)
    assert frame.read(g.GICD_IROUTER + 8 * 31, 8) == 0


def test_interrupts_beyond_the_last_do_not_exist(gic: Gic) -> None:
    frame = Frame(gic, None)
    for offset in (g.ISENABLER + 16, g.ISPENDR + 16, g.IPRIORITYR + 128, g.ICFGR + 32):
        frame.write(offset, 4, 0xFFFF_FFFF)
        assert frame.read(offset, 4) == 0
    frame.write(g.GICD_IROUTER + 8 * 128, 8, 1)
    assert frame.read(g.GICD_IROUTER + 8 * 128, 8) == 0


def test_routing_keeps_three_affinities_and_no_mode(gic: Gic) -> None:
    frame = Frame(gic, None)
    at = g.GICD_IROUTER + 8 * 32
    frame.write(at, 8, (1 << 64) - 1)
    targets = [gic.spis[0].target]
    assert frame.read(at, 8) == 0xFF_FFFF
    frame.write(at, 4, 2)
    targets.append(gic.spis[0].target)
    assert targets == [None, gic.cpus[2]]
    frame.write(at + 4, 4, 1)
    assert (frame.read(at, 4), frame.read(at + 4, 4)) == (2, 0)


def test_priorities_have_five_bits_and_go_by_bytes_and_words(gic: Gic) -> None:
    frame = Frame(gic, None)
    frame.write(g.IPRIORITYR + 32, 4, 0xFF07_A0F8)
    assert frame.read(g.IPRIORITYR + 32, 4) == 0xF800_A0F8
    frame.write(g.IPRIORITYR + 33, 1, 0x1F)
    assert frame.read(g.IPRIORITYR + 32, 4) == 0xF800_18F8


@pytest.mark.parametrize("size", [1, 2, 8])
def test_other_sizes_have_no_register(gic: Gic, size: int) -> None:
    frame = Frame(gic, None)
    for offset in (g.GICD_CTLR, g.GICD_TYPER, g.ISENABLER + 8, g.ICFGR + 8):
        frame.write(offset, size, 0xFF)
        assert frame.read(offset, size) == 0
    assert frame.read(g.ISENABLER + 8, 4) == frame.read(g.GICD_CTLR, 4) & 3 == 0


def test_a_disabled_distributor_remembers(gic: Gic) -> None:
    frame = Frame(gic, None)
    frame.write(g.ISENABLER + 4, 4, 1)
    gic.inject(None, 32, True)
    cpu = gic.cpus[0]
    assert cpu.vcpu.irqs == []
    frame.write(g.GICD_CTLR, 4, 1)
    assert cpu.vcpu.irqs == []
    frame.write(g.GICD_CTLR, 4, 2)
    assert [irq.intid for irq in cpu.vcpu.irqs] == [32]
    frame.write(g.GICD_CTLR, 4, 0)
    assert cpu.vcpu.irqs == []


def test_sgis_go_to_whom_they_are_aimed(gic: Gic) -> None:
    Frame(gic, None).write(g.GICD_CTLR, 4, 3)
    sender, other, third = gic.cpus
    gic.send_sgi(sender, 5 << 24 | 0b110, True)
    assert [len(cpu.vcpu.irqs) for cpu in gic.cpus] == [0, 1, 1]
    gic.send_sgi(other, 1 << 40 | 6 << 24, True)
    assert [sorted(irq.intid for irq in cpu.vcpu.irqs) for cpu in gic.cpus] == [[6], [5], [5, 6]]
    for value in (1 << 16, 1 << 32, 1 << 44):
        gic.send_sgi(sender, value | 7 << 24 | 0xFFFF, True)
    assert sum(len(cpu.vcpu.irqs) for cpu in gic.cpus) == 4
    # Group 0 registers make no group 1 interrupts.
    gic.send_sgi(sender, 8 << 24 | 0b100, False)
    assert len(third.vcpu.irqs) == 2
    Frame(gic, third).write(SGI + g.IGROUPR, 4, 0)
    gic.send_sgi(sender, 8 << 24 | 0b100, False)
    assert len(third.vcpu.irqs) == 3


def test_ppis_keep_their_configuration(gic: Gic) -> None:
    frame = Frame(gic, gic.cpus[0])
    frame.write(SGI + g.ICFGR, 4, 0)
    frame.write(SGI + g.ICFGR + 4, 4, 0xFFFF_FFFF)
    assert frame.read(SGI + g.ICFGR, 4) == 0xAAAA_AAAA
    assert frame.read(SGI + g.ICFGR + 4, 4) == 0


INTERESTING = [
    *range(0, 0x20, 4), *range(0x80, 0x400, 0x20), *range(0x400, 0x500, 0x11),
    *range(0xC00, 0xE80, 0x1C), *range(0x6000, 0x6500, 0x24), 0x7FF8, 0x8000,
    *range(0xFFD0, 0x10000),
]  # fmt: skip
offsets = st.one_of(
    st.integers(0, g.REDISTRIBUTOR_BYTES - 1),
    st.sampled_from([frame + offset for frame in (0, SGI) for offset in INTERESTING]),
)
accesses = st.lists(
    st.tuples(
        st.sampled_from([None, 0, 1, 2]),
        offsets,
        st.sampled_from([1, 2, 4, 8]),
        st.one_of(st.none(), st.integers(0, (1 << 64) - 1), st.just((1 << 64) - 1)),
    ),
    max_size=40,
)


@given(accesses)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_access_is_harmless(
    gic: Gic, accesses: list[tuple[int | None, int, int, int | None]]
) -> None:
    for cpu, offset, size, value in accesses:
        frame = Frame(gic, None if cpu is None else gic.cpus[cpu])
        if value is not None:
            frame.write(offset, size, value & (1 << 8 * size) - 1)
        assert 0 <= frame.read(offset, size) < 1 << 8 * size
        assert isinstance(frame.has(offset), bool)
    listed = [irq for gic_cpu in gic.cpus for irq in gic_cpu.vcpu.irqs]
    assert len(listed) == len({id(irq) for irq in listed})
    for gic_cpu in gic.cpus:
        assert all(irq.home is gic_cpu for irq in gic_cpu.vcpu.irqs)
        assert gic_cpu.flush() == min(len(gic_cpu.vcpu.irqs), 4)


PER_IRQ = {g.IGROUPR: 1, g.IPRIORITYR: 8, g.ICFGR: 2, g.ISENABLER: 1, g.ISPENDR: 1, g.ISACTIVER: 1}
"""What a VMM saves, and bits for each interrupt."""


def saved(gic: Gic) -> dict[tuple[int | None, int], int]:
    words = {}
    for cpu, base, first, count in (
        (None, 0, 32, 96), (0, SGI, 0, 32), (1, SGI, 0, 32), (2, SGI, 0, 32),
    ):  # fmt: skip
        frame = Frame(gic, None if cpu is None else gic.cpus[cpu])
        for register, bits in PER_IRQ.items():
            start = base + register + first * bits // 8
            for offset in range(start, start + count * bits // 8, 4):
                assert frame.has(offset)
                words[cpu, offset] = frame.read(offset, 4, user=True)
    frame = Frame(gic, None)
    for offset in (g.GICD_CTLR, *range(g.GICD_IROUTER + 8 * 32, g.GICD_IROUTER + 8 * 128, 4)):
        assert frame.has(offset)
        words[None, offset] = frame.read(offset, 4, user=True)
    return words


def listed(gic: Gic) -> list[int]:
    return sorted(irq.intid for cpu in gic.cpus for irq in cpu.vcpu.irqs)


@given(accesses)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_a_vmm_saves_it_can_restore(
    gic: Gic, accesses: list[tuple[int | None, int, int, int | None]]
) -> None:
    for cpu, offset, size, value in accesses:
        frame = Frame(gic, None if cpu is None else gic.cpus[cpu])
        if value is not None:
            frame.write(offset, size, value & (1 << 8 * size) - 1)
    state = saved(gic)
    other = GicMachine(*[lambda vcpu: iter(())] * 3)
    [vm] = other.rig.kernel._host.vms
    assert vm.gic is not None
    for gic_cpu in vm.gic.cpus:
        Frame(vm.gic, gic_cpu).user_write(SGI + g.ICENABLER, 0xFFFF_FFFF)
    for (number, offset), value in state.items():
        Frame(vm.gic, None if number is None else vm.gic.cpus[number]).user_write(offset, value)
    assert saved(vm.gic) == state
    # Where an active interrupt was taken is not among what can be saved.
    assert listed(vm.gic) == listed(gic)
    other.close()


def test_a_vmm_sees_the_latch_and_not_the_level(gic: Gic) -> None:
    frame = Frame(gic, None)
    frame.write(g.ICFGR + 8, 4, 0)
    gic.inject(None, 33, True)
    assert frame.read(g.ISPENDR + 4, 4) == 2
    assert frame.read(g.ISPENDR + 4, 4, user=True) == 0
    frame.user_write(g.ISPENDR + 4, 4)
    assert frame.read(g.ISPENDR + 4, 4, user=True) == 4
    assert frame.read(g.ICPENDR + 4, 4, user=True) == 0
    frame.user_write(g.ICPENDR + 4, 4)
    assert frame.read(g.ISPENDR + 4, 4) == 6
    frame.user_write(g.ISPENDR + 4, 0)
    assert frame.read(g.ISPENDR + 4, 4) == 2


@pytest.mark.parametrize(
    ("value", "fits"),
    [(0x4B00_243B, True), (0x4B00_343B, True), (0x4B00_143B, False), (0x4C00_343B, False)],
)
def test_a_vmm_may_choose_a_revision_that_there_was(gic: Gic, value: int, fits: bool) -> None:
    frame = Frame(gic, None)
    if not fits:
        with pytest.raises(OSError, match="not one that KVM has had"):
            frame.user_write(g.GICD_IIDR, value)
        return
    frame.user_write(g.GICD_IIDR, value)
    assert frame.read(g.GICD_IIDR, 4) == value
    expected = 6 if value >> 12 & 0xF == 3 else 0
    assert Frame(gic, gic.cpus[0]).read(g.GICR_CTLR, 4) == expected


def test_last_is_said_once_in_each_run_of_redistributors() -> None:
    machine = GicMachine(*[lambda vcpu: iter(())] * 4, start=False)
    [vm] = machine.rig.kernel._host.vms
    assert vm.gic is not None
    region = uapi.VgicAddr.REDIST_REGION
    machine.attr(uapi.VgicGroup.ADDR, region, uapi.redist_region(0, 0x80A_0000, 2))
    machine.attr(uapi.VgicGroup.ADDR, region, uapi.redist_region(1, 0x90A_0000, 1))
    machine.attr(uapi.VgicGroup.ADDR, region, uapi.redist_region(2, 0x90C_0000, 5))
    lasts = [Frame(vm.gic, cpu).read(g.GICR_TYPER, 4) >> 4 & 1 for cpu in vm.gic.cpus]
    assert lasts == [0, 1, 0, 1]
    assert [cpu.frames for cpu in vm.gic.cpus] == [0x80A_0000, 0x80C_0000, 0x90A_0000, 0x90C_0000]
    machine.close()
