# SPDX-License-Identifier: GPL-2.0-or-later
"""The bench, the runner and the record: what a scenario sees is written down, however it ends."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest

import pkvm
from pkvm.check.scenarios import TOPICS, record, runner
from pkvm.check.scenarios.__main__ import main as command
from pkvm.check.scenarios.bench import DEVICE, FREE, PAGE, RAM, Bench
from pkvm.check.scenarios.observation import Observation
from pkvm.check.scenarios.watchdog import Watchdog
from pkvm.guests.protocol import Op
from pkvm.kvm import Kvm
from pkvm.uapi.kvm import TYPE_PROTECTED


@pytest.fixture(scope="module")
def kvm() -> Iterator[Kvm]:
    with pkvm.open(dialect="upstream", clock="virtual", memory=64 << 20) as one:
        yield one


def run(kvm: Kvm, scenario: runner.Scenario, seconds: float = 20.0) -> list[Observation]:
    bench = Bench(kvm, "topic", "good_one")
    with Watchdog() as watchdog:
        watchdog.start(seconds, bench.expire)
        return runner.run_one(bench, scenario)


def outcomes(rows: list[Observation]) -> list[str]:
    return [f"{row.call} {row.arguments} -> {row.words()}" for row in rows]


def test_what_is_called_is_written_down_in_words_that_do_not_vary(kvm: Kvm) -> None:
    def scenario(bench: Bench) -> None:
        vm = bench.vm()
        vm.store(PAGE, b"\x22\x11")
        guest = vm.agent()
        guest.load(RAM + PAGE, 2)
        vm.load(PAGE + 8)
        guest.hvc(0x8400_0000, show=1)
        guest.load(DEVICE + 4, 4)
        guest.answer(0x77)
        guest.resume(show=2)
        guest.load(1 << 42)
        vm.slot(5, FREE, vm.ram, offset=PAGE, size=PAGE + 1)
        bench.call("KVM_CREATE_VM", "protected", lambda: bench.kvm.create_vm(TYPE_PROTECTED))

    rows = run(kvm, scenario)
    assert outcomes(rows) == [
        "host store ram+0x1000, 2211 -> ok",
        "guest load ram+0x1000, 2 -> 0x1122",
        "host load ram+0x1008, 8 -> refused at ram+0x1008, EFAULT",
        "guest HVC 0x84000000 -> x0=0x10003",
        "guest load device+0x4, 4 -> MMIO read, 4 bytes at device+0x4",
        "KVM_RUN vCPU 0, goes on -> agent status 1, x0=0xa000004 x1=0x77",
        "guest load 0x40000000000, 8 -> guest exception, ESR=0x96000010 FAR=0x40000000000 "
        "vector=0x200",
        "KVM_SET_USER_MEMORY_REGION slot 5 flags 0 at free size 0x1001 user ram+0x1000 -> EINVAL",
        "KVM_CREATE_VM protected -> fd",
    ]
    assert [row.number for row in rows] == list(range(len(rows)))
    assert {(row.topic, row.scenario) for row in rows} == {("topic", "good_one")}


def test_a_scenario_that_fails_says_so_and_leaves_nothing_open(kvm: Kvm) -> None:
    def scenario(bench: Bench) -> None:
        bench.vm(code=False)
        raise KeyError("gone")

    for _ in range(256):  # one more than there may be at a time
        rows = run(kvm, scenario)
        assert outcomes(rows) == ["scenario  -> ended by KeyError: 'gone'"]


def test_a_scenario_that_hangs_is_stopped(kvm: Kvm) -> None:
    def scenario(bench: Bench) -> None:
        guest = bench.vm().agent()
        guest.op(Op.SPIN)
        guest.resume()

    rows = run(kvm, scenario, 0.5)
    assert outcomes(rows) == [
        "guest SPIN  -> interrupted",
        "scenario  -> stopped: it took too long",
    ]


def test_a_record_comes_back_as_it_was(kvm: Kvm) -> None:
    rows = runner.run(kvm, TOPICS[:1])
    text = record.to_json(record.machine(), rows)
    assert record.from_json(text) == (record.machine(), tuple(rows))
    assert "kernel" in json.loads(text)["machine"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is not JSON"), ("[]", "format 1"), ('{"format": 2}', "format 1"),
     ('{"format": 1, "machine": {}}', "damaged"),
     ('{"format": 1, "machine": {}, "topics": {"a": {"b": [["too", "short"]]}}}', "damaged"),
     ('{"format": 1, "machine": {}, "topics": {"a": {"b": [[1, 2, 3, 4, 5, 6]]}}}', "damaged")],
)  # fmt: skip
def test_a_broken_record_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(record.RecordError, match=words):
        record.from_json(text, "a.json")


def test_an_unknown_topic_is_refused_in_words(kvm: Kvm) -> None:
    with pytest.raises(runner.UnknownTopicError, match="no topic 'nothing'; there are vm_types"):
        runner.run(kvm, ("nothing",))


def test_every_topic_runs_on_the_model_to_its_end(kvm: Kvm) -> None:
    rows = runner.run(kvm, seconds=30)
    assert [row for row in rows if row.call == "scenario"] == []
    for topic in TOPICS:
        assert runner.title(topic)
        assert sum(row.topic == topic for row in rows) >= 10
        names = [name for name, _ in runner.scenarios(topic)]
        assert any(name.startswith("good_") for name in names)


def test_the_watchdog_barks_until_it_is_stopped_and_never_for_what_was_in_time() -> None:
    barks: list[str] = []
    heard = threading.Semaphore(0)

    def bark() -> None:
        barks.append("late")
        heard.release()

    with Watchdog() as watchdog:
        watchdog.start(60, lambda: barks.append("in time"))
        watchdog.stop()
        watchdog.start(0.01, bark)
        for _ in range(2):
            assert heard.acquire(timeout=20)
        watchdog.stop()
    assert set(barks) == {"late"}


@pytest.mark.parametrize("backend", ["/nowhere/kvm", "nothing"])
def test_bad_backend_is_one_line(
    backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["scenarios", "--backend", backend])
    assert command() == 1
    error = capsys.readouterr().err
    assert backend in error
    assert "Errno" not in error
    assert error.count("\n") == 1
