# SPDX-License-Identifier: GPL-2.0-or-later
"""P12 to P14: what EL2 holds for its VMs; each is broken on purpose, and seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from fakes.el2_rig import El2, Guest
from pkvm.check.invariants import check_hyp
from pkvm.hyp.abi import HostCall
from pkvm.hyp.vmemmap import HOST_OWNED, HYP_OWNED


@dataclass
class Scene:
    """A protected VM with two vCPUs, one of them loaded, and a non-protected VM."""

    el2: El2
    guest: Guest
    plain: Guest

    def page(self, pa: int) -> int:
        return (pa - self.el2.machine.memory.ram_base) >> 12


@pytest.fixture
def scene() -> Scene:
    el2 = El2()
    guest, plain = Guest(el2, vcpus=2), Guest(el2, protected=False)
    guest.load(1)
    assert check_hyp(el2.hyp) == []
    return Scene(el2, guest, plain)


def missing_pin(scene: Scene) -> None:
    scene.el2.hyp.mem.unpin_shared(scene.guest.page)


def pin_too_many(scene: Scene) -> None:
    scene.el2.hyp.mem.pin_shared(scene.guest.vcpus[0])


def pin_for_nothing(scene: Scene) -> None:
    page = scene.el2.shared_page()
    assert check_hyp(scene.el2.hyp) == []
    scene.el2.hyp.mem.pin_shared(page)


def unshared_under_el2(scene: Scene) -> None:
    scene.el2.hyp.mem.vmemmap.state[scene.page(scene.plain.vcpus[0])] = HOST_OWNED


def two_loaded(scene: Scene) -> None:
    scene.guest.vcpu(0).loaded = 1
    scene.guest.vm.users = 2


def user_left_over(scene: Scene) -> None:
    scene.plain.vm.users = 1


def dying_and_loaded(scene: Scene) -> None:
    scene.guest.vm.dying = 1


def page_for_nothing(scene: Scene) -> None:
    scene.el2.hyp.mem.host_donate_hyp(scene.el2.pages() >> 12, 1)


def area_of_the_hosts(scene: Scene) -> None:
    scene.el2.hyp.mem.vmemmap.state[scene.page(scene.guest.areas[1])] = HOST_OWNED


def forgotten_area(scene: Scene) -> None:
    """As if finalize had left a vCPU's pages behind."""
    scene.guest.vm.vcpus[0] = None


def table_page_dropped(scene: Scene) -> None:
    scene.guest.vm.memcache.alloc()


@pytest.mark.parametrize(
    ("rule", "break_it"),
    [
        ("P12", missing_pin),
        ("P12", pin_too_many),
        ("P12", pin_for_nothing),
        ("P12", unshared_under_el2),
        ("P13", two_loaded),
        ("P13", user_left_over),
        ("P13", dying_and_loaded),
        ("P14", page_for_nothing),
        ("P14", area_of_the_hosts),
        ("P14", forgotten_area),
        ("P14", table_page_dropped),
    ],
)
def test_what_is_broken_is_seen(scene: Scene, rule: str, break_it: Callable[[Scene], None]) -> None:
    break_it(scene)
    problems = check_hyp(scene.el2.hyp)
    assert any(problem.startswith(f"{rule}: ") for problem in problems), problems


def test_everything_comes_back(scene: Scene) -> None:
    """A VM's whole life, checked after each call of its end."""
    hyp = scene.el2.hyp
    scene.el2.call(HostCall.VCPU_PUT)
    for guest in (scene.guest, scene.plain):
        guest.end()
        assert check_hyp(hyp) == []
    assert (hyp.mem.vmemmap.states == HYP_OWNED).sum() == sum(
        nbytes >> 12 for _, nbytes in (hyp.mem.carveout, hyp.mem.firmware or (0, 0))
    )
