# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from fakes.cpu_guest import Guest
from pkvm.machine.cpu import thunks

MakeGuest = Callable[..., Guest]


@pytest.fixture(params=["native", "python"])
def hooks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the native hooks of this host and with the Python ones."""
    if request.param == "python":
        monkeypatch.setattr(thunks, "host_code", lambda: None)
    elif thunks.host_code() is None:
        pytest.skip("no native hooks on this host")
    return str(request.param)


@pytest.fixture
def make_guest(hooks: str) -> Iterator[MakeGuest]:
    """Makes guests that are closed after the test."""
    made: list[Guest] = []

    def make(
        *, cpu_model: str = "cortex-a72", count_blocks: bool = False, counter: object = None
    ) -> Guest:
        assert counter is None or callable(counter)
        guest = Guest(cpu_model=cpu_model, count_blocks=count_blocks, counter=counter)
        made.append(guest)
        return guest

    yield make
    for guest in made:
        guest.engine.close()


@pytest.fixture
def guest(make_guest: MakeGuest) -> Guest:
    return make_guest()
