# SPDX-License-Identifier: GPL-2.0-or-later
"""What `pkvm run` says when the guest has ended: for people, and as one JSON object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pkvm.arm64.smccc import function_name
from pkvm.cli import status
from pkvm.events import GuestExit, GuestHypercall, GuestTrap
from pkvm.trace.counting import CountingRecorder
from pkvm.vmm.faults import Faults
from pkvm.vmm.probes import KINDS, Probes
from pkvm.vmm.vmm import Outcome, Vmm

if TYPE_CHECKING:
    from pkvm.check.census import Census
    from pkvm.cli.devices import Traffic

MAX_REFUSALS = 12
"""Kinds of refusals that the text shows."""

Paint = Callable[[str, str], str]

_OWNERS = {"guest": "protected guest", "host": "host", "hyp": "EL2"}


class Result(NamedTuple):
    """Everything that a run has left."""

    vmm: Vmm
    outcome: Outcome
    seconds: float
    console: str
    probes: Probes
    backend: str
    """What it ran on."""
    counts: CountingRecorder | None
    """The events of the built-in machine; None on a real kernel."""
    pages: dict[str, Census]
    """Of the built-in machine by moment: "shared", "unshared", "end"."""
    pinned: dict[str, int]
    """Of a real kernel by moment: bytes that it keeps where they are for the guest."""
    restarts: int = 0
    """How often the guest was reset and started again."""
    traffic: Sequence[Traffic] = ()
    """Of the virtio devices, in the last life."""
    faults: Faults | None = None
    """Of the virtio devices."""
    checked: tuple[int, int] | None = None
    """With --check: exits to the host and transitions after which every invariant held."""

    @property
    def status(self) -> int:
        """The exit status. What got through to a protected guest comes before everything else;
        where nothing is protected, how the guest ended does."""
        got_through = self.probes.tried > self.probes.refused
        if got_through and self.vmm.protected:
            return status.GOT_THROUGH
        if self.outcome.kind == "interrupted":
            return status.INTERRUPTED
        if self.outcome.kind == "timeout":
            return status.TIMEOUT
        if self.outcome.kind != "powered-off":
            return status.FAILED
        return status.GOT_THROUGH if got_through or self.probes.shared_trouble else status.OK


def as_json(result: Result) -> str:
    """One JSON object, on one line."""
    import json

    probes = result.probes
    pages = {moment: _by_owner(census) for moment, census in result.pages.items()}
    shared_tried = sum(tally.tried for tally in probes.shared.values())
    shared_refused = sum(tally.refused for tally in probes.shared.values())
    whole = {
        "outcome": result.outcome.kind,
        "detail": result.outcome.detail,
        "backend": result.backend,
        "dialect": result.vmm.dialect.name,
        "protected": result.vmm.protected,
        "console": result.console,
        "pages": pages.get("end", {}),
        "pages_by_moment": pages,
        "pinned_by_moment": result.pinned,
        "host_probes": {
            "tried": probes.tried,
            "refused": probes.refused,
            "pages": probes.pages,
            "moments": probes.moments,
            "by_kind": {
                kind: {"tried": tally.tried, "refused": tally.refused, "words": tally.words}
                for kind, tally in probes.private.items()
            },
            "got_through": probes.got_through,
            "shared": {
                "tried": shared_tried,
                "allowed": shared_tried - shared_refused,
                "equal": not probes.shared_trouble if shared_tried else None,
                "trouble": probes.shared_trouble,
            },
            "untouched_pages": probes.untouched,
            "not_tried": probes.not_tried or None,
        },
        **_events(result.counts),
        "devices": [
            {**moved._asdict(), "bounced": result.vmm.protected} for moved in result.traffic
        ],
        "device_faults": [
            {**fault._asdict(), "times": times}
            for fault, times in (result.faults.counts() if result.faults else {}).items()
        ],
        "notes": _notes(result),
        "checked": dict(zip(("exits", "transitions"), result.checked, strict=True))
        if result.checked
        else None,
        "restarts": result.restarts,
        "seconds": round(result.seconds, 6),
    }
    return json.dumps(whole)


def as_text(result: Result, paint: Paint) -> str:
    """A short report, in words."""
    good = result.outcome.kind == "powered-off"
    kind = "protected VM" if result.vmm.protected else "non-protected VM"
    lines = [
        "",
        f"{paint('How it ended', 'title')}: "
        + paint(result.outcome.detail, "good" if good else "bad")
        + f" after {result.seconds:.2f} s ({kind}, back-end {result.backend}, "
        f"dialect {result.vmm.dialect.name})",
        "",
        *(_page_lines(result.pages, paint) if result.pages else _pinned_lines(result, paint)),
        *_event_lines(result.counts, paint),
        *_checked_lines(result, paint),
        "",
        *_probe_lines(result.probes, protected=result.vmm.protected, paint=paint),
    ]
    if result.traffic:
        lines += ["", *_device_lines(result, paint)]
    lines += _refusal_lines(result.counts, paint)
    notes = _notes(result)
    if notes:
        lines += ["", paint("Notes", "title"), *(f"  {note}" for note in notes)]
    return "\n".join(lines)


def _events(counts: CountingRecorder | None) -> dict[str, Any]:
    """What the machine recorded; null for a kernel, which tells nobody."""
    if counts is None:
        return dict.fromkeys(("exits", "traps", "hypercalls", "refusals", "messages", "events"))
    return {
        "exits": counts.counts(GuestExit),
        "traps": counts.counts(GuestTrap),
        "hypercalls": _hypercalls(counts),
        "refusals": [
            {"op": op, "check": check, "times": counted.times, "why": counted.last.why}
            for (op, check), counted in counts.refusal_counts().items()
        ],
        "messages": [f"{message.source}: {message.text}" for message in counts.messages()],
        "events": counts.totals(),
    }


def _event_lines(counts: CountingRecorder | None, paint: Paint) -> list[str]:
    if counts is None:
        return []
    return [
        "",
        f"{paint('Exits to the host', 'title')}: {_list(counts.counts(GuestExit))}",
        f"{paint('Served by EL2', 'title')}: {_list(counts.counts(GuestTrap))}",
        f"{paint('Hypercalls of the guest', 'title')}: {_list(_hypercalls(counts))}",
    ]


def _refusal_lines(counts: CountingRecorder | None, paint: Paint) -> list[str]:
    if counts is None or not counts.refusal_counts():
        return []
    refusals = sorted(counts.refusal_counts().items(), key=lambda item: -item[1].times)
    lines = ["", paint("Refusals", "title")]
    lines += [
        f"  {counted.times:>6} x {op}: {counted.last.why}"
        for (op, _), counted in refusals[:MAX_REFUSALS]
    ]
    return lines


def _pinned_lines(result: Result, paint: Paint) -> list[str]:
    title = paint("Memory that the kernel keeps for the guest", "title")
    kept = ", ".join(f"{moment} {size >> 10} KiB" for moment, size in result.pinned.items())
    return [f"{title}: {kept}"] if kept else []


def _checked_lines(result: Result, paint: Paint) -> list[str]:
    if result.checked is None:
        return []
    exits, transitions = result.checked
    held = f"all held at {exits} exits to the host and after {transitions} changes of ownership"
    return [f"{paint('Invariants', 'title')}: {paint(held, 'good')}"]


def _by_owner(census: Census) -> dict[str, dict[str, int]]:
    return {"guest": census.guest, "host": census.host, "hyp": census.hyp}


def _page_lines(pages: dict[str, Census], paint: Paint) -> list[str]:
    head = "".join(f"{moment:>12}" for moment in pages)
    lines = [paint(f"{'Pages by owner and state':<36}", "title") + head]
    columns = [_by_owner(census) for census in pages.values()]
    for owner, states in columns[-1].items() if columns else ():
        for state in states:
            counts = "".join(f"{column[owner][state]:>12}" for column in columns)
            lines.append(f"  {_OWNERS[owner] + ', ' + state.replace('_', ' '):<34}{counts}")
    return lines


def _probe_lines(probes: Probes, *, protected: bool, paint: Paint) -> list[str]:
    got_through = probes.tried - probes.refused
    title = paint("The host's attempts on the guest's memory", "title")
    lines = [
        f"{title} ({probes.pages} pages; moments: {', '.join(probes.moments) or 'none'})",
        f"{'':<34}{'tried':>12}{'refused':>12}{'shared:':>12}{'tried':>8}{'refused':>10}",
    ]
    for kind, name in KINDS.items():
        private, shared = probes.private[kind], probes.shared[kind]
        if private.tried or shared.tried:
            lines.append(
                f"  {name:<32}{private.tried:>12}{private.refused:>12}{'':>12}{shared.tried:>8}"
                f"{shared.refused:>10}"
            )
    if got_through:
        what = "private pages" if protected else "pages, as nothing protects them"
        lines.append("  " + paint(f"{got_through} attempts got through to {what}", "bad"))
        lines += [f"    {line}" for line in probes.got_through]
    elif probes.tried:
        lines.append("  " + paint("private pages: every attempt was refused", "good"))
    if probes.shared_trouble:
        lines.append("  " + paint("shared pages are not as the guest says", "bad"))
        lines += [f"    {line}" for line in probes.shared_trouble]
    elif any(tally.tried for tally in probes.shared.values()):
        lines.append(
            "  " + paint("shared pages: every attempt was allowed, with equal content", "good")
        )
    if probes.untouched:
        known = "the guest never touched them"
        if probes.guesses:
            known = "they hold what was loaded, so the guest never touched them"
        lines.append(f"  {probes.untouched} pages are the host's: {known}")
    if probes.not_tried:
        lines.append(f"  {probes.not_tried}")
    return lines


def _device_lines(result: Result, paint: Paint) -> list[str]:
    title = "Virtio devices" + (", bounced through shared pages" if result.vmm.protected else "")
    lines = [f"{paint(title, 'title')}:"]
    lines += [
        f"  {moved.device}: {moved.buffers} buffers, {moved.from_guest} bytes from the guest, "
        f"{moved.to_guest} bytes to it"
        for moved in result.traffic
    ]
    if result.faults is not None:
        lines += [f"  {paint(line, 'bad')}" for line in result.faults.lines()]
    return lines


def _hypercalls(counts: CountingRecorder) -> dict[str, int]:
    named: dict[str, int] = {}
    for function, times in counts.counts(GuestHypercall).items():
        name = function_name(int(function))
        named[name] = named.get(name, 0) + times
    return named


def _notes(result: Result) -> list[str]:
    notes = list(result.vmm.sharing.notes)
    if result.restarts:
        times = "once" if result.restarts == 1 else f"{result.restarts} times"
        notes.append(f"the guest asked for a reset and was started again {times}")
    stray = result.vmm.stray_accesses
    if stray:
        notes.append(f"the guest made {stray} accesses to addresses without a device or memory")
    return notes


def _list(counts: dict[Any, int]) -> str:
    if not counts:
        return "none"
    return f"{sum(counts.values())} ({', '.join(f'{k} {n}' for k, n in counts.items())})"
