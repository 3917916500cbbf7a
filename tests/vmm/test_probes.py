# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's attempts: all refused on private pages, all allowed on shared ones, nothing harmed."""

from __future__ import annotations

import errno

import pytest

from fakes.fake_kernel import PAGE, Block, FakeKernel, FakeMemory, Guest, just
from fakes.guests import SHARED_IPA, SharingGuest
from pkvm.kvm import Kvm
from pkvm.vmm.board import IMAGE_BASE, RAM_BASE, Board
from pkvm.vmm.loader import Image, load_image
from pkvm.vmm.probes import KINDS, SAMPLE_PAGES, SEGMENT_PAGES, Probes
from pkvm.vmm.vmm import Moment, Vmm

BOARD = Board(ram_bytes=8 << 20)
IMAGE = load_image(b"\x1f\x20\x03\xd5" * 3000, BOARD)
MUST_PAGES = 1 + 3 + 2
"""The device tree, 12000 bytes of image, 8192 bytes of firmware."""


def run(
    probes: Probes, guest: SharingGuest, *, protected: bool = True, image: Image = IMAGE
) -> Vmm:
    firmware = None if protected else b"firmware" * 1024

    def observe(moment: Moment) -> None:
        probes.attempt(vmm, moment)

    with Vmm(
        Kvm(guest.kernel),
        BOARD,
        image,
        protected=protected,
        firmware=firmware,
        console=lambda _: None,
        observe=observe,
    ) as vmm:
        assert vmm.run(20).kind == "powered-off"
    return vmm


def test_on_a_protected_vm_every_attempt_on_private_pages_is_refused() -> None:
    probes, guest = Probes(), SharingGuest()
    run(probes, guest)
    assert probes.moments == ["shared", "unshared", "end"]
    assert probes.tried == probes.refused
    assert probes.got_through == []
    assert probes.shared_trouble == []
    assert probes.not_tried == ""
    private_pages = probes.pages - 1
    assert 2 * MUST_PAGES < private_pages <= 2 * (MUST_PAGES + SAMPLE_PAGES) + 1
    for kind in KINDS:
        assert probes.private[kind].tried == private_pages
        assert probes.private[kind].words
        assert (probes.shared[kind].tried, probes.shared[kind].refused) == (1, 0)
    assert "MEM_SHARE" in probes.private["load"].words


def test_on_an_unprotected_vm_they_succeed_and_nothing_is_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probes, guest = Probes(), SharingGuest()
    before: list[bytes] = []
    attempt = probes.attempt

    def compare(vmm: Vmm, moment: Moment) -> None:
        before.append(bytes(guest.kernel.memories[0].bytes))
        attempt(vmm, moment)
        assert guest.kernel.memories[0].bytes == before[-1]

    monkeypatch.setattr(probes, "attempt", compare)
    run(probes, guest, protected=False)
    assert probes.tried > 0
    assert probes.refused == 0
    assert len(probes.got_through) == 8
    assert probes.got_through[0].startswith("IPA 0x400")
    assert probes.shared_trouble == []


def test_the_same_seed_tries_the_same_pages() -> None:
    def tried(seed: int) -> list[str]:
        probes, guest = Probes(seed=seed), SharingGuest()
        log: list[str] = []
        check = FakeMemory.check

        def logged(self: FakeMemory, offset: int, length: int, access: str) -> None:
            if self.protected:
                log.append(f"{access} {self.length:#x} {offset:#x}")
            check(self, offset, length, access)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeMemory, "check", logged)
            run(probes, guest)
        return log

    assert tried(1) == tried(1)
    assert tried(1) != tried(2)


def test_everything_is_every_page_of_every_slot() -> None:
    probes = Probes(everything=True)
    run(probes, SharingGuest())
    assert probes.pages == 2 * ((8 << 20) + (2 << 20)) // PAGE + 1
    assert probes.tried == probes.refused == 6 * (probes.pages - 1)


