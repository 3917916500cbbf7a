# SPDX-License-Identifier: GPL-2.0-or-later
"""The virtio-mmio transport, version 2 (section 4.2): a device's window of registers.

No access fails: what is not a register, or not an aligned 32-bit access to one,
reads as zero and is not written. In the configuration space (from 0x100) any
size and alignment goes.

A driver that breaks a rule, or a queue or buffer that the VMM cannot reach, is
a line in the report, and the device asks for a reset (DEVICE_NEEDS_RESET,
section 2.1.1): until it comes the device touches no guest memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pkvm.vmm.faults import Fault, Faults
from pkvm.vmm.guest_memory import SHARE_IT, GuestMemory, GuestMemoryError, PrivatePageError
from pkvm.vmm.irq import Line
from pkvm.vmm.virtio.device import VirtioDevice
from pkvm.vmm.virtio.queue import Queue, QueueError

MAGIC = int.from_bytes(b"virt", "little")
VERSION = 2
VENDOR_ID = int.from_bytes(b"PKVM", "little")

(
    MAGIC_VALUE, VERSION_REG, DEVICE_ID, VENDOR, DEVICE_FEATURES, DEVICE_FEATURES_SEL,
    DRIVER_FEATURES, DRIVER_FEATURES_SEL, QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_READY,
    QUEUE_NOTIFY, INTERRUPT_STATUS, INTERRUPT_ACK, STATUS, QUEUE_DESC_LOW, QUEUE_DESC_HIGH,
    QUEUE_DRIVER_LOW, QUEUE_DRIVER_HIGH, QUEUE_DEVICE_LOW, QUEUE_DEVICE_HIGH, SHM_LEN_LOW,
    SHM_LEN_HIGH, SHM_BASE_LOW, SHM_BASE_HIGH, CONFIG_GENERATION, CONFIG,
) = (
    0x000, 0x004, 0x008, 0x00C, 0x010, 0x014,
    0x020, 0x024, 0x030, 0x034, 0x038, 0x044,
    0x050, 0x060, 0x064, 0x070, 0x080, 0x084,
    0x090, 0x094, 0x0A0, 0x0A4, 0x0B0,
    0x0B4, 0x0B8, 0x0BC, 0x0FC, 0x100,
)  # fmt: skip

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 0x40, 0x80
INTERRUPT_USED, INTERRUPT_CONFIG = 1, 2

F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32
F_ACCESS_PLATFORM = 1 << 33
TRANSPORT_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1 | F_ACCESS_PLATFORM

WINDOW_BYTES = 0x200
_WORD = 0xFFFF_FFFF
_ADDRESSES = {
    QUEUE_DESC_LOW: ("descriptors", 0), QUEUE_DESC_HIGH: ("descriptors", 32),
    QUEUE_DRIVER_LOW: ("driver_ring", 0), QUEUE_DRIVER_HIGH: ("driver_ring", 32),
    QUEUE_DEVICE_LOW: ("device_ring", 0), QUEUE_DEVICE_HIGH: ("device_ring", 32),
}  # fmt: skip
"""Queue address registers: the attribute of `Queue`, and where their 32 bits go in it."""


class MmioDevice:
    """`backend` behind its registers: a `Device` of the VMM's, and the backend's `Port`.

    `protected`: the guest's memory is its own, so that a driver must follow the platform's rules
    about what a device can reach (ACCESS_PLATFORM) to be of any use. `pool` is the IPA of the
    memory that the guest was given to share with its devices, if it was given some: a guest that
    has not shared it cannot, and its driver had better fail at once than wait for ever.
    """

    def __init__(
        self,
        backend: VirtioDevice,
        slot: int,
        line: Line,
        memory: GuestMemory,
        faults: Faults,
        *,
        protected: bool,
        pool: int | None = None,
    ) -> None:
        self.backend = backend
        self.name = f"{backend.name} (slot {slot})"
        self.lock = threading.RLock()
        self.memory = memory
        self._line = line
        self._faults = faults
        self._protected = protected
        self._pool = pool
        self._offered = backend.device_features | TRANSPORT_FEATURES
        self._queues = tuple(
            Queue(memory, index, name, backend.queue_size)
            for index, name in enumerate(backend.queue_names)
        )
        self._generation = 0
        self._depth = 0
        self._clear()
        backend.attach(self)

    # What the device behind it sees

    @property
    def queues(self) -> tuple[Queue, ...]:
        """The device's queues, by index."""
        return self._queues

    @property
    def features(self) -> int:
        """Feature bits agreed on; 0 before FEATURES_OK."""
        return self._driver_features if self._status & FEATURES_OK else 0

    @property
    def live(self) -> bool:
        """Whether the driver set DRIVER_OK and nothing has broken since."""
        return self._status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK

    @contextmanager
    def serving(self, queue: int) -> Iterator[Queue]:
        """Hold the lock and use `queue`; see `Port.serving`."""
        with self.lock:
            self._depth += 1
            try:
                yield self._queues[queue]
            except (QueueError, GuestMemoryError, OSError) as error:
                self._break(error, self._queues[queue])
            finally:
                self._depth -= 1
                if not self._depth:
                    self._publish()

    def config_changed(self) -> None:
        """Tell the driver that the configuration is another. Lock held."""
        self._generation += 1
        if self.live:
            self._interrupt(INTERRUPT_CONFIG)

    def fault(
        self, what: str, advice: str = "", *, queue: int | None = None, address: int | None = None
    ) -> None:
        """A line for the report."""
        name = self._queues[queue].name if queue is not None else ""
        self._faults.add(Fault(self.name, name, address, what, advice))

    # What the guest sees

    def read(self, offset: int, size: int) -> int:
        """A load of `size` bytes at `offset` of the window."""
        with self.lock:
            if offset >= CONFIG:
                at = offset - CONFIG
                return int.from_bytes(self.backend.read_config()[at : at + size], "little")
            if size != 4 or offset & 3:
                return 0
            return self._register(offset)

    def write(self, offset: int, size: int, value: int) -> None:
        """A store of the low `size` bytes of `value` at `offset` of the window."""
        with self.lock:
            if offset == QUEUE_NOTIFY and size == 4:
                self._notify(value)
            elif offset >= CONFIG:
                self._write_config(offset - CONFIG, value & (1 << 8 * size) - 1, size)
            elif size == 4 and not offset & 3:
                self._write_register(offset, value & _WORD)

    def reset(self) -> None:
        """A device reset (section 2.4), as by the driver: also when the VM starts anew."""
        with self.lock:
            self._clear()
            self._line.set(False)
            self.backend.reset()

    def halt(self) -> None:
        """The run ends: nothing more is popped, so that a request queue that the guest keeps
        filling holds no thread. Without the lock, which such a thread holds."""
        for queue in self._queues:
            queue.live = False

    def close(self) -> None:
        """The VM ends. Idempotent."""
        self.backend.close()

    def _clear(self) -> None:
        self._status = 0
        self._interrupt_status = 0
        self._driver_features = 0
        self._device_features_sel = 0
        self._driver_features_sel = 0
        self._queue_sel = 0
        for queue in self._queues:
            queue.reset()

    def _register(self, offset: int) -> int:
        if offset == INTERRUPT_STATUS:
            return self._interrupt_status
        if offset == STATUS:
            return self._status
        if offset == DEVICE_FEATURES:
            return self._offered >> 32 * self._device_features_sel & _WORD
        if offset == CONFIG_GENERATION:
            return self._generation & _WORD
        if offset in (QUEUE_NUM_MAX, QUEUE_READY):
            queue = self._selected
            if queue is None:
                return 0
            return queue.max_size if offset == QUEUE_NUM_MAX else int(queue.ready)
        if SHM_LEN_LOW <= offset <= SHM_BASE_HIGH:
            # No shared memory region exists (section 4.2.2.1).
            return _WORD
        return {
            MAGIC_VALUE: MAGIC,
            VERSION_REG: VERSION,
            DEVICE_ID: self.backend.device_id,
            VENDOR: VENDOR_ID,
        }.get(offset, 0)

    def _write_register(self, offset: int, value: int) -> None:
        if offset == INTERRUPT_ACK:
            self._interrupt_status &= ~value
            self._line.set(bool(self._interrupt_status))
        elif offset == STATUS:
            self._write_status(value)
        elif offset == DEVICE_FEATURES_SEL:
            self._device_features_sel = min(value, 2)
        elif offset == DRIVER_FEATURES_SEL:
            self._driver_features_sel = min(value, 2)
        elif offset == DRIVER_FEATURES:
            self._write_features(value)
        elif offset == QUEUE_SEL:
            self._queue_sel = value
        else:
            self._write_queue(offset, value)

    @property
    def _selected(self) -> Queue | None:
        return self._queues[self._queue_sel] if self._queue_sel < len(self._queues) else None

    def _write_features(self, value: int) -> None:
        if self._status & FEATURES_OK:
            return
        shift = 32 * self._driver_features_sel
        # Bits 64 and up are not offered; kept so that accepting one is found.
        kept = self._driver_features & ~(_WORD << shift)
        self._driver_features = kept | value << shift

    def _write_status(self, value: int) -> None:
        if not value:
            self.reset()
            return
        new = value & ~self._status & (ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED)
        if new & FEATURES_OK and not self._features_fit():
            new &= ~FEATURES_OK
        if new & DRIVER_OK and not (self._status | new) & FEATURES_OK:
            new &= ~DRIVER_OK
        self._status |= new
        if new & FAILED:
            self.fault("the driver gave the device up (FAILED)", "the guest's log says why")
        if new & (DRIVER_OK | FAILED):
            for queue in self._queues:
                queue.live = queue.ready and self.live
        if new & DRIVER_OK:
            if self.live:
                self.backend.start()
            elif self._status & NEEDS_RESET:
                self._interrupt(INTERRUPT_CONFIG)

    def _features_fit(self) -> bool:
        chosen = self._driver_features
        unknown = chosen & ~self._offered
        if unknown:
            self.fault(
                f"the driver accepted features that were not offered ({unknown:#x})",
                "FEATURES_OK stays clear",
            )
        elif not chosen & F_VERSION_1:
            self.fault(
                "the driver did not accept VIRTIO_F_VERSION_1",
                "the guest needs a driver for virtio 1.0 or later",
            )
        elif self._protected and not chosen & F_ACCESS_PLATFORM:
            self.fault(
                "the driver did not accept VIRTIO_F_ACCESS_PLATFORM, and without it puts its "
                "queues and buffers into private pages",
                SHARE_IT,
            )
        elif not self._pool_shared():
            self.fault(
                "the guest has not shared the pool that it was given for its devices "
                "(restricted-dma-pool), so no device can reach its memory",
                f"{SHARE_IT}; a kernel that cannot share works with the PL011 console and an "
                "initramfs",
                address=self._pool,
            )
        else:
            for queue in self._queues:
                queue.indirect = bool(chosen & F_INDIRECT_DESC)
                queue.event_idx = bool(chosen & F_EVENT_IDX)
            return True
        return False

    def _pool_shared(self) -> bool:
        if self._pool is None:
            return True
        try:
            self.memory.read(self._pool, 1)
        except PrivatePageError:
            return False
        return True

    def _write_queue(self, offset: int, value: int) -> None:
        queue = self._selected
        if queue is None:
            return
        if offset == QUEUE_READY:
            self._write_ready(queue, value)
        elif queue.ready:
            # Section 4.2.2.2: the driver changes nothing of a queue that is ready.
            return
        elif offset == QUEUE_NUM:
            queue.size = value
        elif offset in _ADDRESSES:
            name, shift = _ADDRESSES[offset]
            kept = getattr(queue, name) & ~(_WORD << shift)
            setattr(queue, name, kept | value << shift)

    def _write_ready(self, queue: Queue, value: int) -> None:
        if not value & 1:
            queue.stop()
        elif not queue.ready and not self._status & NEEDS_RESET:
            try:
                queue.check()
            except (QueueError, GuestMemoryError) as error:
                self._break(error, queue)
                return
            queue.ready = True
            queue.live = self.live

    def _write_config(self, offset: int, value: int, size: int) -> None:
        room = len(self.backend.read_config()) - offset
        if room > 0:
            self.backend.write_config(offset, value.to_bytes(size, "little")[:room])

    def _notify(self, value: int) -> None:
        index = value & _WORD
        if index >= len(self._queues):
            return
        queue = self._queues[index]
        if not queue.live:
            return
        with self.serving(index):
            self.backend.process(queue)

    def _publish(self) -> None:
        """Show the driver what was pushed, and interrupt it if it wants."""
        used = False
        for queue in self._queues:
            try:
                queue.publish()
                used |= queue.notify_needed()
            except (QueueError, GuestMemoryError) as error:
                self._break(error, queue)
        if used:
            self._interrupt(INTERRUPT_USED)

    def _interrupt(self, cause: int) -> None:
        self._interrupt_status |= cause
        self._line.set(True)

    def _break(self, error: Exception, queue: Queue) -> None:
        """Report what broke the device, and ask for a reset. What follows from it is not told."""
        if self._status & NEEDS_RESET:
            return
        if isinstance(error, GuestMemoryError):
            self.fault(error.why, error.advice, queue=queue.index, address=error.ipa)
        elif isinstance(error, QueueError):
            self.fault(
                str(error),
                "the driver breaks the rules of virtio; the device waits for its reset",
                queue=queue.index,
                address=error.address,
            )
        else:
            self.fault(f"the device failed: {error}", "it waits for a reset", queue=queue.index)
        self._status |= NEEDS_RESET
        for each in self._queues:
            each.live = False
        if self._status & DRIVER_OK:
            self._interrupt(INTERRUPT_CONFIG)
