# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm compare`: the same scenarios on the model and on a real kernel, and whether they agree."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pkvm
from pkvm.check import agreement_picture, bed_run, model_run, recorded
from pkvm.check.comparison import Comparison, Pair, Verdict, compare
from pkvm.check.explanations import EXPLANATIONS
from pkvm.check.scenarios import TOPICS, record, runner
from pkvm.check.scenarios.observation import Observation
from pkvm.check.scenarios.record import Record, RecordError
from pkvm.cli import bed_options, options, status, terminal
from pkvm.testbed.ssh import SshBed

DEFAULT_SECONDS = 60.0


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    other = parser.add_argument_group("the other side").add_mutually_exclusive_group()
    other.add_argument(
        "--recorded",
        nargs="?",
        const="",
        metavar="FILE",
        help="a recorded run; without FILE the stock kernel's that comes with pkvm (the default)",
    )
    other.add_argument(
        "--backend",
        type=options.device,
        metavar="PATH",
        help="this computer's kernel, such as /dev/kvm on arm64",
    )
    other.add_argument(
        "--testbed",
        action="store_true",
        help="Debian's stock kernel in an emulated machine (see pkvm testbed)",
    )
    other.add_argument(
        "--ssh", metavar="USER@HOST", help="the kernel of another arm64 machine, as root"
    )
    bed_options.add_options(parser, {"default": argparse.SUPPRESS})
    parser.add_argument(
        "--topic", action="append", metavar="NAME", help="compare this topic alone; may be repeated"
    )
    parser.add_argument(
        "--seconds",
        type=options.seconds,
        default=DEFAULT_SECONDS,
        metavar="N",
        help=f"the most that one scenario may take (default {DEFAULT_SECONDS:g})",
    )
    parser.add_argument("--record", metavar="FILE", help="keep the other side's run in FILE")
    parser.add_argument("--svg", metavar="FILE", help="draw the table into FILE")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def execute(args: argparse.Namespace) -> int:
    """Compare and print; 0 if every difference is explained."""
    bed_options.settle(args, wanted=args.testbed)
    topics = args.topic or list(TOPICS)
    try:
        for topic in topics:
            runner.topic_module(topic)
        theirs = _other_side(args, topics)
    except (runner.UnknownTopicError, RecordError) as error:
        return _complain(str(error))
    if args.record is not None:
        options.write_file(args.record, record.to_json(theirs.machine, theirs.observations))
    ours = model_run.run(topics, seconds=args.seconds)
    comparison = compare(ours, theirs.observations, EXPLANATIONS)
    if args.svg is not None:
        options.write_file(args.svg, agreement_picture.svg(comparison, _machine(theirs)))
    if args.json:
        terminal.write_line(json.dumps(_facts(comparison, theirs)))
    else:
        terminal.write_line(_text(comparison, theirs))
    return status.OK if comparison.holds else status.FAILED


def _other_side(args: argparse.Namespace, topics: list[str]) -> Record:
    """The run to compare with. Raises RecordError, BedError, OSError."""
    if args.testbed or args.ssh is not None:
        words = bed_options.Words(quiet=not sys.stderr.isatty())
        made = (
            bed_options.emulated(args, words) if args.testbed else SshBed(args.ssh, progress=words)
        )
        with made as bed:
            words.done()
            return bed_run.run(bed, topics, seconds=args.seconds, progress=_pass_on)
    if args.backend is not None:
        with pkvm.open(args.backend) as kvm:
            rows = runner.run(kvm, topics, seconds=args.seconds, progress=_progress)
        return Record(record.machine(), tuple(rows))
    whole = record.load(Path(args.recorded)) if args.recorded else recorded.load()
    rows = [row for row in whole.observations if row.topic in topics]
    if missing := [topic for topic in topics if not any(row.topic == topic for row in rows)]:
        raise RecordError(
            f"the record has nothing on {', '.join(missing)}: make a new one with --record"
        )
    return Record(whole.machine, tuple(rows))


def _progress(topic: str, scenario: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{topic}: {scenario}", end="", file=sys.stderr, flush=True)


def _pass_on(lines: bytes) -> None:
    """Progress from the test bed."""
    for line in lines.decode(errors="replace").splitlines():
        _progress(*line.partition(": ")[::2])


def _complain(text: str) -> int:
    print(f"pkvm: error: {text}", file=sys.stderr)
    return status.USAGE


def _machine(theirs: Record) -> str:
    facts = theirs.machine
    parts = [f"Linux {facts.get('kernel', 'of unknown release')}"]
    parts += [facts[name] for name in ("cpu", "qemu") if name in facts]
    return ", ".join(parts)


def _facts(comparison: Comparison, theirs: Record) -> dict[str, Any]:
    return {
        "machine": dict(theirs.machine),
        "holds": comparison.holds,
        "observations": len(comparison.judged),
        "topics": {
            topic: {verdict.name.lower(): comparison.count(verdict, topic) for verdict in Verdict}
            for topic in comparison.topics()
        },
        "explained": [
            _pair_facts(one.pair) | {"reason": one.explanation.reason}
            for one in comparison.judged
            if one.explanation is not None
        ],
        "unexplained": [_pair_facts(pair) for pair in comparison.unexplained()],
        "stale": [str(one) for one in comparison.stale],
    }


def _pair_facts(pair: Pair) -> dict[str, Any]:
    row: Observation = pair.question
    model, kernel = pair.words()
    return {
        "topic": row.topic,
        "scenario": row.scenario,
        "call": row.call,
        "arguments": row.arguments,
        "model": model,
        "kernel": kernel,
    }


def _text(comparison: Comparison, theirs: Record) -> str:
    lines = [f"The model (dialect upstream) and {_machine(theirs)}:", ""]
    lines.append(f"{'':<52}{'same':>7}{'explained':>11}{'different':>11}")
    for topic in comparison.topics():
        lines.append(_row(runner.title(topic), comparison, topic))
    lines.append(_row("all", comparison, None))
    share = comparison.count(Verdict.EXPLAINED) / max(1, len(comparison.judged))
    lines += ["", f"{len(comparison.judged)} observations, {share:.1%} of them explained."]
    reasons = Counter(one.explanation.reason for one in comparison.judged if one.explanation)
    sources = {
        one.explanation.reason: one.explanation.source
        for one in comparison.judged
        if one.explanation
    }
    for reason, count in reasons.most_common():
        lines.append(f"  {count:>3}  {reason} ({sources[reason]})")
    for pair in comparison.unexplained():
        row = pair.question
        model, kernel = pair.words()
        lines += [
            "",
            f"{row.topic}, {row.scenario}: {row.call} {row.arguments}".rstrip(),
            f"  the kernel: {kernel}",
            f"  the model:  {model}",
        ]
    for stale in comparison.stale:
        lines.append(f"An explanation explains nothing any more: {stale}")
    if comparison.explains_too_much:
        lines.append("More is explained than may be: mend the model.")
    return "\n".join(lines)


def _row(name: str, comparison: Comparison, topic: str | None) -> str:
    same, explained, different = (comparison.count(verdict, topic) for verdict in Verdict)
    return f"{name:<52}{same:>7}{explained:>11}{different:>11}"
