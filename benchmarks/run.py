# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the benchmarks: `make bench`, `make bench JSON=1`, or by name.

One line each: name, ratio, bound, "ok" or "NOT OK". The exit status is 1 if a
figure is beyond its bound or could not be measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys

from common import Result, Unavailable, limit_pairs

MODULES = ("start", "exits", "enable", "ownership", "hyp", "dma", "recorder", "linux", "compare")


def main() -> int:
    """Parse the command line, run, print; returns the exit status."""
    parser = argparse.ArgumentParser(description="side-by-side measurements of pkvm")
    parser.add_argument("names", nargs="*", choices=[*MODULES, []], help="which (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of lines")
    parser.add_argument(
        "--pairs", type=pairs, metavar="N", help="at most N pairs a figure (quicker, rougher)"
    )
    options = parser.parse_args()
    limit_pairs(options.pairs)
    results = []
    missing = []
    for name in options.names or MODULES:
        if not options.json and sys.stderr.isatty():
            print(f"measuring {name}...", file=sys.stderr)
        try:
            for result in importlib.import_module(name).measure():
                results.append(result)
                if not options.json:
                    _print(result)
        except Unavailable as error:
            missing.append(name)
            print(f"{name}: not measured: {error}", file=sys.stderr)
    if options.json:
        rows = [
            {"name": r.name, "ratio": round(r.ratio, 4), "bound": r.bound, "ok": r.ok}
            for r in results
        ]
        print(json.dumps(rows))
    return 0 if all(result.ok for result in results) and not missing else 1


def _print(result: Result) -> None:
    verdict = "ok" if result.ok else "NOT OK"
    print(
        f"{result.name:<28} {result.ratio:8.3f}  bound {result.bound:<6g} {verdict:<7}"
        f" {result.detail}",
        flush=True,
    )


def pairs(text: str) -> int:
    """A number of pairs on the command line."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
