# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm run --check`: all invariants at each exit, and an end with a word where one is broken."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from pkvm.arm64.stage2 import PAGE_SIZE
from pkvm.check.door import InvariantError
from pkvm.cli import status
from pkvm.cli.main import main
from pkvm.hyp.abi import HOST_CALL_BASE, HostCall, HostVcpu
from pkvm.hyp.exits import Exits
from pkvm.hyp.host_memory import HostMemory
from pkvm.hyp.mem_protect import MemProtect
from pkvm.hyp.ownership import Ownership
from pkvm.hyp.run import PhysicalCpu
from pkvm.hyp.vcpu import Vcpu
from pkvm.system import System
from pkvm.uapi.dialects import DIALECTS

SMALL = ("run", "--check", "--json", "--memory", "8M")


def keep(name: str) -> Callable[..., None]:
    """A method that does nothing."""

    def nothing(self: object, *args: object, **named: object) -> None:
        return None

    nothing.__name__ = name
    return nothing


@pytest.mark.parametrize("dialect", DIALECTS)
def test_all_is_well(dialect: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--dialect", dialect]) == status.OK
    report = json.loads(capsys.readouterr().out)
    assert report["checked"]["exits"] > 100
    assert report["checked"]["transitions"] == report["events"]["transition"]


def test_nobody_checks_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--json"]) == status.OK
    assert json.loads(capsys.readouterr().out)["checked"] is None


def shared_page_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostMemory, "give_runs", keep("give_runs"))
    monkeypatch.setattr(HostMemory, "give_page", keep("give_page"))


def tlb_not_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostMemory, "_invalidate_host", keep("_invalidate_host"))


def pages_not_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ownership, "zero", keep("zero"))


def exit_shows_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    publish = Exits.publish

    def indiscreet(self: Exits, *args: object) -> None:
        publish(self, *args)  # type: ignore[arg-type]
        self.results = (*self.results[:-1], self._engine.x[1] | 1)

    monkeypatch.setattr(Exits, "publish", indiscreet)


def page_written(monkeypatch: pytest.MonkeyPatch) -> None:
    publish = Exits.publish

    def indiscreet(self: Exits, vcpu: Vcpu, *args: object) -> None:
        publish(self, vcpu, *args)  # type: ignore[arg-type]
        vcpu.page[HostVcpu.X >> 3] ^= 1

    monkeypatch.setattr(Exits, "publish", indiscreet)


def counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    load = PhysicalCpu.load

    def twice(self: PhysicalCpu, handle: int, index: int, hcr: int) -> None:
        load(self, handle, index, hcr)
        self.loaded().vm.users += 1

    monkeypatch.setattr(PhysicalCpu, "load", twice)


def pin_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemProtect, "pin_shared", keep("pin_shared"))
    monkeypatch.setattr(MemProtect, "unpin_shared", keep("unpin_shared"))


@pytest.mark.parametrize(
    ("rule", "break_it"),
    [
        ("P3", shared_page_not_given),
        ("P9", tlb_not_flushed),
        ("P7", pages_not_wiped),
        ("P11", exit_shows_too_much),
        ("P11", page_written),
        ("P13", counted_twice),
        ("P12", pin_forgotten),
    ],
)
def test_what_is_broken_ends_the_run(
    rule: str,
    break_it: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """EL2 is changed from outside; nothing in it can be switched off."""
    break_it(monkeypatch)
    assert main(SMALL) == status.BROKEN
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("pkvm: error: an invariant does not hold: ")
    assert f"{rule}: " in err
    assert err.count("\n") == 1


def test_the_host_gets_no_answer_once() -> None:
    """The first call after which something is wrong raises; then the system can be closed."""
    with System(64 << 20, check=True) as system:
        checked = system.checked
        assert checked is not None
        run = HOST_CALL_BASE + HostCall.VCPU_RUN
        assert checked.host_call(run)[0] == 0
        memory = system.machine.memory
        system.hyp.mem.vmemmap.refcount[3] = 1
        assert checked.host_call(HOST_CALL_BASE + HostCall.PGD_INFO)[1] > 0, "no exit"
        with pytest.raises(
            InvariantError, match=rf"refcounts: PA {memory.ram_base + 3 * PAGE_SIZE:#x}"
        ):
            checked.host_call(run)
        assert checked.host_call(run)[0] == 0
        system.hyp.mem.vmemmap.refcount[3] = 0
