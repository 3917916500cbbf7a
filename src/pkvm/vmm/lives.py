# SPDX-License-Identifier: GPL-2.0-or-later
"""`Lives`: one VM after the other, for as long as the guest asks for a reset.

What a protected VM had cannot be used again, neither its memory nor its vCPUs:
a reset ends the VM and makes another one from the same parts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from pkvm.vmm.vmm import INTERRUPTED, STOPPED, Outcome, Vmm


class Lives:
    """The VM of now, `vmm`, made by `make`; with `reboot` another one after each reset. A context
    manager. `make` gets the number of resets before; what it raises comes out of here."""

    def __init__(self, make: Callable[[int], Vmm], *, reboot: bool = True) -> None:
        self._make = make
        self._reboot = reboot
        self._lock = threading.Lock()
        """Held while there is no VM."""
        self._stopped: Outcome | None = None
        self.restarts = 0
        """How often the guest was reset and started again."""
        self.vmm = make(0)

    def run(self, timeout: float | None = None) -> Outcome:
        """Run until the guest ends other than by a reset, `stop` is called, `timeout` seconds have
        passed altogether or Ctrl-C is pressed. Raises as `Vmm.run`. Once only."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else max(end - time.monotonic(), 0.0)
            outcome = self.vmm.run(left)
            if outcome.kind == "reset" and not self._reboot:
                return outcome
            # A guest that resets at once never lets its VM reach the limit.
            late = end is not None and outcome.kind == "reset" and time.monotonic() >= end
            if late or outcome.kind == "timeout":
                return Outcome("timeout", f"the guest still ran after {timeout:g} seconds")
            if outcome.kind != "reset":
                return outcome
            try:
                stopped = self._start_again()
            except KeyboardInterrupt:
                return INTERRUPTED
            if stopped is not None:
                return stopped

    def _start_again(self) -> Outcome | None:
        """The next VM; or how the run ended, if it was stopped meanwhile."""
        with self._lock:
            if self._stopped is None:
                self.vmm.close()
                self.vmm = self._make(self.restarts + 1)
                self.restarts += 1
                self.vmm.uart.arrived()  # what the one before did not take
            return self._stopped

    def stop(self, outcome: Outcome = STOPPED) -> None:
        """End the run from another thread, with this outcome."""
        with self._lock:
            self._stopped = outcome
            self.vmm.stop(outcome)

    def arrived(self) -> None:
        """There may be input for the UART. Any thread may call it."""
        with self._lock:
            self.vmm.uart.arrived()

    def close(self) -> None:
        """Close the VM. Idempotent."""
        self.vmm.close()

    def __enter__(self) -> Lives:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
