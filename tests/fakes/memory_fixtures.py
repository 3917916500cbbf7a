# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures: a machine's memory, and two VMs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fakes.memory_rig import HANDLE, Rig, RigVm


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A machine in protected mode; every invariant must hold when the test ends."""
    rig = Rig()
    yield rig
    rig.sound()


@pytest.fixture
def vm(rig: Rig) -> RigVm:
    """A VM with eight pages in its memcache."""
    return rig.vm(HANDLE)


@pytest.fixture
def other(rig: Rig) -> RigVm:
    """Another one."""
    return rig.vm(HANDLE + 1)
