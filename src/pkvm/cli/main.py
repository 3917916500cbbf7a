# SPDX-License-Identifier: GPL-2.0-or-later
"""The command's door: finds the verb, and turns every error into one clear line.

Exit statuses (`pkvm --help` lists them too):

    0    the guest powered off, and no attempt of the host got through
    1    the guest ended otherwise, or could not be run
    2    bad usage or bad input: nothing was run
    3    an attempt of the host on the guest's private memory got through
    4    an invariant did not hold (--check)
    124  the time limit was reached
    130  interrupted
    141  whoever read the output went away
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TextIO

import pkvm
from pkvm.cli import status
from pkvm.cli.terminal import OutputClosed, OutputError

VERBS = {
    "run": "run a guest as a protected VM; without an image, the demonstration",
    "info": "what this host offers",
    "compare": "run scenarios on the model and on a real kernel, and say where they differ",
    "testbed": "a machine with a real kernel in protected mode: make it, run commands in it",
    "ptdump": "run a guest and print the stage-2 tables in words",
    "attack": "try a hostile host's attacks on a running protected Linux guest",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(status.USAGE, f"pkvm: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's own); the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Python has None for a stream that was closed before it started.
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    # numpy's BLAS starts a thread for each core when it is imported; nothing here multiplies.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return _complain("interrupted", status.INTERRUPTED)
    except (BrokenPipeError, OutputClosed):
        sys.stdout = _nowhere()  # else Python complains once more when it flushes at exit
        return status.PIPE
    except Exception as error:
        # The last resort of a command for people: whatever went wrong, one line.
        if "--debug" in arguments:
            raise
        return _complain(*_words(error))


def _dispatch(arguments: list[str]) -> int:
    top = Parser(
        prog="pkvm",
        description="Protected KVM for arm64, the whole system, in Python.",
        epilog="verbs:\n"
        + "".join(f"  {verb:<8} {text}\n" for verb, text in VERBS.items())
        + "\npkvm VERB --help lists a verb's options.\n\nexit status:\n"
        + "".join(f"  {number:<8} {text}\n" for number, text in status.WORDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="pkvm [--help] [--version] [--debug] VERB ...",
    )
    top.add_argument("--version", action="version", version=f"pkvm {pkvm.__version__}")
    top.add_argument("--debug", action="store_true", help="let an error end in a traceback")
    top.add_argument("verb", nargs="?", choices=VERBS, metavar="VERB", help=", ".join(VERBS))
    top.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = top.parse_args(arguments)
    if chosen.verb is None:
        top.error(f"say what to do: {', '.join(VERBS)}")
    module = import_module(f"pkvm.cli.{chosen.verb}")
    parser = Parser(prog=f"pkvm {chosen.verb}", description=VERBS[chosen.verb] + ".")
    parser.add_argument("--debug", action="store_true", help="let an error end in a traceback")
    module.configure(parser)
    result: int = module.execute(parser.parse_args(chosen.rest))
    return result


def _words(error: Exception) -> tuple[str, int]:
    """The line for an error, and the exit status."""
    from pkvm.fdt import FdtError
    from pkvm.firmware.image import FirmwareImageError
    from pkvm.machine.cpu.errors import EngineError
    from pkvm.testbed.base import BedError, TimedOut
    from pkvm.trace.jsonl import TraceError
    from pkvm.vmm.errors import LoadError

    # Where nobody imported it, which needs numpy, nobody raised it.
    door = sys.modules.get("pkvm.check.door")
    if door is not None and isinstance(error, door.InvariantError):
        return str(error), status.BROKEN
    match error:
        case LoadError() | FdtError() | FirmwareImageError():
            return str(error), status.USAGE
        case TimedOut():
            return str(error), status.TIMEOUT
        case BedError():
            return str(error), status.FAILED
        case MemoryError():
            return f"{str(error) or 'out of memory'}: choose less with --memory", status.FAILED
        case OSError(filename=None):
            return f"the kernel refused: {error.strerror or error}", status.FAILED
        case OSError():
            return f"{error.filename}: {error.strerror}", status.USAGE
        case EngineError() | TraceError() | OutputError():
            return str(error), status.FAILED
        case ModuleNotFoundError(name="numpy" | "unicorn" | "elftools" | "zstandard"):
            return f"{error}: install it with pip install pkvm", status.FAILED
    return (
        f"internal error ({type(error).__name__}: {error}): please report it, with what "
        "--debug prints",
        status.FAILED,
    )


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _complain(text: str, exit_status: int) -> int:
    line = " ".join(text.split())
    print(f"pkvm: error: {line}", file=sys.stderr)
    return exit_status
