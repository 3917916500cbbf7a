# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm ptdump`: the stage-2 tables of a running machine, in words."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pkvm.cli import guest, options, status, terminal
from pkvm.events import NullRecorder
from pkvm.vmm.errors import LoadError
from pkvm.vmm.vmm import Moment, Vmm

if TYPE_CHECKING:
    from pkvm.system import System

TABLES = ("host", "guest", "dma", "smmu")


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    guest.add_options(parser)
    options.add_machine_options(parser)
    group = parser.add_argument_group("what is printed")
    group.add_argument(
        "--table", choices=(*TABLES, "all"), default="all", help="whose table (default: all)"
    )
    group.add_argument(
        "--at",
        choices=("shared", "end"),
        default="shared",
        help="when: as the guest announces shared memory, or at its end (default: shared, and the "
        "end if it never shares)",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def execute(args: argparse.Namespace) -> int:
    """Run the guest, print the tables of the moment asked for; the exit status."""
    options.need_model(args, "ptdump")
    options.settle(args)
    wanted = guest.load(args)
    firmware = options.firmware(args)
    seen: dict[str, dict[str, Any]] = {}

    def observe(moment: Moment) -> None:
        if moment.value not in seen and moment is not Moment.UNSHARED:
            seen[moment.value] = {
                name: _json(system, name) if args.json else system.dump(name)
                for name in system.tables()
                if args.table in ("all", name.partition(" ")[0])
            }
            if args.table in ("all", "smmu"):
                smmu = system.streams() if args.json else system.dump_smmu()
                seen[moment.value]["smmu"] = smmu

    system = options.make_system(args, NullRecorder(), wanted.board.ram_bytes, firmware=firmware)
    try:
        with (
            system.open() as kvm,
            Vmm(
                kvm,
                guest.seeded(wanted, 0, 0),
                wanted.image,
                initrd=wanted.initrd,
                protected=not args.unprotected,
                firmware=firmware if args.unprotected else None,
                console=lambda _: None,
                source=lambda _: terminal.read_input(),
                observe=observe,
            ) as vmm,
        ):
            outcome = vmm.run(args.timeout)
    finally:
        system.close()
    at = args.at if args.at in seen else "end"
    if at not in seen:
        raise LoadError(f"there is nothing to print: {outcome.detail}")
    if args.json:
        import json

        smmu = seen[at].pop("smmu", [])
        report = {"outcome": outcome.kind, "at": at, "tables": seen[at], "smmu": smmu}
        terminal.write_line(json.dumps(report))
    else:
        if at != args.at:
            print("the guest never shared memory: these are the tables at its end", file=sys.stderr)
        terminal.write_line("\n\n".join(seen[at].values()))
    return status.OK if outcome.kind == "powered-off" else status.FAILED


def _json(system: System, name: str) -> dict[str, Any]:
    from pkvm.machine.dump import stage2_runs

    context = system.tables()[name]
    runs = stage2_runs(system.machine.memory, context)
    return {"vttbr": context.vttbr, "vtcr": context.vtcr, "runs": [asdict(run) for run in runs]}
