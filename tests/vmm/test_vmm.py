# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM from its images to its end, on a scripted kernel."""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest

from fakes.fake_kernel import (
    Block,
    Fail,
    FakeKernel,
    FakeVm,
    Guest,
    Load,
    Stop,
    Store,
    just,
    power_off,
)
from fakes.guests import GREETING, SHARED_IPA, SharingGuest, announce, say
from pkvm.kvm import Kvm
from pkvm.uapi import kvm as uapi
from pkvm.vmm.board import IMAGE_BASE, RAM_BASE, UART_BASE, Board
from pkvm.vmm.errors import LoadError
from pkvm.vmm.loader import Image, Segment, load_image
from pkvm.vmm.vmm import Moment, Outcome, Vmm

BOARD = Board(ram_bytes=8 << 20)
IMAGE = load_image(b"\x1f\x20\x03\xd5" * 4, BOARD)
FIRMWARE = b"firmware" * 16


class Console:
    def __init__(self) -> None:
        self.bytes = b""

    def __call__(self, data: bytes) -> None:
        self.bytes += data


def vmm_on(kernel: FakeKernel, board: Board = BOARD, **options: Any) -> Vmm:
    options.setdefault("console", Console())
    return Vmm(Kvm(kernel), board, IMAGE, **options)


def run(guest: Callable[[int], Guest], timeout: float | None = 20, **options: Any) -> Outcome:
    with vmm_on(FakeKernel(guest), **options) as vmm:
        return vmm.run(timeout)


def slots(kernel: FakeKernel) -> dict[int, tuple[int, ...]]:
    (vm,) = [owner for owner in kernel.fds.values() if isinstance(owner, FakeVm)]
    return vm.slots


def registers(kernel: FakeKernel, vcpu: int = 0) -> dict[int, int]:
    return kernel.vcpus[vcpu].registers


def test_a_protected_vm_is_loaded_then_protected_and_given_x0_only() -> None:
    kernel = FakeKernel()
    with vmm_on(kernel) as vmm:
        ram = kernel.at(slots(kernel)[0][3])[0]
        firmware = kernel.at(slots(kernel)[1][3])[0]
        assert [slot[1:3] for slot in slots(kernel).values()] == [
            (RAM_BASE, 8 << 20),
            (0, 2 << 20),
        ]
        assert ram.bytes[:4] == b"\xd0\x0d\xfe\xed"
        assert ram.bytes[2 << 20 : (2 << 20) + 16] == b"\x1f\x20\x03\xd5" * 4
        assert not any(firmware.bytes)
        assert ram.protected
        assert firmware.protected
        assert registers(kernel) == {uapi.reg_x(0): RAM_BASE}
        assert vmm.firmware_bytes == kernel.firmware_size
        sent = [v for name, v in kernel.log if name == "ENABLE_CAP" and isinstance(v, bytes)]
        assert uapi.ENABLE_CAP.unpack(sent[-1])[:3] == (199, 0, 1)


def test_an_unprotected_vm_starts_in_the_same_firmware_in_the_same_state() -> None:
    kernel = FakeKernel()
    with vmm_on(kernel, protected=False, firmware=FIRMWARE):
        firmware = kernel.at(slots(kernel)[1][3])[0]
        assert firmware.bytes[: len(FIRMWARE)] == FIRMWARE
        assert not firmware.protected
        assert registers(kernel) == {
            uapi.reg_x(0): RAM_BASE,
            uapi.REG_PC: 0,
            uapi.REG_SP_EL1: 2 << 20,
        }


def test_without_firmware_an_unprotected_vm_starts_in_the_image() -> None:
    kernel = FakeKernel()
    with vmm_on(kernel, protected=False):
        assert list(slots(kernel)) == [0]
        assert registers(kernel) == {uapi.reg_x(0): RAM_BASE, uapi.REG_PC: IMAGE_BASE}


