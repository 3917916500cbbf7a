# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's lazy identity map and the devices' eager one."""

from __future__ import annotations

import pytest

from fakes.memory_rig import DEVICE, MIB, SMMU, Rig
from pkvm.arm64.stage2 import (
    ANNOTATION_HYP,
    ATTR_DEVICE_RW,
    ATTR_NORMAL_RWX,
    BLOCK_1G,
    BLOCK_2M,
    TABLE_OR_PAGE,
    Geometry,
)
from pkvm.events import HostAbort, Refusal, Tlbi
from pkvm.hyp.errors import Errno
from pkvm.hyp.host_memory import pool_pages, tree_pages
from pkvm.hyp.identity_domain import ATTR_DMA
from pkvm.hyp.mem_protect import MemProtect, carveout_bytes
from pkvm.machine.bus import Bus
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.stage2 import Access, Stage2Fault

RAM = 0x8000_0000
RWX_PAGE = ATTR_NORMAL_RWX | TABLE_OR_PAGE


def host_leaf(rig: Rig, ipa: int) -> tuple[int, int]:
    return rig.mem.host.stage2.leaf(ipa)


def dma_leaf(rig: Rig, ipa: int) -> tuple[int, int]:
    return rig.mem.host.dma.leaf(ipa)


def test_ram_is_mapped_at_the_first_touch_by_a_block(rig: Rig) -> None:
    assert host_leaf(rig, RAM)[0] == 0
    rig.recorder.events.clear()
    rig.host_bus.write(RAM + 0x1234, b"x")
    assert host_leaf(rig, RAM) == (RAM | ATTR_NORMAL_RWX, 2)
    assert rig.recorder.events == [HostAbort(RAM + 0x1234, "write", True)]
    rig.host_bus.read(RAM + BLOCK_2M - 8, 8)
    assert len(rig.recorder.events) == 1


def test_a_gigabyte_block_where_nothing_is_lost() -> None:
    rig = Rig(2 * BLOCK_1G)
    rig.host_bus.read(RAM, 8)
    assert host_leaf(rig, RAM) == (RAM | ATTR_NORMAL_RWX, 1)
    rig.host_bus.read(RAM + BLOCK_1G, 8)
    assert host_leaf(rig, RAM + BLOCK_1G)[1] == 2, "the carve-out is in this gigabyte"
    rig.mem.host_donate_hyp((RAM >> 12) + 5, 1)
    assert host_leaf(rig, RAM + 4 * 4096) == (0, 3), "the block is dropped, not split"
    assert rig.host_bus.read(RAM + 4 * 4096, 8) == bytes(8)
    assert host_leaf(rig, RAM + 4 * 4096) == (RAM + 4 * 4096 | RWX_PAGE, 3)
    assert host_leaf(rig, RAM + BLOCK_2M) == (0, 2)
    rig.host_bus.read(RAM + BLOCK_2M, 8)
    assert host_leaf(rig, RAM + BLOCK_2M)[1] == 2
    rig.sound()


def test_a_block_is_broken_before_its_table_is_made(rig: Rig) -> None:
    rig.host_bus.read(RAM, 8)
    rig.recorder.events.clear()
    rig.mem.host_donate_hyp(RAM >> 12, 1)
    assert rig.recorder.events[0] == Tlbi(0, -1)
    with pytest.raises(Stage2Fault):
        rig.host_bus.read(RAM, 8)


def test_pages_where_the_region_has_a_lost_one(rig: Rig) -> None:
    rig.mem.host_donate_hyp((RAM >> 12) + 100, 1)
    rig.host_bus.read(RAM + 0x5008, 8)
    assert host_leaf(rig, RAM + 0x5008) == (RAM + 0x5000 | RWX_PAGE, 3)
    with pytest.raises(Stage2Fault):
        rig.host_bus.read(RAM + 100 * 4096, 8)


def test_a_whole_region_that_comes_back_is_a_block_again(rig: Rig) -> None:
    free = rig.mem.pool.available
    rig.mem.host_donate_hyp(RAM >> 12, 512)
    rig.mem.hyp_donate_host(RAM >> 12, 512)
    rig.host_bus.read(RAM, 8)
    assert host_leaf(rig, RAM) == (RAM | ATTR_NORMAL_RWX, 2)
    assert dma_leaf(rig, RAM) == (RAM | ATTR_DMA, 2)
    assert rig.mem.pool.available == free, "no table is left behind"


