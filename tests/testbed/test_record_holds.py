# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenarios on the stock kernel in QEMU once more: the record that comes with pkvm holds."""

from __future__ import annotations

import pytest

from pkvm.check import bed_run, recorded
from pkvm.check.scenarios import TOPICS
from pkvm.testbed.bed import TestBed

pytestmark = pytest.mark.linux


def test_the_record_holds() -> None:
    kept = recorded.load()
    with TestBed() as bed:
        seen = bed_run.run(bed, TOPICS, seconds=60.0)
    assert seen.machine["kernel"] == kept.machine["kernel"]
    assert set(seen.observations) == set(kept.observations)
    assert seen.observations == kept.observations
