# SPDX-License-Identifier: GPL-2.0-or-later
"""The ownership self-test that EL2 runs on itself at boot in a debug kernel (facts §11.1).

One page, two guest frames at half the IPA space, all views asserted and all
invariants checked after each call.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fakes.memory_rig import HANDLE, Rig, RigVm
from pkvm.hyp.abi import PROT_RWX
from pkvm.hyp.errors import Errno, Refused
from pkvm.hyp.memory_policy import UPSTREAM_MEMORY

GFN = 1 << 27


class SelfTest:
    """The page, its guests, and what is expected of it."""

    def __init__(self) -> None:
        self.rig = Rig(policy=UPSTREAM_MEMORY)
        self.mem = self.rig.mem
        self.guest: RigVm = self.rig.vm(HANDLE)
        self.pfn = self.rig.first_pfn + 33
        self.expected = ("OWNED", "NOPAGE", "NOPAGE", "NOPAGE")
        self.calls: dict[str, Callable[[], object]] = {
            "donate_hyp": lambda: self.mem.host_donate_hyp(self.pfn, 1),
            "return_hyp": lambda: self.mem.hyp_donate_host(self.pfn, 1),
            "share_hyp": lambda: self.mem.host_share_hyp(self.pfn),
            "unshare_hyp": lambda: self.mem.host_unshare_hyp(self.pfn),
            "share_ffa": lambda: self.mem.host_share_ffa(self.pfn, 1),
            "unshare_ffa": lambda: self.mem.host_unshare_ffa(self.pfn, 1),
            "pin": lambda: self.mem.pin_shared(self.pfn << 12),
            "unpin": lambda: self.mem.unpin_shared(self.pfn << 12),
            "donate": lambda: self.mem.host_donate_guest(self.guest, self.pfn, GFN, 1),
            "donate+1": lambda: self.mem.host_donate_guest(self.guest, self.pfn, GFN + 1, 1),
            "share": lambda: self.mem.host_share_guest(self.guest, self.pfn, GFN, 1, PROT_RWX),
            "share+1": lambda: self.mem.host_share_guest(
                self.guest, self.pfn, GFN + 1, 1, PROT_RWX
            ),
            "unshare": lambda: self.mem.host_unshare_guest(self.guest, GFN, 1),
            "unshare+1": lambda: self.mem.host_unshare_guest(self.guest, GFN + 1, 1),
            "guest_share": lambda: self.mem.guest_share_host(self.guest, GFN << 12, 1),
            "guest_unshare": lambda: self.mem.guest_unshare_host(self.guest, GFN << 12, 1),
            "force_reclaim": lambda: self.mem.host_force_reclaim_page_guest(
                self.pfn << 12, self.rig.find_vm
            ),
            "reclaim+1": lambda: self.mem.reclaim_dying_guest_page(self.guest, GFN + 1),
        }

    def assert_views(self) -> None:
        actual = (
            *self.rig.state(self.pfn),
            self.rig.guest_state(self.guest, GFN),
            self.rig.guest_state(self.guest, GFN + 1),
        )
        assert actual == self.expected
        self.rig.sound()

    def does(self, call: str, *expected: str) -> None:
        self.calls[call]()
        if expected:
            assert len(expected) == 4
            self.expected = (expected[0], expected[1], expected[2], expected[3])
        self.assert_views()

    def refuses(self, errno: Errno, *calls: str) -> None:
        for call in calls:
            with pytest.raises(Refused) as refusal:
                self.calls[call]()
            assert refusal.value.errno == errno, call
            self.assert_views()


def test_the_sequence() -> None:
    t = SelfTest()
    t.assert_views()
    t.does("donate_hyp", "NOPAGE", "OWNED", "NOPAGE", "NOPAGE")
    t.refuses(
        Errno.EPERM, "donate_hyp", "share_hyp", "unshare_hyp", "share_ffa", "unshare_ffa", "pin",
        "share", "donate",
    )  # fmt: skip
    t.refuses(Errno.ENOENT, "unshare")

    t.does("return_hyp", "OWNED", "NOPAGE", "NOPAGE", "NOPAGE")
    t.refuses(Errno.EPERM, "return_hyp", "unshare_hyp", "unshare_ffa", "pin")
    t.refuses(Errno.ENOENT, "unshare")

    t.does("share_hyp", "SHARED_OWNED", "SHARED_BORROWED", "NOPAGE", "NOPAGE")
    no: tuple[str, ...] = (
        "share_hyp", "donate_hyp", "share_ffa", "return_hyp", "share", "donate",
    )  # fmt: skip
    t.refuses(Errno.EPERM, *no)
    t.refuses(Errno.ENOENT, "unshare")

    t.does("pin")
    t.does("pin")
    t.does("unpin")
    assert t.mem.vmemmap.refcount[33] == 1
    t.refuses(Errno.EBUSY, "unshare_hyp")
    t.refuses(Errno.EPERM, *no)
    t.refuses(Errno.ENOENT, "unshare")
    t.does("unpin")
    assert t.mem.vmemmap.refcount[33] == 0
    t.does("unshare_hyp", "OWNED", "NOPAGE", "NOPAGE", "NOPAGE")

    t.rig.secure.add(t.pfn)
    t.does("share_ffa", "SHARED_OWNED", "NOPAGE", "NOPAGE", "NOPAGE")
    t.refuses(
        Errno.EPERM, "share_ffa", "donate_hyp", "share_hyp", "unshare_hyp", "return_hyp", "share",
        "donate", "pin",
    )  # fmt: skip
    t.refuses(Errno.ENOENT, "unshare")
    t.rig.secure.clear()
    t.does("unshare_ffa", "OWNED", "NOPAGE", "NOPAGE", "NOPAGE")
    t.refuses(Errno.EPERM, "unshare_ffa")

    t.does("share", "SHARED_OWNED", "NOPAGE", "SHARED_BORROWED", "NOPAGE")
    t.refuses(
        Errno.EPERM, "share", "share_ffa", "unshare_ffa", "donate_hyp", "share_hyp",
        "unshare_hyp", "return_hyp", "donate", "pin",
    )  # fmt: skip
    t.does("share+1", "SHARED_OWNED", "NOPAGE", "SHARED_BORROWED", "SHARED_BORROWED")
    assert t.mem.vmemmap.share_count[33] == 2
    t.does("unshare", "SHARED_OWNED", "NOPAGE", "NOPAGE", "SHARED_BORROWED")
    t.does("unshare+1", "OWNED", "NOPAGE", "NOPAGE", "NOPAGE")

    t.does("donate", "NOPAGE", "NOPAGE", "OWNED", "NOPAGE")
    no = (
        "donate", "donate+1", "share", "share+1", "share_ffa", "donate_hyp", "share_hyp",
        "unshare_hyp", "return_hyp",
    )  # fmt: skip
    t.refuses(Errno.EPERM, *no)

    t.does("guest_share", "SHARED_BORROWED", "NOPAGE", "SHARED_OWNED", "NOPAGE")
    t.refuses(Errno.EPERM, "guest_share", *no)
    t.refuses(Errno.EAGAIN, "force_reclaim")
    t.does("guest_unshare", "NOPAGE", "NOPAGE", "OWNED", "NOPAGE")
    t.refuses(Errno.EPERM, "guest_unshare", *no)

    t.does("force_reclaim", "OWNED", "NOPAGE", "POISON", "NOPAGE")
    t.refuses(Errno.EPERM, "donate", "share")
    t.refuses(Errno.EHWPOISON, "guest_share", "guest_unshare")
    t.does("donate+1", "NOPAGE", "NOPAGE", "POISON", "OWNED")
    t.does("reclaim+1", "OWNED", "NOPAGE", "POISON", "NOPAGE")
    t.refuses(Errno.EPERM, "donate", "share")
    t.does("donate_hyp", "NOPAGE", "OWNED", "POISON", "NOPAGE")