def test_of_a_long_segment_some_pages_are_drawn() -> None:
    segment = IMAGE.segments[0]._replace(memory_bytes=4 << 20)
    probes = Probes()
    run(probes, SharingGuest(), image=IMAGE._replace(segments=(segment,)))
    most = MUST_PAGES + SEGMENT_PAGES + SAMPLE_PAGES
    assert 2 * SEGMENT_PAGES < probes.pages <= 2 * most + 1
    assert probes.tried == probes.refused


def test_without_a_copy_engine_dma_is_not_tried_and_said_so() -> None:
    guest = SharingGuest()
    guest.kernel = FakeKernel(guest.program, dma=False)
    probes = Probes()
    run(probes, guest)
    assert "no copy engine" in probes.not_tried
    assert probes.private["dma_read"].tried == probes.private["dma_write"].tried == 0
    assert probes.tried == probes.refused > 0


def test_memory_that_was_taken_back_is_private_again() -> None:
    guest = SharingGuest()
    probes = Probes()

    def observe(moment: Moment) -> None:
        if moment is Moment.UNSHARED:
            guest.kernel.memories[0].shared.add(SHARED_IPA - RAM_BASE)  # the host kept it
            probes.attempt(vmm, moment)

    with Vmm(Kvm(guest.kernel), BOARD, IMAGE, console=lambda _: None, observe=observe) as vmm:
        vmm.run(20)
    assert (probes.pages, probes.tried, probes.refused) == (1, 6, 0)
    assert probes.got_through[0].startswith(f"IPA {SHARED_IPA >> 12:#x}")


def test_what_is_shared_without_a_word_is_known_by_an_account_of_it() -> None:
    guest = SharingGuest()
    probes = Probes(account=lambda: {IMAGE_BASE})

    def observe(moment: Moment) -> None:
        guest.kernel.memories[0].shared.add(IMAGE_BASE - RAM_BASE)
        probes.attempt(vmm, moment)

    with Vmm(Kvm(guest.kernel), BOARD, IMAGE, console=lambda _: None, observe=observe) as vmm:
        vmm.run(20)
    assert probes.tried == probes.refused > 0
    assert not probes.shared_trouble
    assert probes.shared["load"].tried == 1 + 2  # announced once; at two moments by the account


def test_a_hole_is_found_and_named() -> None:
    guest = SharingGuest()
    probes = Probes()

    def observe(moment: Moment) -> None:
        guest.kernel.memories[0].shared.add(0x20_0000)
        probes.attempt(vmm, moment)

    with Vmm(Kvm(guest.kernel), BOARD, IMAGE, console=lambda _: None, observe=observe) as vmm:
        vmm.run(20)
    assert probes.tried - probes.refused == 2 * len(KINDS)
    assert all("IPA 0x40200" in line for line in probes.got_through)
    assert {line.partition(": ")[2] for line in probes.got_through[:6]} == set(KINDS.values())


def test_shared_memory_that_the_host_cannot_use_is_trouble() -> None:
    guest = SharingGuest()
    guest.lie = {"share": 0}
    probes = Probes()
    run(probes, guest)
    assert probes.tried == probes.refused
    assert probes.shared["load"].refused == 1
    assert any(f"IPA {SHARED_IPA:#x}: load was refused" in line for line in probes.shared_trouble)


def test_shared_memory_with_other_content_is_trouble() -> None:
    guest = SharingGuest()
    guest.lie = {"crc": 12345}
    probes = Probes()
    run(probes, guest)
    assert [line.partition(": ")[2] for line in probes.shared_trouble] == [
        "load sees other content than the guest wrote",
        "system call reading the buffer sees other content than the guest wrote",
        "DMA from it sees other content than the guest wrote",
    ]


def test_a_page_that_was_not_shared_by_hypercall_is_private_in_a_protected_vm() -> None:
    guest = SharingGuest()
    guest.lie = {"by_hypercall": 0, "share": 0}
    probes = Probes()
    run(probes, guest)
    assert probes.tried == probes.refused
    assert probes.shared["load"].tried == 0


