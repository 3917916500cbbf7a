# SPDX-License-Identifier: GPL-2.0-or-later
"""The PSCI relay: however a host CPU comes up, it does so behind the host's stage-2."""

from __future__ import annotations

import pytest

from fakes.doors import Doors
from fakes.el2_rig import PAGE, Guest
from pkvm.arm64 import psci
from pkvm.arm64.psci import Affinity, Function
from pkvm.arm64.registers import HOST_HCR, SCTLR_EL1_MMU_OFF
from pkvm.check.mutants import weakened
from pkvm.events import CpuPower
from pkvm.machine.firmware_psci import POWER_DOWN
from pkvm.machine.stage2 import Stage2Fault

KERNEL = 0x8040_0000
SECRET = b"a guest's secret"


def test_a_cpu_comes_up_in_el2_first_and_then_where_the_host_wants() -> None:
    doors = Doors()
    assert doors.smc(Function.CPU_ON_64, 1, KERNEL, 0x77, 9) == (0, 0, 0, 0, 9, *(0,) * 13)
    cpu = doors.machine.host_cpus.cpus[1]
    assert (cpu.power, cpu.el, cpu.pc, cpu.x0) == (Affinity.ON, 1, KERNEL, 0x77)
    assert (cpu.sctlr_el1, cpu.hcr_el2) == (SCTLR_EL1_MMU_OFF, HOST_HCR)
    assert cpu.bus.context == doors.bus.context
    doors.sound()
    entry = doors.seen[-1][2]
    first, nbytes = doors.hyp.mem.carveout
    assert entry != KERNEL
    assert first <= entry < first + nbytes, "the entry is EL2's"
    cpu.bus.write(KERNEL, b"the host's own")
    assert doors.bus.read(KERNEL, 14) == b"the host's own"
    with pytest.raises(Stage2Fault):
        cpu.bus.read(first, 8)


def test_every_cpu_is_stopped_at_a_guests_page() -> None:
    doors = Doors()
    for index in (1, 2, 3):
        assert doors.smc(Function.CPU_ON_64, index, KERNEL, 0)[0] == 0
    cpus = doors.machine.host_cpus.cpus
    guest_page = doors.pages(8)
    for cpu in cpus:
        cpu.bus.read(guest_page, 8 * PAGE)
    guest = Guest(doors)
    for cpu in cpus:
        for pa in (guest.ram, guest.slot, guest.area):
            with pytest.raises(Stage2Fault):
                cpu.bus.read(pa, 8)
    doors.sound()
    guest.end()
    for cpu in cpus:
        assert cpu.bus.read(guest.ram, 8) == bytes(8)
    doors.sound()


def test_a_tlb_entry_of_any_cpu_goes_with_the_page() -> None:
    doors = Doors()
    doors.smc(Function.CPU_ON_64, 1, KERNEL, 0)
    page = doors.pages(2)
    other = doors.machine.host_cpus.cpus[1].bus
    other.write(page, SECRET)
    assert other.holds(page)
    doors.hyp.mem.host_donate_hyp(page >> 12, 1)
    assert not other.holds(page)
    with pytest.raises(Stage2Fault):
        other.read(page, 8)


def test_only_cpus_that_are_known() -> None:
    doors = Doors()
    for mpidr in (4, 1 << 40, 1 << 31 | 1, 0x100, (1 << 64) - 1):
        doors.seen.clear()
        assert doors.smc(Function.CPU_ON_64, mpidr, KERNEL, 0)[0] == psci.INVALID_PARAMS
        assert doors.seen == []
        assert doors.refusals()[-1].check == "known_cpu"
    assert doors.smc(Function.CPU_ON_64, 0, KERNEL, 0)[0] == psci.ALREADY_ON
    doors.sound()


