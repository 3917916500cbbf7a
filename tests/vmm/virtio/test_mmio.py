# SPDX-License-Identifier: GPL-2.0-or-later
"""The virtio-mmio transport: its registers, the talk about features, interrupts, reset, and what it
does with a driver that cannot be served."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.virtio_driver import RAM_BASE, WRITE, Descriptor, Driver, Rig
from pkvm.vmm import board
from pkvm.vmm.faults import MAX_FAULTS, Fault, Faults
from pkvm.vmm.guest_memory import GuestMemory
from pkvm.vmm.virtio import mmio
from pkvm.vmm.virtio.bus import VirtioBus
from pkvm.vmm.virtio.device import VirtioDevice
from pkvm.vmm.virtio.queue import Queue


class Echo(VirtioDevice):
    """Gives back in the first queue's buffers what it is sent; the second queue is its own."""

    name = "echo"
    device_id = 42
    device_features = 1 << 3
    queue_names = ("echo", "news")
    queue_size = 64

    def __init__(self) -> None:
        self.config = bytearray(b"0123456789")
        self.log: list[str] = []

    def read_config(self) -> bytes:
        return bytes(self.config)

    def write_config(self, offset: int, data: bytes) -> None:
        self.config[offset : offset + len(data)] = data

    def start(self) -> None:
        self.log.append(f"start {self.port.features:#x}")

    def process(self, queue: Queue) -> None:
        if queue.index != 0:
            return
        while (chain := queue.pop()) is not None:
            chain.write(chain.read_all(100))
            queue.push(chain)

    def reset(self) -> None:
        self.log.append("reset")

    def close(self) -> None:
        self.log.append("close")

    def tell(self, data: bytes) -> None:
        with self.port.serving(1) as queue:
            chain = queue.pop()
            if chain is not None:
                chain.write(data)
                queue.push(chain)


class EchoRig(Rig):
    backend: Echo


@pytest.fixture
def rig() -> EchoRig:
    return EchoRig(Echo())


def test_identity(rig: EchoRig) -> None:
    read = rig.device.read
    assert read(0, 4).to_bytes(4, "little") == b"virt"
    assert read(4, 4) == 2
    assert read(8, 4) == 42
    assert read(0x0C, 4).to_bytes(4, "little") == b"PKVM"
    assert read(mmio.QUEUE_NUM_MAX, 4) == 64
    rig.device.write(mmio.QUEUE_SEL, 4, 2)
    assert read(mmio.QUEUE_NUM_MAX, 4) == 0
    assert read(mmio.SHM_LEN_LOW, 4) == 0xFFFF_FFFF


def test_a_driver_comes_and_goes(rig: EchoRig) -> None:
    driver = Driver(rig)
    assert rig.status == 0x0F
    used = driver.request([b"hello"], [8])
    assert used == (5, b"hello\0\0\0")
    assert rig.wire.raised == 1
    assert driver.acknowledge() == mmio.INTERRUPT_USED
    assert not rig.wire.level
    driver.write(mmio.STATUS, 0)
    assert rig.status == 0
    assert driver.read(mmio.QUEUE_READY) == 0
    assert rig.backend.log == ["reset", f"start {driver.features:#x}", "reset"]
    assert Driver(rig).request([b"again"], [5]).data == b"again"
    assert rig.report() == ""


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("without", [0, mmio.F_EVENT_IDX])
def test_buffers_go_round(rig: EchoRig, indirect: bool, without: int) -> None:
    driver = Driver(rig, features=~without, indirect=indirect)
    for n in range(100):
        text = b"%d" % n
        assert driver.request([text, b"!"], [1, 9]).data == (text + b"!").ljust(10, b"\0")


def test_the_device_offers_what_the_transport_and_the_kind_have(rig: EchoRig) -> None:
    assert Driver(rig).features == 1 << 3 | 1 << 28 | 1 << 29 | 1 << 32 | 1 << 33
    rig.device.write(mmio.DEVICE_FEATURES_SEL, 4, 2)
    assert rig.device.read(mmio.DEVICE_FEATURES, 4) == 0


