# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio-blk and virtio-rng against a driver that does anything (`fakes.hostile_driver`)."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.hostile_driver import RAM_BYTES, SECRET, Plan, attack, plans
from fakes.virtio_driver import Rig
from pkvm.vmm.virtio.blk import Block
from pkvm.vmm.virtio.disk import Disk
from pkvm.vmm.virtio.rng import Entropy

quick = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None
)

requests = st.builds(
    lambda kind, at, count, flags: struct.pack("<IIQQII", kind, 0, at, at, count, flags),
    st.sampled_from([0, 1, 0, 1, 4, 8, 11, 13, 99]),
    st.sampled_from([0, 1, 7, 8, 1 << 40, (1 << 64) - 1]),
    st.sampled_from([0, 1, 8, 0xFFFF_FFFF]),
    st.sampled_from([0, 1, 2]),
)  # fmt: skip


@pytest.mark.parametrize("read_only", [False, True])
@quick
@given(plan=plans(1, requests))
def test_blk(tmp_path: Path, read_only: bool, plan: Plan) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(8 * 512))
    disk = Disk(str(path), read_only=read_only)
    try:
        attack(Rig(Block(disk), ram_bytes=RAM_BYTES), plan)
        content = path.read_bytes()
        assert len(content) == 8 * 512
        assert SECRET[:32] not in content
        assert not (read_only and any(content))
    finally:
        disk.close()


@quick
@given(plan=plans(1, st.binary(max_size=8)))
def test_rng(plan: Plan) -> None:
    attack(Rig(Entropy(bytes), ram_bytes=RAM_BYTES), plan)
