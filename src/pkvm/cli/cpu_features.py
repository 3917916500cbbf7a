# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm info --features`: the CPU as a protected guest finds it, in words."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING, Any

from pkvm.cli import status, terminal

if TYPE_CHECKING:
    from pkvm.hyp.features import Answer
    from pkvm.system import System

_WIDTH = 78


def show(system: System, args: argparse.Namespace) -> int:
    """Print it; the exit status."""
    from pkvm.hyp.features import explain
    from pkvm.hyp.id_registers import has_ptrauth

    engine = system.machine.engine
    answers = explain(engine)
    if args.json:
        facts = {
            "cpu_model": args.cpu_model,
            "dialect": args.dialect,
            "ptrauth_on_request": has_ptrauth(engine),
            "features": [_fact(answer) for answer in answers],
        }
        terminal.write_line(json.dumps(facts))
    else:
        terminal.write_line(_text(args.cpu_model, answers))
    return status.OK


def _fact(answer: Answer) -> dict[str, Any]:
    feature = answer.feature
    return {
        "name": feature.name,
        "given": answer.given.name.lower(),
        "register": feature.register.name,
        "field": [feature.lo + 3, feature.lo],
        "hardware": answer.hardware,
        "guest": answer.guest,
        "why": feature.why if answer.guest != answer.hardware else "",
        "if_used": feature.trapped if answer.guest != answer.hardware else "",
    }


def _text(cpu_model: str, answers: list[Answer]) -> str:
    from pkvm.hyp.features import Given

    by_kind = {
        kind: [answer for answer in answers if answer.given is kind]
        for kind in (Given.HIDDEN, Given.PART, Given.WHOLE, Given.ABSENT)
    }
    lines = [f"{cpu_model}, as a protected guest finds it", "", "It does not get:"]
    for answer in by_kind[Given.HIDDEN]:
        lines += _explained(answer, answer.feature.name)
    lines += ["", "It gets less than there is of:"]
    for answer in by_kind[Given.PART]:
        lines += _explained(answer, answer.feature.name)
    for title, kind in (
        ("It gets, as the hardware has it:", Given.WHOLE),
        ("This CPU has not:", Given.ABSENT),
    ):
        names = ", ".join(answer.feature.name for answer in by_kind[kind])
        lines += [
            "",
            title,
            *textwrap.wrap(names, _WIDTH, initial_indent="  ", subsequent_indent="  "),
        ]
    return "\n".join(lines)


def _explained(answer: Answer, name: str) -> list[str]:
    feature = answer.feature
    why = f"{feature.why}." + (f" If used: {feature.trapped}." if feature.trapped else "")
    return [
        f"  {name}",
        *textwrap.wrap(why, _WIDTH, initial_indent="      ", subsequent_indent="      "),
    ]
