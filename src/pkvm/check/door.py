# SPDX-License-Identifier: GPL-2.0-or-later
"""EL2's door with somebody standing at it: all invariants at each exit to the host.

`CheckedSystem` is a recorder, so that it sees each transition as it happens and
looks at its pages; and it is the host's doors, so that it sees each exit and
SMC. What it finds ends the run: the host gets no answer, but `InvariantError`.
"""

from __future__ import annotations

from pkvm.check.exits import PageWatch, shown_too_much
from pkvm.check.firmware_doors import check_doors
from pkvm.check.invariants import Scratch, check_hyp
from pkvm.check.watch import Watch
from pkvm.events import Event, Recorder, Transition
from pkvm.hyp.abi import HOST_CALL_BASE, HostCall
from pkvm.hyp.errors import Refused
from pkvm.hyp.hypervisor import Hypervisor
from pkvm.machine.machine import Machine

_RUN = HOST_CALL_BASE + HostCall.VCPU_RUN
_ENDS = (_RUN, HOST_CALL_BASE + HostCall.FINALIZE_TEARDOWN_VM)


class InvariantError(Exception):
    """Something that must hold of the whole system does not: a bug of EL2's, in words."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(f"an invariant does not hold: {'; '.join(problems)}")
        self.problems = problems


class CheckedSystem:
    """A recorder that passes everything on to `recorder`, and from `attach` on checks."""

    def __init__(self, recorder: Recorder) -> None:
        self._pass_on = recorder.record
        self._hyp: Hypervisor | None = None
        self._machine: Machine | None = None
        self._watch: Watch | None = None
        self._scratch = Scratch()
        self.problems: list[str] = []
        """What was found; the run is over then."""
        self.exits = 0
        """Exits to the host after which everything was checked."""
        self.transitions = 0
        """Transitions after which their pages were."""

    def attach(self, hyp: Hypervisor, machine: Machine) -> None:
        """Begin, with an EL2 that is initialised and whose host has not run yet."""
        self._hyp, self._machine = hyp, machine
        self._watch = Watch(hyp.mem, hyp.table.find, hyp.table.vms)

    def record(self, event: Event, /) -> None:
        """Pass an event on; look at a transition's pages."""
        self._pass_on(event)
        if self._watch is not None and type(event) is Transition:
            self.transitions += 1
            self.problems += self._watch.look(event)

    def host_call(
        self, function_id: int, x1: int = 0, x2: int = 0, x3: int = 0, *more: int
    ) -> tuple[int, ...]:
        """`Hypervisor.host_call`. Raises InvariantError, at the first call after which something
        is wrong; then no more, so that the system can be taken apart."""
        hyp = self._hyp
        assert hyp is not None
        page = None
        if function_id == _RUN:
            page = self._page(hyp)
        results = hyp.host_call(function_id, x1, x2, x3, *more)
        if self._watch is None:
            return results
        if function_id in _ENDS:
            self.exits += function_id == _RUN
            self.problems += self._check(hyp, self._watch)
            if page is not None:
                self.problems += [*shown_too_much(results), *page.look()]
        if self.problems:
            self._watch = None
            raise InvariantError(self.problems)
        return results

    def smc(self, registers: tuple[int, ...], immediate: int = 0, cpu: int = 0) -> tuple[int, ...]:
        """`Machine.smc`, likewise."""
        hyp, machine = self._hyp, self._machine
        assert hyp is not None
        assert machine is not None
        results = machine.smc(registers, immediate, cpu)
        if self._watch is not None:
            self.problems += self._check(hyp, self._watch)
            if self.problems:
                self._watch = None
                raise InvariantError(self.problems)
        return results

    def _check(self, hyp: Hypervisor, watch: Watch) -> list[str]:
        """Everything."""
        assert self._machine is not None
        problems = check_hyp(hyp, watch.secure, self._scratch)
        return problems + check_doors(hyp, self._machine)

    def _page(self, hyp: Hypervisor) -> PageWatch | None:
        """The loaded vCPU's page, if the vCPU is isolated."""
        try:
            vcpu = hyp.cpu.loaded()
        except Refused:
            return None
        return PageWatch(vcpu) if vcpu.vm.isolated else None