def test_a_protected_vm_needs_the_hosts_firmware() -> None:
    kernel = FakeKernel(firmware_size=0)
    with pytest.raises(LoadError, match="no guest firmware"):
        vmm_on(kernel)
    assert list(kernel.fds.values()) == ["/dev/kvm"]
    assert all(memory.closed for memory in kernel.memories)
    with pytest.raises(LoadError, match="the firmware has 2097153 bytes"):
        vmm_on(FakeKernel(firmware_size=(2 << 20) + 1))


def test_segments_go_to_their_addresses() -> None:
    image = Image(
        (Segment(IMAGE_BASE, b"one", 3), Segment(IMAGE_BASE + 0x5000, b"two", 0x2000)), IMAGE_BASE
    )
    kernel = FakeKernel()
    with Vmm(Kvm(kernel), BOARD, image, console=Console(), protected=False):
        ram = kernel.at(slots(kernel)[0][3])[0]
        assert ram.bytes[0x20_0000:0x20_0003] == b"one"
        assert ram.bytes[0x20_5000:0x20_5003] == b"two"


def test_close_gives_everything_back() -> None:
    kernel = FakeKernel()
    vmm = vmm_on(kernel, Board(ram_bytes=8 << 20, cpus=3))
    vmm.run(20)
    vmm.close()
    vmm.close()
    assert list(kernel.fds.values()) == ["/dev/kvm"]
    assert all(memory.closed for memory in kernel.memories)


def test_the_console_appears_before_the_guest_ends() -> None:
    console = Console()
    seen: list[bytes] = []

    def guest(_: int) -> Guest:
        yield from say("hi")
        seen.append(console.bytes)
        yield power_off()

    assert run(guest, console=console).kind == "powered-off"
    assert seen == [b"hi"]


def test_input_reaches_the_guest() -> None:
    got = []

    def guest(_: int) -> Guest:
        got.append((yield Load(UART_BASE, 1)))
        got.append((yield Load(UART_BASE, 1)))
        yield power_off()

    inputs = [b"x"]
    run(guest, source=lambda _: inputs.pop() if inputs else b"")
    assert got == [ord("x"), 0]


def test_an_address_without_a_device_reads_as_zero() -> None:
    got = []

    def guest(_: int) -> Guest:
        got.append((yield Load(0x0800_0000, 8)))
        yield Store(0x0800_0000, 1, 8)
        yield power_off()

    with vmm_on(FakeKernel(guest)) as vmm:
        assert vmm.run(20).kind == "powered-off"
        assert vmm.stray_accesses == 2
    assert got == [0]


EVENT = uapi.Run.SYSTEM_EVENT


@pytest.mark.parametrize(
    ("step", "kind", "words"),
    [
        (power_off(), "powered-off", "SYSTEM_OFF"),
        (Stop(24, EVENT.pack(2, 0, *[0] * 16)), "reset", "SYSTEM_RESET"),
        (Stop(24, EVENT.pack(3, 0, *[0] * 16)), "crashed", "crashed"),
        (Stop(24, EVENT.pack(5, 0, *[0] * 16)), "suspended", "SYSTEM_SUSPEND"),
        (Stop(24, EVENT.pack(9, 0, *[0] * 16)), "unknown-exit", "system event 9"),
        (Stop(9, uapi.Run.FAIL_ENTRY.pack(1, 0)), "fail-entry", "AArch32"),
        (Fail(errno.EINVAL, 9), "fail-entry", "vCPU 0 cannot enter"),
        (Stop(17, uapi.Run.INTERNAL_ERROR.pack(1, 0)), "internal-error", "cannot go on"),
        (Stop(28), "unknown-exit", "exit reason 28"),
        (Fail(errno.EFAULT), "kernel-error", "KVM_RUN of vCPU 0: .*Bad address"),
        (Fail(errno.ENOEXEC), "kernel-error", "Exec format"),
    ],
)
def test_every_end_has_a_name_and_words(step: Stop | Fail, kind: str, words: str) -> None:
    with vmm_on(FakeKernel(lambda _: just(step))) as vmm:
        outcome = vmm.run(20)
    assert outcome.kind == kind
    assert re.search(words, outcome.detail)


