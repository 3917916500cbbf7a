# SPDX-License-Identifier: GPL-2.0-or-later
"""What a scenario works with: VMs with the agent in them, and the pen that writes observations.

    def good_share(bench: Bench) -> None:
        vm = bench.vm()
        guest = vm.agent()
        guest.hvc(Function.MEM_SHARE, RAM)
        vm.load(0)

Only what is asked for by `call`, and by the methods that say so, is recorded; making a VM that a
scenario merely needs is not. Guest addresses are IPAs; sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from threading import Timer
from typing import Protocol, TypeVar

from pkvm import guests
from pkvm.check.scenarios import observation
from pkvm.check.scenarios.observation import Observation, Outcome
from pkvm.guests.agent import Agent, AgentCommandError, AgentExitError, GuestExceptionError
from pkvm.guests.protocol import MAILBOX_BASE, Op
from pkvm.kvm import Kvm, Mmio, Vcpu, Vm
from pkvm.kvm.kernel import Memory
from pkvm.uapi.kvm import TYPE_PROTECTED, VcpuFeature

PAGE = 4096
RAM = 0x4000_0000
"""IPA of a VM's RAM, slot 0."""
CODE = 0x8000_0000
"""IPA of the agent, slot 1."""
FREE = 0xC000_0000
"""IPA where nothing is: another slot, or MMIO."""
DEVICE = 0x0A00_0000
"""IPA of a device that is not there: MMIO."""
CODE_PAGES = 64
RAM_SLOT, CODE_SLOT, FREE_SLOT = 0, 1, 2
SECONDS = 60.0
"""After so long a scenario is stopped."""
_PLACES = (
    ("mailbox", MAILBOX_BASE, 0x1000),
    ("device", DEVICE, 1 << 20),
    ("ram", RAM, 1 << 24),
    ("code", CODE, 1 << 24),
    ("free", FREE, 1 << 24),
)
T = TypeVar("T")


After = Callable[[float, Callable[[], None]], Callable[[], object]]
"""Calls something in so many seconds of the machine's time; what it returns calls that off."""


def _after(seconds: float, callback: Callable[[], None]) -> Callable[[], object]:
    """`After` in real time."""
    timer = Timer(seconds, callback)
    timer.daemon = True
    timer.start()
    return timer.cancel


class HungError(Exception):
    """The scenario took too long and was stopped."""


class Closable(Protocol):
    """What the bench closes at a scenario's end."""

    def close(self) -> None:
        """Idempotent."""
        ...


def place(ipa: int) -> str:
    """An IPA in words: "ram+0x1000"."""
    for name, base, size in _PLACES:
        if base <= ipa < base + size:
            return f"{name}+{ipa - base:#x}" if ipa != base else name
    return hex(ipa)


