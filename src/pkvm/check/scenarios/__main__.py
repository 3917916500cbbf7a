# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m pkvm.check.scenarios`: run scenarios on a kernel and print a record of what they saw.

This is what the test bed runs on an arm64 host.
"""

from __future__ import annotations

import argparse
import sys

import pkvm
from pkvm.check.scenarios import TOPICS, record, runner
from pkvm.kvm import Kvm


def main() -> int:
    """The command line of this module; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m pkvm.check.scenarios")
    parser.add_argument("--backend", default="model", help="model, or the path of /dev/kvm")
    parser.add_argument("--topic", action="append", metavar="NAME", help=", ".join(TOPICS))
    parser.add_argument("--seconds", type=float, default=60.0, help="the most a scenario may take")
    parser.add_argument("--json", action="store_true", help="print the record (the default)")
    parser.add_argument("--lines", action="store_true", help="print a line for each observation")
    args = parser.parse_args()
    try:
        with _open(args.backend) as kvm:
            seen = runner.run(kvm, args.topic or TOPICS, seconds=args.seconds, progress=_progress)
    except OSError as error:
        print(f"error: {error.filename or args.backend}: {error.strerror}", file=sys.stderr)
        return 1
    except (ValueError, runner.UnknownTopicError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.lines:
        for row in seen:
            print(f"{row.scenario:<24} {row.call} {row.arguments} -> {row.words()}")
    else:
        sys.stdout.write(record.to_json(record.machine(), seen))
    return 0


def _open(backend: str) -> Kvm:
    if backend == "model":
        return pkvm.open(dialect="upstream", clock="virtual")
    return pkvm.open(backend)


def _progress(topic: str, scenario: str) -> None:
    print(f"{topic}: {scenario}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