class TestFeatures:
    @staticmethod
    def accept(rig: Rig, words: dict[int, int]) -> bool:
        write = rig.device.write
        write(mmio.STATUS, 4, 3)
        for sel, word in words.items():
            write(mmio.DRIVER_FEATURES_SEL, 4, sel)
            write(mmio.DRIVER_FEATURES, 4, word)
        write(mmio.STATUS, 4, 11)
        return bool(rig.status & mmio.FEATURES_OK)

    def test_good(self, rig: EchoRig) -> None:
        assert self.accept(rig, {0: 0, 1: 3})
        assert rig.device.features == 3 << 32
        # What was agreed on stays.
        rig.device.write(mmio.DRIVER_FEATURES, 4, 1)
        assert rig.device.features == 3 << 32

    def test_bad_not_offered(self, rig: EchoRig) -> None:
        assert not self.accept(rig, {0: 1, 1: 3})
        assert "not offered (0x1)" in rig.report()
        assert self.accept(rig, {0: 0})

    def test_bad_not_offered_above_64(self, rig: EchoRig) -> None:
        assert not self.accept(rig, {1: 3, 2: 1})

    def test_bad_legacy(self, rig: EchoRig) -> None:
        assert not self.accept(rig, {1: 2})
        assert "VERSION_1" in rig.report()

    def test_bad_without_access_platform(self, rig: EchoRig) -> None:
        assert not self.accept(rig, {1: 1})
        assert "VIRTIO_F_ACCESS_PLATFORM" in rig.report()
        assert "must share" in rig.report()

    def test_an_unprotected_guest_may_do_without_access_platform(self) -> None:
        assert self.accept(EchoRig(Echo(), protected=False), {1: 1})

    def test_bad_pool_not_shared(self, rig: EchoRig) -> None:
        page = 9
        rig.device = mmio.MmioDevice(
            rig.backend,
            3,
            rig.wire,
            rig.memory,
            rig.faults,
            protected=True,
            pool=RAM_BASE + page * 4096,
        )
        rig.ram.private.add(page)
        assert not self.accept(rig, {0: 0, 1: 3})
        (line,) = rig.faults.lines()
        assert line.startswith("echo (slot 3) at 0x40009000: the guest has not shared the pool")
        assert "PL011" in line
        rig.ram.private.remove(page)
        assert self.accept(rig, {})

    def test_bad_driver_ok_without_features_ok(self, rig: EchoRig) -> None:
        rig.device.write(mmio.STATUS, 4, 7)
        assert rig.status == 3
        assert not rig.device.live
        assert rig.backend.log == []


class TestConfiguration:
    @pytest.mark.parametrize("size", [1, 2, 4, 8])
    @pytest.mark.parametrize("offset", [0, 1, 3, 8, 9, 10, 200, 255])
    def test_any_access_goes(self, rig: EchoRig, offset: int, size: int) -> None:
        found = rig.device.read(mmio.CONFIG + offset, size)
        assert found == int.from_bytes(b"0123456789"[offset : offset + size], "little")
        rig.device.write(mmio.CONFIG + offset, size, 0x1122_3344_5566_7788)
        assert len(rig.backend.config) == 10

    def test_a_write_stays_within(self, rig: EchoRig) -> None:
        rig.device.write(mmio.CONFIG + 8, 8, int.from_bytes(b"abcdefgh", "little"))
        assert rig.backend.config == b"01234567ab"

    def test_a_change_has_a_generation_and_an_interrupt(self, rig: EchoRig) -> None:
        with rig.device.lock:
            rig.device.config_changed()
        assert rig.device.read(mmio.CONFIG_GENERATION, 4) == 1
        assert rig.wire.raised == 0
        driver = Driver(rig)
        with rig.device.lock:
            rig.device.config_changed()
        assert driver.read(mmio.CONFIG_GENERATION) == 2
        assert rig.wire.level
        assert driver.acknowledge() == mmio.INTERRUPT_CONFIG


