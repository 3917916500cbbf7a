# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenarios on the model, in one process and in two: the same comes out."""

from __future__ import annotations

import multiprocessing
import threading

import pytest

from pkvm.check import model_run
from pkvm.check.scenarios.runner import UnknownTopicError

TOPICS = ("vm_types", "vcpus", "limits")


def test_two_processes_see_what_one_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    two = model_run.run(TOPICS)
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    assert model_run.run(TOPICS) == two
    assert list(dict.fromkeys(row.topic for row in two)) == list(TOPICS)
    assert multiprocessing.active_children() == []


def test_what_the_second_process_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    with pytest.raises(UnknownTopicError, match="no topic 'nothing'"):
        model_run.run(("vm_types", "nothing"))
    monkeypatch.setattr(model_run, "_tell", lambda connection, topics, seconds: connection.close())
    with pytest.raises(model_run.ModelRunError, match="without a word"):
        model_run.run(("vm_types", "vcpus"))
    assert multiprocessing.active_children() == []
