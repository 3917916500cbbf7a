# SPDX-License-Identifier: GPL-2.0-or-later
"""MEM_RELINQUISH, the balloon of a protected guest: the host has the page again, counts it no
longer, and frees it when the VMM has unmapped it; the guest can get another one there.
"""

from __future__ import annotations

import errno

import pytest

from fakes.contract_rig import PAGE, RAM_IPA, errno_of
from fakes.dialect_rig import party
from pkvm.arm64.smccc import INVALID_PARAMETER, Function
from pkvm.check.invariants import check_hyp
from pkvm.uapi.errors import ProtectedPageError

RELINQUISH = Function.MEM_RELINQUISH


@pytest.mark.parametrize("misalign", [False, True], ids=["blocks", "pages"])
def test_a_page_given_back_counts_no_longer(misalign: bool) -> None:
    with party("android", misalign=misalign) as made:
        agent, lock = made.agent(), made.system.host.memlock
        for page in range(8):
            agent.store(RAM_IPA + page * PAGE, 0x5EC2E7)
        locked = lock.pages
        for given, page in enumerate((3, 5, 4, 0), 1):
            assert agent.hvc(RELINQUISH, RAM_IPA + page * PAGE)[:4] == (0, 0, 0, 0)
            assert lock.pages == locked - given
            assert made.ram.read(page * PAGE, PAGE) == bytes(PAGE)
            assert check_hyp(made.system.hyp) == []
        assert agent.hvc(RELINQUISH, RAM_IPA + 3 * PAGE)[0] == 0, "nothing there is no error"
        assert agent.hvc(RELINQUISH, RAM_IPA + 8)[0] == INVALID_PARAMETER
        assert lock.pages == locked - 4
        made.ram.write(3 * PAGE, b"new, from the VMM")
        lock.limit = lock.pages * PAGE
        assert errno_of(agent.load, RAM_IPA + 3 * PAGE) == errno.ENOMEM, "it counts again"
        lock.limit = None
        assert agent.resume().results[1] == int.from_bytes(b"new, fro", "little")
        assert lock.pages == locked - 3
        with pytest.raises(ProtectedPageError):
            made.ram.read(3 * PAGE, 1)
        for page in (1, 2, 6, 7):
            assert agent.load(RAM_IPA + page * PAGE) == 0x5EC2E7
    assert lock.pages == 0


@pytest.mark.parametrize("misalign", [False, True], ids=["blocks", "pages"])
def test_a_page_given_back_is_free_without_its_mapping(misalign: bool) -> None:
    with party("android", misalign=misalign) as made:
        agent, kernel = made.agent(), made.system.host
        for page in range(8):
            agent.store(RAM_IPA + page * PAGE, page)
        agent.hvc(RELINQUISH, RAM_IPA + 2 * PAGE)
        made.ram.close()
        free = kernel.free_pages
        assert agent.hvc(RELINQUISH, RAM_IPA + 6 * PAGE)[0] == 0
        assert kernel.free_pages == free + 1
        others = made.kvm.mmap(512 * PAGE)
        others.write(0, b"\xff" * others.length)
        assert check_hyp(made.system.hyp) == []
        assert [agent.load(RAM_IPA + page * PAGE) for page in (0, 1, 3, 4, 5, 7)] == [
            0, 1, 3, 4, 5, 7,
        ]  # fmt: skip
        assert errno_of(agent.load, RAM_IPA + 6 * PAGE) == errno.EFAULT
