# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pkvm.testbed.console import Console, ConsoleError


def shell(script: str, limit: float = 60) -> Console:
    return Console(("sh", "-c", script), limit=limit)


def state(pid: int) -> str:
    """The letter that proc(5) gives; X for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def test_words_are_found_in_order_and_timed() -> None:
    with shell("echo one; echo two; echo one") as console:
        first = console.expect("one")
        second = console.expect("one")
        assert 0 < first <= second
        with pytest.raises(ConsoleError, match="the output ended before 'one'"):
            console.expect("one")
        assert console.text == "one\ntwo\none\n"


def test_words_may_come_in_pieces() -> None:
    with shell("printf 'user'; read answer; printf 'land'; read answer") as console:
        console.expect("user")
        console.send("go on\n")
        console.expect("land")
    with shell("printf 'user'; read answer; printf 'land'; read answer") as console:
        console.send("go on\n")
        console.expect("userland")


def test_a_dialogue() -> None:
    with shell("read a; read b; echo sum $((a + b)); exit 7") as console:
        console.send("20\n")
        console.send("22\n")
        console.expect("sum 42")
        assert console.finish() == 7


def test_errors_are_heard_too() -> None:
    with shell("echo bad news >&2") as console:
        assert console.finish() == 0
        assert console.text == "bad news\n"


def test_the_environment_is_added_to() -> None:
    with Console(("sh", "-c", "echo $EXTRA"), environment={"EXTRA": "given"}) as console:
        console.expect("given")


def test_silence_ends_with_the_time() -> None:
    with (
        shell("echo waiting; read forever", limit=0.2) as console,
        pytest.raises(ConsoleError, match=r"the time was up; the last lines:\nwaiting"),
    ):
        console.expect("never")


def test_a_reader_that_is_gone() -> None:
    with shell("exec true") as console:
        console.finish()
        with pytest.raises(ConsoleError, match="nobody took 'hello'"):
            console.send("hello")


def test_the_whole_group_ends_with_the_block() -> None:
    with shell("sh -c 'echo $$; exec sleep 600' & wait") as console:
        console.expect("\n")
        child = int(console.text)
        assert state(child) not in "ZX"
    while state(child) not in "ZX":
        os.sched_yield()


def test_the_status_tells_a_signal() -> None:
    with shell("kill -9 $$") as console:
        assert console.finish() == -signal.SIGKILL
