# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's drivers for firmware, on a whole machine that is checked after each SMC."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from fakes.host_fakes import Rig
from pkvm.arm64 import ffa
from pkvm.arm64.ffa import Status
from pkvm.arm64.psci import Affinity
from pkvm.check.door import InvariantError
from pkvm.check.mutants import weakened
from pkvm.host.ffa import FfaCallError
from pkvm.machine.secure import PARTITIONS
from pkvm.machine.secure_partition import Command
from pkvm.machine.stage2 import Stage2Fault
from pkvm.system import System
from pkvm.uapi.dialects import DIALECTS

SP = min(PARTITIONS)
PAGE = 4096
MIB = 1 << 20


@pytest.fixture(params=DIALECTS)
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    with System(16 * MIB, dialect=request.param, check=True) as system:
        yield system


def test_memory_of_the_hosts_goes_to_the_secure_world_and_back(system: System) -> None:
    driver = system.host.ffa()
    assert system.host.ffa() is driver
    assert SP in [partition.endpoint for partition in driver.partitions()]
    memory = system.host.mmap(4 * PAGE)
    pa = system.host.pa(memory.address)
    memory.write(PAGE + 8, (77).to_bytes(8, "little"))
    handle = driver.give([(pa, 4)], SP)
    driver.message(SP, Command.RETRIEVE, handle)
    assert driver.message(SP, Command.READ, handle, PAGE + 8)[:2] == (0, 77)
    with pytest.raises(FfaCallError) as error:
        driver.give([(pa, 1)], SP)
    assert error.value.status == Status.DENIED
    driver.message(SP, Command.RELINQUISH, handle)
    driver.reclaim(handle)
    assert system.census().host["shared_with_guest"] == 0
    memory.close()


def test_el2s_memory_does_not(system: System) -> None:
    with pytest.raises(FfaCallError) as error:
        system.host.ffa().give([(system.hyp.mem.carveout[0], 1)], SP)
    assert error.value.status == Status.DENIED


def test_cpus_come_and_go(system: System) -> None:
    cpus = system.host.cpus
    entry = system.machine.memory.ram_base
    assert [cpus.state(cpu) for cpu in range(4)] == [Affinity.ON] + [Affinity.OFF] * 3
    cpus.up(1, entry, 5)
    assert cpus.state(1) == Affinity.ON
    for cpu, number in ((1, errno.EBUSY), (0, errno.EBUSY), (9, errno.EINVAL)):
        with pytest.raises(OSError, match="PSCI call cpu_on_64") as error:
            cpus.up(cpu, entry)
        assert error.value.errno == number
    assert cpus.buses[1].read(entry, 4) == bytes(4)
    with pytest.raises(Stage2Fault):
        cpus.buses[1].read(system.hyp.mem.carveout[0], 4)
    cpus.down(1)
    with pytest.raises(OSError, match="answered -3") as error:
        cpus.down(0)
    assert error.value.errno == errno.EPERM
    with pytest.raises(ValueError, match="no power"):
        cpus.down(1)


def test_the_checks_see_a_cpu_that_is_a_way_round() -> None:
    with (
        weakened("a CPU that starts enters EL2 first"),
        System(16 * MIB, check=True) as system,
        pytest.raises(InvariantError, match="P15"),
    ):
        system.host.cpus.up(1, system.machine.memory.ram_base)


def test_the_checks_see_a_secure_world_that_was_given_too_much() -> None:
    with (
        weakened("the secure world is given what the host owns"),
        System(16 * MIB, check=True) as system,
    ):
        driver = system.host.ffa()
        with pytest.raises(InvariantError, match="P16"):
            driver.give([(system.hyp.mem.carveout[0], 1)], SP)


def test_a_host_that_is_not_protected_speaks_with_the_firmware_itself() -> None:
    with System(16 * MIB, protected=False) as system:
        driver = system.host.ffa(ffa.VERSION_1_1)
        handle = driver.give([(system.machine.memory.ram_end - PAGE, 1)], SP)
        driver.reclaim(handle)
        system.host.cpus.up(1, system.machine.memory.ram_base)
        assert system.machine.host_cpus.cpus[1].el == 2


def test_without_firmware() -> None:
    kernel = Rig().kernel
    with pytest.raises(OSError, match="no firmware") as error:
        kernel.ffa()
    assert error.value.errno == errno.ENODEV
