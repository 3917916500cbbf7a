# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that has the secure world read a protected guest's page, in every dialect."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from fakes.contract_rig import RAM_IPA
from fakes.dialect_rig import Party, party
from pkvm.arm64.ffa import Function, Status
from pkvm.arm64.smccc import Function as Smccc
from pkvm.check.firmware_doors import check_doors
from pkvm.check.mutants import weakened
from pkvm.host.ffa import FfaCallError
from pkvm.machine.secure import PARTITIONS
from pkvm.machine.secure_partition import Command
from pkvm.machine.stage2 import Stage2Fault
from pkvm.uapi.dialects import DIALECTS

SP = min(PARTITIONS)
PAGE = 4096
AT = 5 * PAGE
SECRET = 0x5EC2_E75E_C2E7
GIVE = (Function.FFA_MEM_SHARE_64, Function.FFA_MEM_LEND_64, Function.FFA_MEM_DONATE_64)


def guests_page(made: Party) -> int:
    """PA of the page in which the guest keeps its secret."""
    made.agent().store(RAM_IPA + AT, SECRET)
    return made.system.host.pa(made.ram.address + AT)


@pytest.mark.parametrize("name", DIALECTS)
def test_the_secure_world_does_not_get_a_guests_page(name: str) -> None:
    with party(name) as made:
        agent = made.agent()
        agent.store(RAM_IPA + AT, SECRET)
        host = made.system.host
        pa = host.pa(made.ram.address + AT)
        driver = host.ffa()
        mine = made.kvm.mmap(PAGE)
        good = host.pa(mine.address)
        for function in GIVE:
            refused(partial(driver.give, [(good, 1), (pa, 1)], SP, function))
        host.cpus.up(1, good)
        with pytest.raises(Stage2Fault):
            host.cpus.buses[1].read(pa, 8)
        assert agent.hvc(Smccc.MEM_SHARE, RAM_IPA + AT, *shared_range(made))[0] == 0
        assert host.cpus.buses[1].read(pa, 8) == SECRET.to_bytes(8, "little")
        refused(partial(driver.give, [(pa, 1)], SP))
        assert agent.hvc(Smccc.MEM_UNSHARE, RAM_IPA + AT, *shared_range(made))[0] == 0
        with pytest.raises(Stage2Fault):
            host.cpus.buses[1].read(pa, 8)
        host.cpus.down(1)
        assert agent.load(RAM_IPA + AT) == SECRET
        handle = driver.give([(good, 1)], SP)
        driver.reclaim(handle)
        mine.close()
        assert check_doors(made.system.hyp, made.system.machine) == []


def shared_range(made: Party) -> tuple[int, ...]:
    """The arguments that say one page."""
    return () if made.dialect.name == "upstream" else (1,)


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(FfaCallError) as error:
        call()
    assert error.value.status in (Status.DENIED, Status.NOT_SUPPORTED)


@pytest.mark.parametrize("name", DIALECTS)
def test_it_would_if_it_were_not_asked_whose_the_page_is(name: str) -> None:
    with weakened("the secure world is given what the host owns"), party(name) as made:
        pa = guests_page(made)
        driver = made.system.host.ffa()
        handle = driver.give([(pa, 1)], SP)
        driver.message(SP, Command.RETRIEVE, handle)
        assert driver.message(SP, Command.READ, handle, 0)[:2] == (0, SECRET)
        assert "P16" in check_doors(made.system.hyp, made.system.machine)[0]
        driver.message(SP, Command.RELINQUISH, handle)
        driver.reclaim(handle)
