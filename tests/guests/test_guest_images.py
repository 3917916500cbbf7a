# SPDX-License-Identifier: GPL-2.0-or-later
"""The images that ship are what guests/ builds to, and its numbers are the package's."""

from __future__ import annotations

import re
import shutil
import subprocess
from enum import IntEnum, IntFlag
from pathlib import Path

import pytest

from pkvm import guests
from pkvm.guests import protocol

SOURCES = Path(__file__).parents[2] / "guests"
COMPILER = "aarch64-linux-gnu-gcc"
CONSTANT = re.compile(r"^#define (\w+) ((?:0x)?[0-9A-F]+|\(1 << \d+\))(?:\s|$)", re.MULTILINE)


def constants(header: str) -> dict[str, int]:
    """The integer constants that a header of guests/include defines."""
    text = (SOURCES / "include" / header).read_text()
    found = {}
    for name, value in CONSTANT.findall(text):
        found[name] = 1 << int(value[6:-1]) if value.startswith("(") else int(value, 0)
    return found


def test_images_are_there() -> None:
    shipped = {path.stem for path in Path(guests.__file__).parent.glob("*.bin")}
    assert shipped == set(guests.NAMES)
    for name in guests.NAMES:
        assert 0 < len(guests.image(name)) < 64 << 10


def test_unknown_image() -> None:
    with pytest.raises(KeyError, match="no guest program 'nonesuch': there are agent, "):
        guests.image("nonesuch")


@pytest.mark.timeout(120)
def test_images_match_their_sources(tmp_path: Path) -> None:
    for tool in (COMPILER, "make"):
        if shutil.which(tool) is None:
            pytest.fail(
                f"{tool} is needed to prove that the guest images match their sources: install "
                "gcc-aarch64-linux-gnu, binutils-aarch64-linux-gnu and make"
            )
    build = subprocess.run(
        ["make", "-C", str(SOURCES), f"BUILD={tmp_path}"], capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr
    changed = [
        name
        for name in guests.NAMES
        if (tmp_path / f"{name}.bin").read_bytes() != guests.image(name)
    ]
    if changed:
        version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout
        pytest.fail(
            f"{', '.join(changed)}: what ships is not what guests/ builds to. If the sources "
            "changed, run `make guests` and commit the images; if they did not, this compiler is "
            f"not the one of guests/README.md: {version.splitlines()[0]}"
        )


@pytest.mark.parametrize(
    ("numbers", "header", "prefix"),
    [
        (protocol.Mailbox, "mailbox.h", "MAILBOX_"),
        (protocol.Event, "mailbox.h", "MAILBOX_EVENT_"),
        (protocol.Command, "agent.h", "AGENT_COMMAND_"),
        (protocol.Status, "agent.h", "AGENT_STATUS_"),
        (protocol.Info, "agent.h", "AGENT_INFO_"),
        (protocol.Sealed, "agent.h", "AGENT_SEALED_"),
        (protocol.Op, "agent.h", "AGENT_OP_"),
        (protocol.Boot, "boot.h", "BOOT_"),
    ],
)
def test_numbers_are_those_of_the_header(
    numbers: type[IntEnum] | type[IntFlag], header: str, prefix: str
) -> None:
    theirs = {
        name.removeprefix(prefix): value
        for name, value in constants(header).items()
        if name.startswith(prefix)
    }
    if numbers is protocol.Mailbox:
        theirs = {name: value for name, value in theirs.items() if "EVENT" not in name}
    if numbers is protocol.Op:
        assert theirs.pop("FUNCTIONS") == min(op for op in protocol.Op if op >= 64)
    theirs.pop("SHIFT", None)
    assert {name: int(number) for name, number in numbers.__members__.items()} == theirs


def test_addresses_are_those_of_the_board() -> None:
    board = constants("board.h")
    assert board["BOARD_MAILBOX"] == protocol.MAILBOX_BASE
    assert constants("agent.h")["AGENT_ABI"] == protocol.ABI