def test_an_error_that_is_no_refusal_is_not_counted_as_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest = SharingGuest()
    probes = Probes()

    def observe(moment: Moment) -> None:
        def broken(offset: int, length: int) -> bytes:
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(guest.kernel.memories[0], "syscall_read", broken)
        probes.attempt(vmm, moment)

    with (
        Vmm(Kvm(guest.kernel), BOARD, IMAGE, console=lambda _: None, observe=observe) as vmm,
        pytest.raises(OSError, match="not implemented"),
    ):
        vmm.run(20)


class TouchKernel(FakeKernel):
    """A host whose guests get memory at the first touch, and which gives no account of it."""

    def _check_extension(self, owner: object, arg: int) -> int:
        return 0


class TouchGuest(SharingGuest):
    """Touches `touched`, of its RAM; the host keeps the rest, and what `holes` names as well."""

    touched = range(IMAGE_BASE - RAM_BASE, IMAGE_BASE - RAM_BASE + 2 * PAGE, PAGE)

    def __init__(self, holes: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.kernel = TouchKernel(self.program)
        self.holes = holes

    def program(self, cpu: int) -> Guest:
        ram = self.kernel.memories[0]
        ram.protected = True
        ram.shared.update(range(0, ram.length, PAGE))
        ram.shared.difference_update({*self.touched, SHARED_IPA - RAM_BASE} - {*self.holes})
        ram.bytes[self.touched[1]] ^= 1
        yield from super().program(cpu)


def test_without_an_account_what_is_as_loaded_was_not_touched() -> None:
    probes, guest = Probes(everything=True), TouchGuest()
    run(probes, guest)
    assert probes.tried == probes.refused == len(KINDS) * (2 + 2 + 2)
    assert probes.shared["load"].tried == 1
    assert probes.untouched == probes.pages - 7
    assert not probes.got_through


@pytest.mark.parametrize("page", [0, 1])
def test_without_an_account_a_hole_is_found_all_the_same(page: int) -> None:
    """Where the guest started, whatever is there; elsewhere by what the guest changed."""
    probes, guest = Probes(), TouchGuest(holes=(TouchGuest.touched[page],))
    run(probes, guest)
    assert probes.tried - probes.refused == 2 * len(KINDS)
    assert all(f"IPA {(IMAGE_BASE >> 12) + page:#x}" in line for line in probes.got_through)


def test_without_an_account_the_bounce_pool_is_shared() -> None:
    board = Board(ram_bytes=8 << 20, bounce_bytes=1 << 20)
    pool = board.bounce_base - RAM_BASE
    probes, guest = Probes(everything=True), TouchGuest()

    def observe(moment: Moment) -> None:
        guest.kernel.memories[0].bytes[pool + 8] = 1
        guest.kernel.memories[0].shared.discard(pool + PAGE)  # taken back, say
        probes.attempt(vmm, moment)

    kvm = Kvm(guest.kernel)
    with Vmm(kvm, board, IMAGE, console=lambda _: None, observe=observe) as vmm:
        vmm.run(20)
    assert not probes.got_through
    assert probes.shared["load"].tried == 1 + 2 * 255
    assert probes.shared["load"].refused == 0


def test_without_an_account_a_guest_that_never_ran_has_touched_nothing() -> None:
    """Such as one whose time was up before."""
    guest = TouchGuest()
    guest.kernel = TouchKernel(lambda _: just(Block()))
    probes = Probes()

    def observe(moment: Moment) -> None:
        probes.attempt(vmm, moment)

    kvm = Kvm(guest.kernel)
    with Vmm(kvm, BOARD, IMAGE, console=lambda _: None, observe=observe) as vmm:
        assert vmm.run(0.01).kind == "timeout"
        assert not vmm.ran
    assert probes.tried == 0
    assert probes.untouched == probes.pages > 0
