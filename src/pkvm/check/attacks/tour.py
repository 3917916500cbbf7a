# SPDX-License-Identifier: GPL-2.0-or-later
"""The tour: attack after attack on one guest, and what each came to.

An attack failed if it gained nothing, EL2's invariants hold and the guest, if
it is to live, finds its secret as it left it. A guest that an attack ends is
followed by a new one on a new machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import NamedTuple

from pkvm.check.attacks import Attack, attack, ends_guest, prepare, where
from pkvm.check.attacks.linux import GuestError, LinuxGuest
from pkvm.check.attacks.scene import Scene
from pkvm.check.attacks.witness import Place, comes_from_el2, place_of, witness
from pkvm.check.invariants import check_hyp
from pkvm.check.mutants import weakened
from pkvm.guests.agent import AgentExitError
from pkvm.host.ffa import FfaCallError
from pkvm.machine.memory import BusError
from pkvm.machine.stage2 import Stage2Fault
from pkvm.system import System

MACHINE_BYTES = 256 << 20
REFUSALS = (OSError, Stage2Fault, BusError, FfaCallError, AgentExitError)
"""How an attacker hears that it may not."""


class End(Enum):
    """What an attack came to."""

    REFUSED = "refused"
    """It gained nothing, and harmed nothing."""
    THROUGH = "through"
    """It gained what it wanted."""
    HARM = "harm"
    """It gained nothing, but the guest's data or EL2's state is not what it was."""


class Verdict(NamedTuple):
    """One attack's."""

    name: str
    tries: str
    guard: str
    end: End
    words: str
    """What it gained or harmed; of one refused, how it was told."""
    places: tuple[Place, ...]
    """The checks that refused, or what took no notice."""
    whole: bool | None
    """Whether the guest's data is as it left it; None if the guest is not to live on."""


class Material(NamedTuple):
    """What a guest is made of, as bytes of files."""

    kernel: bytes
    initrd: bytes


@contextmanager
def staged(material: Material, attacks: Iterable[Attack]) -> Iterator[Scene]:
    """A system with a guest that keeps a secret, after what these attacks do before there is one.
    Raises GuestError, LoadError, OSError.

    The VM is closed at the end if the scene is `sound`; else the whole machine goes at once: an EL2
    that let an attack through may not be able to take a VM apart.
    """
    system = System(MACHINE_BYTES)
    for one in attacks:
        prepare(one, system)
    guest = LinuxGuest(system.open(), material.kernel, material.initrd)
    scene = None
    try:
        guest.start()
        guest.boot()
        scene = Scene(system, guest)
        yield scene
    finally:
        guest.stop()
        if scene is not None and scene.sound:
            guest.vmm.close()
            system.close()
        else:
            system.machine.close()


def tour(
    names: Sequence[str], material: Material, started: Callable[[str], object]
) -> Iterator[Verdict]:
    """The verdicts of these attacks, one guest for all that it survives. `started` is told the name
    of each."""
    with ExitStack() as stack:
        scene: Scene | None = None
        for name in names:
            started(name)
            one = attack(name)
            if scene is None:
                scene = stack.enter_context(staged(material, map(attack, names)))
            verdict = attempt(name, one, scene)
            yield verdict
            if ends_guest(one) or verdict.end is not End.REFUSED:
                scene = None
                stack.close()


def weakened_twin(name: str, material: Material) -> Verdict:
    """The verdict of an attack on an EL2 without its guard, on a machine of its own."""
    one = attack(name)
    with weakened(one.GUARD), staged(material, (one,)) as scene:
        scene.sound = False
        return attempt(name, one, scene)


def attempt(name: str, one: Attack, scene: Scene) -> Verdict:
    """Let one attack try, and look at what it left."""
    told = "it found nothing"
    gained = None
    harm = ""
    broken = _problems(scene)  # a weakened EL2 may have some before
    with witness() as places:
        try:
            gained = one.attempt(scene)
        except REFUSALS as error:
            told = getattr(error, "words", "") or str(error)
        except GuestError as error:
            harm = f"the guest does not answer any more: {error}".splitlines()[0]
        except Exception as error:
            # Whatever else comes out of EL2 is its end. An error of the attack's own is none.
            if not comes_from_el2(error):
                raise
            harm = f"EL2 stopped: {type(error).__name__}: {error}"
    whole = None if ends_guest(one) else not harm and scene.is_whole()
    end, words = End.REFUSED, told
    problems = [problem for problem in _problems(scene) if problem not in broken]
    if gained is not None:
        end, words = End.THROUGH, gained
    elif harm:
        end, words = End.HARM, harm
    elif whole is False:
        end, words = End.HARM, "the guest's data is not as it left it, or it does not answer"
    elif problems:
        end, words = End.HARM, problems[0]
    scene.sound = scene.sound and end is End.REFUSED
    if end is End.REFUSED and not places and where(one):
        places.append(place_of(where(one), one.GUARD))
    return Verdict(name, one.TRIES, one.GUARD, end, words, tuple(places), whole)


def _problems(scene: Scene) -> list[str]:
    return check_hyp(scene.system.hyp) if scene.system.protected else []