class Bench:
    """One scenario's run on the kernel behind `kvm`. Everything made through it is closed at the
    end of its `with` block, in the reverse order."""

    def __init__(
        self,
        kvm: Kvm,
        topic: str = "",
        scenario: str = "",
        *,
        after: After | None = None,
    ) -> None:
        self.kvm = kvm
        self.observations: list[Observation] = []
        """What was recorded so far."""
        self._topic = topic
        self._scenario = scenario
        self._memories: dict[str, Memory] = {}
        self._vcpus: list[Vcpu] = []
        self._stack = ExitStack()
        self._expired = False
        self._after = after or _after
        self.error: Exception | None = None
        """What the last call raised, None if it returned."""

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def keep(self, thing: Closable) -> None:
        """Close `thing` at the scenario's end."""
        self._stack.callback(thing.close)

    def row(self, call: str, arguments: str, outcome: Outcome) -> Observation:
        """The next observation."""
        number = len(self.observations)
        return Observation(self._topic, self._scenario, number, call, arguments, *outcome)

    def record(self, call: str, arguments: str, outcome: Outcome) -> None:
        """Write an observation. Raises HungError once the scenario's time is up."""
        self.observations.append(self.row(call, arguments, outcome))
        if self._expired:
            raise HungError

    def call(
        self,
        call: str,
        arguments: str,
        function: Callable[[], T],
        show: Callable[[T], str | Outcome] | None = None,
    ) -> T | None:
        """Call `function`, record what comes of it, and return its value; None if it failed.

        `show` puts a value in words where `observation.of_value` would say too much (a time, a
        descriptor) or too little. A `Vm`, `Vcpu` or `Device` that is returned is closed at the end.
        """
        self.error = None
        try:
            value = function()
        except (OSError, AgentExitError, AgentCommandError, GuestExceptionError) as error:
            self.error = error
            self.record(call, arguments, observation.of_error(error, place, self.user))
            return None
        if hasattr(value, "fd"):
            self.adopt(value)
        shown = observation.of_value(value, place) if show is None else show(value)
        outcome = Outcome(shown) if isinstance(shown, str) else shown
        self.record(call, arguments, outcome)
        return value

    def ioctl(
        self,
        call: str,
        arguments: str,
        fd: int,
        request: int,
        argument: int | bytearray = 0,
        show: Callable[[int], str | Outcome] | None = None,
    ) -> int | None:
        """An ioctl that no method is for: recorded under its name. `argument` is written back."""
        return self.call(
            call, arguments, lambda: self.kvm.kernel.ioctl(fd, request, argument), show
        )

    def memory(self, name: str, pages: int) -> Memory:
        """Anonymous memory of `pages` pages; the host's addresses in it are called after `name`."""
        memory = self.kvm.mmap(pages * PAGE)
        self.name(name, memory)
        self.keep(memory)
        return memory

    def name(self, name: str, memory: Memory) -> None:
        """Call addresses in `memory` after `name` in what is recorded."""
        self._memories[name] = memory

    def vm(
        self,
        *,
        protected: bool = True,
        ram_pages: int = 16,
        ram: Memory | None = None,
        name: str = "",
        code: bool = True,
    ) -> BenchVm:
        """A VM with `ram` (default: `ram_pages` zeroed pages) at RAM and the agent at CODE; no
        vCPU yet. `name` tells the memory of a second VM from the first's. Not recorded."""
        vm = self.kvm.create_vm(TYPE_PROTECTED if protected else 0)
        self.adopt(vm)
        if ram is None:
            ram = self.memory(f"{name}ram", ram_pages)
        vm.set_user_memory_region(RAM_SLOT, RAM, ram)
        made = BenchVm(self, vm, ram)
        if code:
            made.code = self.memory(f"{name}code", CODE_PAGES)
            made.code.write(0, guests.image("agent"))
            vm.set_user_memory_region(CODE_SLOT, CODE, made.code)
        return made

    def load(self, memory: Memory, offset: int, length: int = 8) -> None:
        """The host loads from its own memory: recorded."""
        where = self.user(memory.address + offset)
        self.call("host load", f"{where}, {length}", lambda: memory.read(offset, length))

    def store(self, memory: Memory, offset: int, data: bytes) -> None:
        """The host stores to its own memory: recorded."""
        where = self.user(memory.address + offset)
        self.call("host store", f"{where}, {data.hex()}", lambda: memory.write(offset, data))

    def kick_after(self, seconds: float, vcpu: Vcpu, *, stuck: bool = False) -> None:
        """Let `vcpu` be kicked in so many seconds: for a run that would wait for ever, or with
        `stuck` take one exception after the other, for which a machine's own time may stand."""
        after = _after if stuck else self._after
        self._stack.callback(after(seconds, vcpu.kick))

    def adopt(self, value: object) -> None:
        """Close a `Vm`, `Vcpu` or `Device` at the end."""
        close = getattr(value, "close", None)
        if close is not None:
            self._stack.callback(close)
        if isinstance(value, Vcpu):
            self._vcpus.append(value)

    def user(self, address: int) -> str:
        """A user address in words."""
        for name, memory in self._memories.items():
            if memory.address <= address < memory.address + memory.length:
                offset = address - memory.address
                return f"{name}+{offset:#x}" if offset else name
        return "another address"

    def expire(self) -> None:
        """Time is up: every run ends, and the next record ends the scenario. From any thread."""
        self._expired = True
        for vcpu in list(self._vcpus):
            try:
                vcpu.kick()
            except (OSError, ValueError):
                continue  # closed meanwhile