def test_a_guest_that_never_ends_is_stopped_at_the_time_limit() -> None:
    outcome = run(lambda _: just(Block()), timeout=0.01)
    assert outcome == Outcome("timeout", "the guest still ran after 0.01 seconds")


def test_a_guest_that_exits_for_ever_is_stopped_too() -> None:
    def guest(_: int) -> Guest:
        while True:
            yield Load(0x0800_0000)

    assert run(guest, timeout=0.05).kind == "timeout"


def test_stop_from_another_thread() -> None:
    entered = threading.Event()

    def guest(_: int) -> Guest:
        entered.set()
        yield Block()

    def stop() -> None:
        entered.wait(20)
        vmm.stop()

    with vmm_on(FakeKernel(guest)) as vmm:
        stopper = threading.Thread(target=stop)
        stopper.start()
        assert vmm.run(20) == Outcome("stopped", "the VMM stopped the guest")
        stopper.join()


def test_secondaries_are_powered_off_and_have_a_thread_each() -> None:
    order: list[str] = []
    first = threading.Event()

    def guest(vcpu: int) -> Guest:
        order.append(threading.current_thread().name)
        if vcpu == 0:
            first.wait(20)
            yield power_off()
        if vcpu == 2:
            first.set()
        yield Block()

    kernel = FakeKernel(guest)
    with vmm_on(kernel, Board(ram_bytes=8 << 20, cpus=3)) as vmm:
        assert vmm.run(20).kind == "powered-off"
        assert [vcpu.init[1] & 1 for vcpu in kernel.vcpus] == [0, 1, 1]
        assert registers(kernel, 1) == {}
    assert sorted(order)[0] == "vcpu0"
    assert "vcpu2" in order
    assert not [t for t in threading.enumerate() if t.name.startswith("vcpu")]


def test_what_a_device_raises_comes_out_of_run() -> None:
    def broken(data: bytes) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with (
        vmm_on(FakeKernel(lambda _: say("x")), console=broken) as vmm,
        pytest.raises(BrokenPipeError),
    ):
        vmm.run(20)
    assert not [t for t in threading.enumerate() if t.name.startswith("vcpu")]


def test_the_moments_are_seen_in_order_while_the_vm_lives() -> None:
    guest = SharingGuest()
    moments: list[tuple[Moment, list[int]]] = []

    def observe(moment: Moment) -> None:
        moments.append((moment, list(vmm.sharing.ranges)))
        assert any(isinstance(owner, FakeVm) for owner in guest.kernel.fds.values())

    with vmm_on(guest.kernel, observe=observe) as vmm:
        assert vmm.run(20).kind == "powered-off"
        assert vmm.sharing.notes == []
    assert moments == [(Moment.SHARED, [SHARED_IPA]), (Moment.UNSHARED, []), (Moment.END, [])]
    expected = f"the VMM read {len(GREETING) - 1} bytes and greets the guest"
    assert guest.reply.decode() == expected


@pytest.mark.parametrize(
    ("lie", "note"),
    [
        ({"ipa": SHARED_IPA + 8}, "not pages of its RAM"),
        ({"ipa": 0}, "not pages of its RAM"),
        ({"ipa": 2**64 - 4096}, "not pages of its RAM"),
        ({"length": 0}, "not pages of its RAM"),
        ({"length": 2**64 - 1}, "not pages of its RAM"),
        ({"crc": 1}, "does not have the CRC"),
        ({"share": 0}, "cannot use"),
        ({"length": 8192}, "cannot use"),
    ],
)
def test_a_guest_that_lies_about_sharing_gets_a_note(lie: dict[str, int], note: str) -> None:
    guest = SharingGuest()
    guest.lie = lie
    with vmm_on(guest.kernel) as vmm:
        assert vmm.run(20).kind == "powered-off"
        assert note in vmm.sharing.notes[0]


def test_notes_of_a_noisy_guest_are_bounded() -> None:
    def guest(_: int) -> Guest:
        for n in range(100):
            yield from announce(2, n)
        yield power_off()

    with vmm_on(FakeKernel(guest)) as vmm:
        vmm.run(20)
        assert len(vmm.sharing.notes) == 16