def test_mmio_is_device_memory_without_execution(rig: Rig) -> None:
    assert rig.host_bus.read_u64(DEVICE + 8) == 8
    entry, level = host_leaf(rig, DEVICE)
    assert (entry, level) == (DEVICE | ATTR_DEVICE_RW, 2), "in the SMMU's gigabyte"
    assert not rig.mem.host_abort(DEVICE, Access.FETCH, 0x0D)
    assert rig.mem.host_abort(BLOCK_1G, Access.READ, 0x05)
    assert host_leaf(rig, BLOCK_1G) == (BLOCK_1G | ATTR_DEVICE_RW, 1), "the largest in the gap"


@pytest.mark.parametrize("offset", [0, 0x20, 0x98, 0x1_00AC, 0x1_FFFC])
def test_the_smmu_is_out_of_the_hosts_reach(rig: Rig, offset: int) -> None:
    rig.host_bus.read_u64(DEVICE)
    for access in (lambda: rig.host_bus.read(SMMU + offset, 4),
                   lambda: rig.host_bus.write(SMMU + offset, bytes(4))):  # fmt: skip
        rig.recorder.events.clear()
        with pytest.raises(Stage2Fault):
            access()
        refusal = rig.recorder.events[-1]
        assert isinstance(refusal, Refusal)
        assert refusal.why == "the page belongs to EL2"
    assert rig.smmu.window.read(0x24, 4) == 0xD  # still on
    assert rig.mem.host_abort(SMMU - 8, Access.READ, 0x05)  # its neighbours are the host's


def test_mmio_just_beyond_ram_is_not_in_rams_gigabyte_block(rig: Rig) -> None:
    end = rig.memory.ram_end
    assert rig.mem.host_abort(end, Access.READ, 0x06)
    assert host_leaf(rig, end) == (end | ATTR_DEVICE_RW, 2)


def test_ram_and_mmio_in_one_region_get_pages() -> None:
    rig = Rig(ram_base=RAM + 0x5000)
    for ipa, attr in ((RAM + 0x4000, ATTR_DEVICE_RW), (RAM + 0x5000, ATTR_NORMAL_RWX)):
        assert rig.mem.host_abort(ipa, Access.READ, 0x05)
        assert host_leaf(rig, ipa) == (ipa | attr | TABLE_OR_PAGE, 3)
    rig.sound()
    rig.mem.host_donate_hyp(rig.first_pfn, 1)
    rig.mem.host_donate_hyp(rig.first_pfn + 1, 1000)
    rig.sound()


def test_spurious_fault_is_retried(rig: Rig) -> None:
    rig.host_bus.read(RAM, 8)
    assert rig.mem.host_abort(RAM, Access.READ, 0x06)


@pytest.mark.parametrize("fsc", [0x0D, 0x0E, 0x0F, 0x09, 0x0B, 0x10])
def test_other_faults_than_translation_are_refused(rig: Rig, fsc: int) -> None:
    assert not rig.mem.host_abort(RAM + MIB, Access.FETCH, fsc)
    assert host_leaf(rig, RAM + MIB)[0] == 0


@pytest.mark.parametrize("ipa", [1 << 40, (1 << 64) - 8, -8])
def test_addresses_that_cannot_be(rig: Rig, ipa: int) -> None:
    assert not rig.mem.host_abort(ipa, Access.READ, 0x04)


def test_a_refusal_says_whose_page_it_is(rig: Rig) -> None:
    vm = rig.vm()
    rig.mem.host_donate_guest(vm, RAM >> 12, 0x40001, 1)
    rig.recorder.events.clear()
    for pa in (RAM, rig.carveout[0], rig.firmware[0]):
        with pytest.raises(Stage2Fault):
            rig.host_bus.read(pa, 8)
    aborts, refusals = rig.recorder.events[::2], rig.recorder.events[1::2]
    assert aborts[0] == HostAbort(RAM, "read", False)
    assert isinstance(refusals[0], Refusal)
    assert refusals[0].errno == Errno.EFAULT
    assert refusals[0].why == "the page belongs to VM 0x1000 (guest frame 0x40001)"
    for refusal in refusals[1:]:
        assert isinstance(refusal, Refusal)
        assert refusal.why == "the page belongs to EL2"


def test_every_byte_of_el2_is_out_of_reach(rig: Rig) -> None:
    for base, nbytes in (rig.carveout, rig.firmware):
        for pa in range(base, base + nbytes, 4096):
            assert rig.mem.host.stage2.leaf(pa)[0] & 1 == 0
            assert rig.mem.host.dma.leaf(pa)[0] == 0


