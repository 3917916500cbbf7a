# SPDX-License-Identifier: GPL-2.0-or-later
"""The board that the tests of guest programs share; `enter` resets it. A pytest plugin."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fakes.bare_board import BareBoard, calls


@pytest.fixture(scope="session")
def shared_board() -> Iterator[BareBoard]:
    board = BareBoard()
    yield board
    board.close()


@pytest.fixture
def board(shared_board: BareBoard) -> BareBoard:
    """A board whose hypervisor behaves as a protected VM's."""
    shared_board.calls = calls()
    return shared_board
