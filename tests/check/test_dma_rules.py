# SPDX-License-Identifier: GPL-2.0-or-later
"""Each rule about paged domains is broken in turn, from outside, and must be seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from fakes.memory_rig import DEVICE, STREAM, Rig
from pkvm.arm64.smmu import stage2_ste
from pkvm.check.invariants import Snapshot, check
from pkvm.hyp.host_dma import Domain
from pkvm.hyp.vmemmap import HOST_OWNED, HOST_PINNED

IOVA = 0x1_0000_0000
READ, MMIO = 1, 16


@dataclass
class Scene:
    """A domain that maps the first page of RAM twice, and a device follows it."""

    rig: Rig
    domain: Domain

    def entry(self, iova: int) -> int:
        return self.domain.stage2.find(iova)[0]


@pytest.fixture
def scene() -> Scene:
    rig = Rig(16 << 20)
    root = rig.pages(2)
    rig.mem.host_donate_hyp(root >> 12, 2)
    memcache = rig.mem.new_memcache()
    domain = Domain(1, rig.mem.new_domain_stage2(root, 1, memcache), memcache)
    rig.mem.domains[1] = domain
    memcache.topup(rig.link([rig.pages(1) for _ in range(4)]), 4)
    for number in range(2):
        pa = rig.first_pfn << 12
        rig.mem.host_map_dma(domain, IOVA + number * 4096, pa, 4096, READ)
    assert rig.mem.smmu is not None
    rig.mem.smmu.configure(STREAM, stage2_ste(domain.stage2.vttbr, domain.stage2.vtcr))
    rig.dma_bus.read(IOVA, 4)
    rig.sound()
    return Scene(rig, domain)


def count_too_high(scene: Scene) -> None:
    scene.rig.mem.vmemmap.refcount[0] += 1


def not_pinned(scene: Scene) -> None:
    scene.rig.mem.vmemmap.state[0] = HOST_OWNED


def pinned_for_nobody(scene: Scene) -> None:
    scene.rig.mem.vmemmap.state[5] = HOST_PINNED


def lost_page_is_mapped(scene: Scene) -> None:
    """What a donation that ignores pins looks like."""
    scene.rig.mem.vmemmap.state[0] = HOST_OWNED
    scene.rig.mem.vmemmap.refcount[0] = 0
    scene.rig.mem.host_donate_hyp(scene.rig.first_pfn, 1)


def maps_a_device(scene: Scene) -> None:
    scene.rig.mem.host_map_dma(scene.domain, IOVA + 0x5000, DEVICE, 4096, READ | MMIO)
    assert check(scene.rig.mem, scene.rig.vms) == []
    scene.rig.mem.devices.notes[0] = 0


def maps_el2(scene: Scene) -> None:
    words = scene.rig.memory.words
    words[scene.entry(IOVA)] += scene.rig.carveout[0] - scene.rig.memory.ram_base


def block(scene: Scene) -> None:
    scene.domain.stage2.put(IOVA + (1 << 21), scene.rig.memory.ram_base | 0x7FD, 2)


def table_refcount(scene: Scene) -> None:
    page = scene.entry(IOVA) >> 9
    scene.rig.mem.vmemmap.refcount[page] += 1


def stale_translation(scene: Scene) -> None:
    assert scene.rig.mem.smmu is not None
    scene.rig.mem.smmu.invalidate_page = lambda vmid, ipa: None  # type: ignore[method-assign]
    scene.rig.mem.host_unmap_dma(scene.domain, IOVA, 4096)


def stream_of_a_dead_domain(scene: Scene) -> None:
    scene.rig.mem.host_unmap_dma(scene.domain, IOVA, 0x2000)
    del scene.rig.mem.domains[1]


@pytest.mark.parametrize(
    ("rule", "break_it"),
    [
        ("P8", count_too_high),
        ("P8", not_pinned),
        ("P8", pinned_for_nobody),
        ("P8", lost_page_is_mapped),
        ("P8", maps_a_device),
        ("P8", maps_el2),
        ("P8", block),
        ("P5", table_refcount),
        ("P9", stale_translation),
        ("P8", stream_of_a_dead_domain),
    ],
)
def test_what_is_broken_is_seen(scene: Scene, rule: str, break_it: Callable[[Scene], None]) -> None:
    break_it(scene)
    problems = check(scene.rig.mem, scene.rig.vms)
    assert any(problem.startswith(f"{rule}: ") for problem in problems), problems


def test_a_snapshot_has_domains(scene: Scene) -> None:
    before = Snapshot(scene.rig.mem, scene.rig.vms)
    scene.rig.memory.words[scene.entry(IOVA)] ^= 1 << 7
    differences = before.differences(Snapshot(scene.rig.mem, scene.rig.vms))
    assert any(name.startswith("domain 1's page") for name in differences)