def test_a_cpu_is_started_once() -> None:
    doors = Doors()
    doors.machine.host_cpus.slow = True
    assert doors.smc(Function.CPU_ON_64, 2, KERNEL, 1)[0] == 0
    assert doors.smc(Function.CPU_ON_64, 2, KERNEL + PAGE, 2)[0] == psci.ALREADY_ON
    assert doors.refusals()[-1].check == "single_start"
    assert doors.smc(Function.AFFINITY_INFO_64, 2, 0)[0] == Affinity.ON_PENDING
    doors.machine.host_cpus.come_up()
    cpu = doors.machine.host_cpus.cpus[2]
    assert (cpu.pc, cpu.x0) == (KERNEL, 1)
    assert doors.smc(Function.CPU_ON_64, 2, KERNEL, 3)[0] == psci.ALREADY_ON
    assert doors.smc(Function.CPU_OFF, cpu=2) == ()
    assert doors.smc(Function.AFFINITY_INFO_64, 2, 0)[0] == Affinity.OFF
    assert cpu.bus.context is None
    assert doors.smc(Function.CPU_ON_64, 2, KERNEL, 4)[0] == 0
    doors.machine.host_cpus.come_up()
    assert cpu.x0 == 4
    doors.sound()


@pytest.mark.parametrize("system", [False, True])
def test_a_cpu_that_wakes_is_behind_stage_2_again(system: bool) -> None:
    doors = Doors()
    cpu = doors.machine.host_cpus.boot
    if system:
        assert doors.smc(Function.SYSTEM_SUSPEND_64, KERNEL, 5) == ()
    else:
        assert doors.smc(Function.CPU_SUSPEND_64, 0, KERNEL, 4)[0] == 0
        assert cpu.bus.context is not None
        assert doors.smc(Function.CPU_SUSPEND_64, POWER_DOWN, KERNEL, 5) == ()
    assert cpu.bus.context is None
    doors.machine.host_cpus.wake(cpu)
    assert (cpu.pc, cpu.x0, cpu.el, cpu.hcr_el2) == (KERNEL, 5, 1, HOST_HCR)
    with pytest.raises(Stage2Fault):
        cpu.bus.read(doors.hyp.mem.carveout[0], 8)
    assert doors.events(CpuPower) == [CpuPower(0, "suspend"), CpuPower(0, "resume")]
    doors.sound()


def test_what_passes_and_what_does_not() -> None:
    doors = Doors()
    assert doors.smc(Function.PSCI_VERSION, 7, 7, 7, 7)[:5] == (psci.VERSION_1_1, 0, 0, 0, 7)
    assert doors.smc(Function.PSCI_FEATURES, Function.CPU_ON_64)[0] == 0
    assert doors.smc(Function.MIGRATE_INFO_TYPE)[0] == 2
    assert doors.smc(Function.SYSTEM_SUSPEND_32, KERNEL)[0] == psci.NOT_SUPPORTED
    for function in (
        Function.CPU_ON_32,
        Function.CPU_SUSPEND_32,
        Function.MEM_PROTECT,
        Function.MEM_PROTECT_CHECK_RANGE_64,
        0x8400_001F,
        0xC400_0017,
    ):
        doors.seen.clear()
        assert doors.smc(function, 1, KERNEL)[0] == psci.NOT_SUPPORTED
        assert doors.seen == []
        assert doors.refusals()[-1].check == "psci_function"
    assert doors.smc(Function.SYSTEM_RESET) == ()
    assert doors.machine.firmware.psci.system_state == "reset"


def test_without_the_resume_entry_of_el2s_a_cpu_reads_everything() -> None:
    with weakened("a CPU that wakes enters EL2 first"):
        doors = Doors()
        guest = Guest(doors)
        doors.machine.memory.write(guest.ram + 64, SECRET)
        cpu = doors.machine.host_cpus.boot
        doors.smc(Function.CPU_SUSPEND_64, POWER_DOWN, KERNEL, 0)
        doors.machine.host_cpus.wake(cpu)
        assert cpu.bus.read(guest.ram + 64, len(SECRET)) == SECRET
        assert doors.problems()[0].startswith("P15")


def test_without_the_entry_of_el2s_a_cpu_reads_everything() -> None:
    """The mutant shows what the relay is for."""
    with weakened("a CPU that starts enters EL2 first"):
        doors = Doors()
        guest = Guest(doors)
        doors.machine.memory.write(guest.ram + 64, SECRET)
        assert doors.smc(Function.CPU_ON_64, 1, KERNEL, 0)[0] == 0
        cpu = doors.machine.host_cpus.cpus[1]
        assert cpu.el == 2
        assert cpu.bus.read(guest.ram + 64, len(SECRET)) == SECRET
        assert doors.problems()[0].startswith("P15")