class TestBreakdown:
    def test_the_report_names_a_private_queue(self, rig: EchoRig) -> None:
        rig.ram.private.update(range(rig.ram.length // 4096))
        driver = Driver(rig)
        assert rig.needs_reset
        assert driver.read(mmio.QUEUE_READY) == 0
        assert rig.faults.lines() == [
            "echo (slot 0), queue echo at 0x40000000: the page is private to the guest: the guest "
            "must share it with the host first (MEM_SHARE): a Linux guest does so with "
            "CONFIG_ARM_PKVM_GUEST and a restricted-dma-pool (CONFIG_DMA_RESTRICTED_POOL)"
        ]

    def test_the_report_names_a_private_buffer(self, rig: EchoRig) -> None:
        driver = Driver(rig)
        head = driver.add([b"secret"], [6])
        address = int.from_bytes(driver.queues[0].get(driver.queues[0].descriptors, 8), "little")
        rig.ram.private.add((address - RAM_BASE) // 4096)
        driver.notify()
        assert head == 0
        assert rig.needs_reset
        assert driver.collect() == []
        assert driver.acknowledge() == mmio.INTERRUPT_CONFIG
        assert f"queue echo at {address:#x}: the page is private" in rig.report()

    def test_a_broken_device_is_silent_until_it_is_reset(self, rig: EchoRig) -> None:
        driver = Driver(rig)
        driver.queues[0].make_available(999)
        driver.notify()
        assert rig.needs_reset
        driver.queues[0].available = 0
        driver.add([b"x"], [1])
        driver.add(writable=[4], queue=1)
        before = bytes(rig.ram.bytes)
        driver.notify()
        rig.backend.tell(b"news")
        assert rig.ram.bytes == before
        assert driver.collect() == []
        assert Driver(rig).request([b"x"], [1]).data == b"x"
        assert "descriptor 999 of 16 is available" in rig.report()
        assert "the device waits for its reset" in rig.report()

    def test_what_was_done_before_comes_back(self, rig: EchoRig) -> None:
        driver = Driver(rig)
        driver.add([b"good"], [4])
        driver.queues[0].make_available(999)
        driver.notify()
        assert rig.needs_reset
        assert [used.data for used in driver.collect()] == [b"good"]

    def test_a_used_ring_that_became_private_breaks_it(
        self, rig: EchoRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        driver = Driver(rig)
        driver.add([b"x"], [1])
        ring = driver.queues[0].device_ring
        write = rig.memory.write

        def write_then_hide(ipa: int, data: bytes) -> None:
            write(ipa, data)
            rig.ram.private.add((ring - RAM_BASE) // 4096)

        monkeypatch.setattr(rig.memory, "write", write_then_hide)
        driver.notify()
        assert rig.needs_reset
        (line,) = rig.faults.lines()
        assert line.startswith("echo (slot 0), queue echo at 0x40000")
        assert "times)" not in line

    def test_a_driver_that_gives_up_is_in_the_report(self, rig: EchoRig) -> None:
        driver = Driver(rig)
        driver.write(mmio.STATUS, 0x8F)
        assert not rig.device.live
        assert "gave the device up" in rig.report()

    def test_an_oserror_of_the_device_breaks_it(
        self, rig: EchoRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        driver = Driver(rig)

        def fail(queue: Queue) -> None:
            raise OSError(5, "no more")

        monkeypatch.setattr(rig.backend, "process", fail)
        driver.notify()
        assert rig.needs_reset
        assert "no more" in rig.report()


class TestThreads:
    def test_news_comes_from_a_thread_of_the_devices(self, rig: EchoRig) -> None:
        driver = Driver(rig)
        driver.add(writable=[4], queue=1)
        thread = threading.Thread(target=rig.backend.tell, args=(b"news",))
        thread.start()
        thread.join()
        assert driver.collect(1) == [(4, b"news")]
        assert rig.wire.level

    def test_serving_nests(self, rig: EchoRig) -> None:
        driver = Driver(rig)
        driver.add(writable=[4], queue=1)
        driver.add([b"x"], [1])
        with rig.device.serving(0) as queue:
            rig.backend.tell(b"news")
            assert driver.collect(1) == []
            rig.backend.process(queue)
        assert driver.collect(0)[0].data == b"x"
        assert driver.collect(1)[0].data == b"news"

    def test_a_halted_device_pops_nothing(self, rig: EchoRig) -> None:
        driver = Driver(rig)
        rig.device.halt()
        driver.add([b"x"], [1])
        driver.notify()
        assert driver.collect() == []


def test_a_queue_can_be_taken_down_alone(rig: EchoRig) -> None:
    driver = Driver(rig)
    driver.write(mmio.QUEUE_SEL, 0)
    driver.write(mmio.QUEUE_READY, 0)
    assert driver.read(mmio.QUEUE_READY) == 0
    driver.add([b"x"], [1])
    driver.notify()
    assert driver.collect() == []
    driver.queues[0] = driver.set_up(0, 8)
    assert driver.request([b"y"], [1]).data == b"y"


def test_a_ready_queue_does_not_change(rig: EchoRig) -> None:
    driver = Driver(rig)
    driver.write(mmio.QUEUE_SEL, 0)
    for register in (mmio.QUEUE_NUM, mmio.QUEUE_DESC_LOW, mmio.QUEUE_DEVICE_HIGH):
        driver.write(register, 0xDEAD)
    assert driver.request([b"x"], [1]).data == b"x"


@pytest.mark.parametrize("offset", [0x70, 0x72, 0x50, 0xFC, 0x1F0])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_control_registers_are_32_bits(rig: EchoRig, offset: int, size: int) -> None:
    driver = Driver(rig)
    driver.add([b"x"], [1])
    rig.device.write(offset, size, 0)
    assert rig.device.read(offset, size) == 0
    assert rig.status == 0x0F
    assert driver.collect() == []


accesses = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(0, 0x1FF),
        st.sampled_from([1, 2, 4, 8]),
        st.one_of(st.integers(0, 255), st.integers(0, (1 << 64) - 1)),
    ),
    max_size=60,
)


@given(accesses)
def test_no_access_fails(accesses: list[tuple[bool, int, int, int]]) -> None:
    rig = EchoRig(Echo(), ram_bytes=1 << 16)
    for is_write, offset, size, value in accesses:
        if is_write:
            rig.device.write(offset, size, value)
        else:
            assert 0 <= rig.device.read(offset, size) < 1 << 8 * size


class TestBus:
    @staticmethod
    def bus(*slots: int) -> tuple[VirtioBus, dict[int, Echo]]:
        backends = {slot: Echo() for slot in slots}
        ram = Rig(Echo()).ram
        memory = GuestMemory([(RAM_BASE, ram)])
        lines: dict[int, object] = {}

        class Line:
            def __init__(self, spi: int) -> None:
                lines[spi] = self

            def set(self, level: bool) -> None:
                pass

        bus = VirtioBus(backends, memory, Line, Faults(), protected=True)
        assert sorted(lines) == [16 + slot for slot in slots]
        return bus, backends

    def test_windows_stand_eight_to_a_page(self) -> None:
        bus, _ = self.bus(0, 1, 7, 8, 31)
        assert sorted(bus.pages) == [0xA000, 0xA001, 0xA003]
        for slot in range(32):
            address = board.virtio_base(slot)
            page = bus.pages.get(address >> 12)
            if page is None:
                assert slot not in bus.devices
                continue
            present = page.read(address & 0xFFF, 4) == mmio.MAGIC
            assert present == (slot in (0, 1, 7, 8, 31))
            page.write((address & 0xFFF) + mmio.STATUS, 4, 1)
            assert page.read((address & 0xFFF) + mmio.STATUS, 4) == int(present)

    def test_all_are_reset_and_closed(self) -> None:
        bus, backends = self.bus(2, 3)
        bus.halt()
        bus.reset()
        bus.close()
        assert [each.log for each in backends.values()] == [["reset", "close"]] * 2


class TestReport:
    def test_like_faults_are_one_line(self) -> None:
        new: list[Fault] = []
        faults = Faults(new.append)
        for address in (0x1000, 0x2000):
            faults.add(Fault("blk", "requests", address, "broke", "mend it"))
        faults.add(Fault("blk", "", None, "broke", ""))
        assert faults.lines() == [
            "blk, queue requests at 0x1000: broke: mend it (2 times)",
            "blk: broke",
        ]
        assert len(new) == 2

    def test_a_guest_cannot_fill_it(self) -> None:
        faults = Faults()
        for n in range(MAX_FAULTS + 5):
            faults.add(Fault("blk", "", None, f"broke {n}", ""))
        assert len(faults.counts()) == MAX_FAULTS
        assert faults.lines()[-1] == "5 more faults of devices are not listed"


def test_descriptors_of_a_device_window_are_refused(rig: EchoRig) -> None:
    driver = Driver(rig)
    driver.queues[0].describe(0, Descriptor(board.VIRTIO_BASE, 4, WRITE))
    driver.queues[0].make_available(0)
    driver.notify()
    assert rig.report() == ""  # an echo of nothing needs no memory
    driver.queues[0].describe(1, Descriptor(board.VIRTIO_BASE, 4))
    driver.queues[0].make_available(1)
    driver.notify()
    assert rig.needs_reset
    assert f"at {board.VIRTIO_BASE:#x}: that is not memory of the guest's" in rig.report()
