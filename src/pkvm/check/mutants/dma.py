# SPDX-License-Identifier: GPL-2.0-or-later
"""EL2s without one guard against DMA: each opens a way to a page by a device."""

from __future__ import annotations

from contextlib import ExitStack
from unittest.mock import patch

from pkvm.arm64.smmu import BYPASS_STE, STE_WORDS
from pkvm.check.mutants.install import Install, replaced
from pkvm.hyp import host_dma
from pkvm.hyp.bulk import Runs
from pkvm.hyp.host_dma import HostDma
from pkvm.hyp.host_memory import HostMemory
from pkvm.hyp.identity_domain import IdentityDomain
from pkvm.hyp.smmu import STREAM_BITS, SmmuDriver
from pkvm.hyp.vmemmap import HOST_OWNED


def _keeps_pages(stack: ExitStack) -> None:
    """Devices keep what the host loses."""
    take_page = HostMemory.take_page

    def weak_page(self: HostMemory, pa: int, annotation: int) -> None:
        with patch.object(self, "_dma_walks", {}):
            take_page(self, pa, annotation)

    def nothing(self: IdentityDomain, what: int | Runs) -> None:
        """A page that stays."""

    stack.enter_context(patch.object(HostMemory, "take_page", weak_page))
    for name in ("lose_page", "lose_runs", "regain_page", "regain_runs"):
        stack.enter_context(patch.object(IdentityDomain, name, nothing))


def _stale(stack: ExitStack) -> None:
    """The SMMU is not told."""

    def page(self: SmmuDriver, vmid: int, ipa: int) -> None:
        """A TLBI that is left out."""

    def everything(self: SmmuDriver, vmid: int) -> None:
        """Another."""

    stack.enter_context(patch.object(SmmuDriver, "invalidate_page", page))
    stack.enter_context(patch.object(SmmuDriver, "invalidate_all", everything))


def _unknown_streams(stack: ExitStack) -> None:
    """What is not configured bypasses stage 2."""
    start = SmmuDriver.start

    def weak(self: SmmuDriver) -> None:
        for stream in range(1 << STREAM_BITS):
            self._words[self._first_ste + stream * STE_WORDS] = BYPASS_STE[0]
        start(self)

    stack.enter_context(patch.object(SmmuDriver, "start", weak))


def _any_page(self: HostDma, first: int, nr: int) -> None:
    """A check that is left out."""


MUTANTS: dict[str, Install] = {
    "devices lose what the host loses": _keeps_pages,
    "the SMMU forgets what was lost": _stale,
    "streams that EL2 does not know abort": _unknown_streams,
    "the SMMU's registers are EL2's": replaced(
        HostMemory, "withhold_device", lambda self, base, nbytes: None
    ),
    "a page that is mapped for DMA stays the host's": replaced(host_dma, "HOST_PINNED", HOST_OWNED),
    "only pages of the host's own are mapped for DMA": replaced(
        HostDma, "_check_pinnable", _any_page
    ),
}
"""By the guard that is missing."""