def test_devices_reach_ram_from_the_start_and_mmio_never(rig: Rig) -> None:
    assert rig.dma_bus.read(RAM + 17 * MIB, 8) == bytes(8)
    assert dma_leaf(rig, RAM) == (RAM | ATTR_DMA, 2)
    with pytest.raises(Stage2Fault):
        rig.dma_bus.read(DEVICE, 8)


def test_a_dma_block_is_split_with_its_contents(rig: Rig) -> None:
    rig.dma_bus.read(RAM, 8)
    rig.mem.host_donate_hyp((RAM >> 12) + 3, 1)
    assert dma_leaf(rig, RAM + 2 * 4096) == (RAM + 2 * 4096 | ATTR_DMA | TABLE_OR_PAGE, 3)
    assert dma_leaf(rig, RAM + 3 * 4096) == (0, 3)
    with pytest.raises(Stage2Fault):
        rig.dma_bus.read(RAM + 3 * 4096, 8)
    rig.mem.hyp_donate_host((RAM >> 12) + 3, 1)
    rig.dma_bus.read(RAM + 3 * 4096, 8)


def drain(rig: Rig, leave: int) -> list[int]:
    return [rig.mem.pool.alloc() for _ in range(rig.mem.pool.available - leave)]


def test_mmio_mappings_are_recycled_when_the_pool_runs_dry(rig: Rig) -> None:
    rig.host_bus.read_u64(DEVICE)
    rig.mem.host_abort(rig.memory.ram_end, Access.READ, 0x06)
    pages = drain(rig, 2)
    rig.recorder.events.clear()
    rig.host_bus.read(RAM, 8)
    assert Tlbi(0, -1) in rig.recorder.events
    assert host_leaf(rig, DEVICE)[0] == 0
    assert host_leaf(rig, rig.memory.ram_end)[0] == 0
    assert host_leaf(rig, SMMU) == (ANNOTATION_HYP, 3), "what EL2 keeps for itself stays"
    assert host_leaf(rig, RAM)[1] == 2
    for pa in pages:
        rig.mem.pool.free(pa)
    assert rig.host_bus.read_u64(DEVICE + 16) == 16


def test_the_pool_is_enough_for_all_ram_in_pages() -> None:
    rig = Rig(16 * MIB)
    free = rig.mem.pool.available
    for page in range(0, rig.host_pages, 2):
        rig.mem.host_donate_hyp(rig.first_pfn + page, 1)
    for page in range(1, rig.host_pages, 2):
        rig.host_bus.read_u64((rig.first_pfn + page) << 12)
    rig.sound()
    assert free - rig.mem.pool.available <= 2 * tree_pages(16 * MIB, Geometry(40))


@pytest.mark.parametrize("ram_bytes", [16 * MIB, 256 * MIB, BLOCK_1G, 3 * BLOCK_1G])
def test_the_carve_out_is_small(ram_bytes: int) -> None:
    size = carveout_bytes(ram_bytes)
    assert size % BLOCK_2M == 0
    records = ram_bytes // 4096 * 8
    assert size >= records + pool_pages(ram_bytes, Geometry(40)) * 4096
    assert size <= records + 2 * ram_bytes // 256 + 5 * MIB


@pytest.mark.parametrize(
    ("carveout", "firmware"),
    [
        ((RAM, 0), None),
        ((RAM + 1, 4 * MIB), None),
        ((RAM + 14 * MIB, 4 * MIB), None),
        ((RAM, 64 * 1024), None),
        ((0, 4 * MIB), None),
        ((RAM, 4 * MIB), (RAM + 8 * MIB + 8, 4096)),
        ((RAM, 4 * MIB), (RAM - 4096, 4096)),
        ((RAM, 4 * MIB), (RAM + 2 * MIB, 4096)),
        ((RAM, 4 * MIB), (RAM + 8 * MIB, 0)),
    ],
)
def test_regions_that_cannot_be(
    carveout: tuple[int, int], firmware: tuple[int, int] | None
) -> None:
    memory = PhysicalMemory(RAM, 16 * MIB)
    with pytest.raises(ValueError, match=r"carve-out|firmware"):
        MemProtect(
            memory,
            host_bus=Bus(memory, "host"),
            smmu=None,
            guest_tlbi=lambda vmid: None,
            invalidate_code=lambda pa, nbytes: None,
            recorder=Rig(16 * MIB).recorder,
            carveout=carveout,
            firmware=firmware,
        )
