# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import argparse
import io

import pytest

from pkvm.cli import bed_options
from pkvm.testbed.base import silent
from pkvm.vmm.errors import LoadError


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def words(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, *, quiet: bool = False) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    show = bed_options.Words(quiet=quiet)
    for text in ("one", "warning: beware", "two"):
        show(text)
    show.done()
    return stream.getvalue()


def test_words_on_a_terminal_take_the_place_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = words(Screen(), monkeypatch)
    clear = "\r\x1b[K"
    assert seen == f"{clear}pkvm: one{clear}pkvm: warning: beware\n{clear}pkvm: two{clear}"


def test_words_elsewhere_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert words(io.StringIO(), monkeypatch) == "pkvm: one\npkvm: warning: beware\npkvm: two\n"


def test_a_warning_is_never_kept_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    assert words(Screen(), monkeypatch, quiet=True) == "pkvm: warning: beware\n"


def test_the_machine_is_what_the_options_say() -> None:
    parser = argparse.ArgumentParser()
    bed_options.add_options(parser, {})
    args = parser.parse_args(["--cpu", "max", "--smp", "3", "--memory", "2G", "--qemu", "q"])
    machine = bed_options.emulated(args, silent).machine
    assert (machine.cpu, machine.cpus, machine.memory, machine.program) == ("max", 3, 2048, "q")


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--smp", "0"], "choose --smp 1"), (["--memory", "255M"], "choose 256M or more")],
)
def test_bad_machine_is_not_started(options: list[str], words: str) -> None:
    parser = argparse.ArgumentParser()
    bed_options.add_options(parser, {})
    with pytest.raises(LoadError, match=words):
        bed_options.emulated(parser.parse_args(options), silent)


def test_options_of_a_machine_that_nobody_starts() -> None:
    parser = argparse.ArgumentParser()
    bed_options.add_options(parser, {"default": argparse.SUPPRESS})
    args = parser.parse_args([])
    bed_options.settle(args, wanted=False)
    assert vars(args) == bed_options.DEFAULTS
    args = parser.parse_args(["--smp", "4"])
    bed_options.settle(args, wanted=True)
    assert vars(args) == bed_options.DEFAULTS | {"smp": 4}
    with pytest.raises(LoadError, match="for --smp"):
        bed_options.settle(parser.parse_args(["--smp", "4"]), wanted=False)