class BenchVm:
    """A VM of a scenario's."""

    def __init__(self, bench: Bench, vm: Vm, ram: Memory) -> None:
        self.bench = bench
        self.vm = vm
        self.ram = ram
        self.code: Memory | None = None
        """The agent's memory."""

    def vcpu(
        self,
        vcpu_id: int = 0,
        *,
        power_off: bool = False,
        features: Iterable[VcpuFeature] = (VcpuFeature.PSCI_0_2,),
    ) -> Vcpu:
        """A vCPU, initialised; unless `power_off` it starts in the agent. Not recorded."""
        vcpu = self.vm.create_vcpu(vcpu_id)
        self.bench.adopt(vcpu)
        vcpu.init(power_off=power_off, features=features)
        if not power_off:
            vcpu.set_reg("pc", CODE)
        return vcpu

    def agent(self, vcpu_id: int = 0) -> Guest:
        """The agent in a vCPU of its own, waiting for a command. Not recorded."""
        guest = self.guest(self.vcpu(vcpu_id))
        guest.agent.start()
        return guest

    def guest(self, vcpu: Vcpu) -> Guest:
        """The agent in `vcpu`, not started."""
        return Guest(self.bench, vcpu)

    def load(self, offset: int, length: int = 8) -> None:
        """The host loads from the VM's RAM: recorded."""
        self.bench.load(self.ram, offset, length)

    def store(self, offset: int, data: bytes) -> None:
        """The host stores to the VM's RAM: recorded."""
        self.bench.store(self.ram, offset, data)

    def slot(
        self,
        slot: int,
        ipa: int,
        memory: Memory | None,
        *,
        flags: int = 0,
        offset: int = 0,
        size: int | None = None,
        says: str = "",
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION: recorded. `says` is put before the arguments."""
        if memory is None:
            user, length = "none", 0
        else:
            user = self.bench.user(memory.address + offset)
            length = memory.length - offset if size is None else size
        words = f"slot {slot} flags {flags} at {place(ipa)} size {length:#x} user {user}"
        self.bench.call(
            "KVM_SET_USER_MEMORY_REGION",
            f"{says}: {words}" if says else words,
            lambda: self.vm.set_user_memory_region(
                slot, ipa, memory, flags=flags, offset=offset, size=size
            ),
        )


class Guest:
    """The agent in a vCPU. Every method but `start` is recorded; what it returns is None if the
    guest took an exception, KVM_RUN failed, or something else than the agent's mailbox was met.
    Then `resume` goes on."""

    def __init__(self, bench: Bench, vcpu: Vcpu) -> None:
        self.bench = bench
        self.vcpu = vcpu
        self.agent = Agent(vcpu, vcpu.id)

    def start(self, says: str = "agent starts") -> None:
        """Run until the agent asks for its first command: recorded."""
        self.bench.call("KVM_RUN", f"vCPU {self.vcpu.id}, {says}", self.agent.start)

    def hvc(self, *x: int, show: int = 4, says: str = "") -> tuple[int, ...] | None:
        """HVC #0; X0 to X(`show` - 1) of what the guest gets are recorded."""
        return self._registers("guest HVC", says, self.agent.hvc, x, show)

    def smc(self, *x: int, show: int = 4, says: str = "") -> tuple[int, ...] | None:
        """SMC #0, likewise."""
        return self._registers("guest SMC", says, self.agent.smc, x, show)

    def op(self, operation: Op, *x: int, show: int = 2, says: str = "") -> tuple[int, ...] | None:
        """An operation of the agent's."""
        return self._registers(
            f"guest {operation.name}", says, lambda *x: self.agent.op(operation, *x), x, show
        )

    def execute(
        self, *words: int, x: Sequence[int] = (), show: int = 1, says: str = ""
    ) -> tuple[int, ...] | None:
        """Up to four instruction words."""
        code = " ".join(f"{word:08x}" for word in words)
        return self._registers(
            "guest executes", says or code, lambda *x: self.agent.execute(*words, x=x), x, show
        )

    def branch(self, address: int, *x: int, show: int = 1, says: str = "") -> None:
        """Call what is at `address`."""
        self._registers("guest branch", says, lambda *x: self.agent.branch(*x), (address, *x), show)

    def load(self, ipa: int, size: int = 8, *, signed: bool = False) -> int | None:
        """A load."""
        return self.bench.call(
            "guest load",
            f"{place(ipa)}, {size}{' signed' if signed else ''}",
            lambda: self.agent.load(ipa, size, signed=signed),
            lambda value: Outcome(guest=hex(value)),
        )

    def store(self, ipa: int, value: int, size: int = 8) -> None:
        """A store."""
        self.bench.call(
            "guest store",
            f"{place(ipa)}, {value:#x}, {size}",
            lambda: self.agent.store(ipa, value, size),
        )

    def mrs(
        self, name: str, encoding: tuple[int, int, int, int, int], *, hide: bool = False
    ) -> None:
        """MRS of the register that is called `name`. `hide`: its value is not recorded."""
        self.bench.call(
            "guest MRS",
            name,
            lambda: self.agent.read_sysreg(*encoding),
            lambda value: Outcome("read", guest="" if hide else hex(value)),
        )

    def msr(self, name: str, encoding: tuple[int, int, int, int, int], value: int) -> None:
        """MSR."""
        self.bench.call(
            "guest MSR",
            f"{name}, {value:#x}",
            lambda: self.agent.write_sysreg(*encoding, value),
        )

    def resume(self, says: str = "goes on", show: int = 4) -> None:
        """Go on with the command that an exit or an error interrupted."""
        self.bench.call(
            "KVM_RUN",
            f"vCPU {self.vcpu.id}, {says}",
            self.agent.resume,
            lambda answer: Outcome(
                f"agent status {answer.status}", guest=observation.registers(answer.results[:show])
            ),
        )

    def answer(self, value: int) -> None:
        """Answer the MMIO read that ended the last command; `resume` comes next. Not recorded."""
        error = self.bench.error
        if isinstance(error, AgentExitError) and isinstance(error.exit, Mmio):
            self.vcpu.complete(error.exit, value)

    def _registers(
        self,
        call: str,
        says: str,
        function: Callable[..., tuple[int, ...]],
        x: Sequence[int],
        show: int,
    ) -> tuple[int, ...] | None:
        arguments = ", ".join(place(value) if value > 9 else str(value) for value in x)
        return self.bench.call(
            call,
            f"{says}: {arguments}" if says and arguments else says or arguments,
            lambda: function(*x),
            lambda results: Outcome(guest=observation.registers(results[:show])),
        )
