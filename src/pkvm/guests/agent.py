# SPDX-License-Identifier: GPL-2.0-or-later
"""Drives the agent (guests/agent) in a vCPU: one command, one result.

The agent asks for a command by reading a register of the mailbox. Between two
commands the vCPU therefore stands in an MMIO exit, and a command is the answer
to that read. Whatever else KVM_RUN returns meanwhile belongs to the test: MMIO
outside of this CPU's bank goes to `on_mmio`, any other exit is raised as
`AgentExitError`, after which `resume` waits on.

    agent = Agent(vcpu)
    agent.start()
    agent.hvc(0x8400_0000)          # X0-X7 afterwards
    agent.load(0x3000_0000)         # raises GuestExceptionError if the guest took one

Addresses are the guest's: IPA, until it turns its MMU on. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

from pkvm.guests.protocol import MAILBOX_BASE, Boot, Command, Mailbox, Op, Sealed, Status

_MASK64 = (1 << 64) - 1
_NO_RESULTS = (0,) * Mailbox.RESULTS
_LOADS = {1: Op.LDRB, 2: Op.LDRH, 4: Op.LDR_W, 8: Op.LDR_X}
_SIGNED_LOADS = {1: Op.LDRSB_X, 2: Op.LDRSH_X, 4: Op.LDRSW, 8: Op.LDR_X}
_STORES = {1: Op.STRB, 2: Op.STRH, 4: Op.STR_W, 8: Op.STR_X}
_MRS_X0 = 0xD530_0000
_MSR_X0 = 0xD510_0000


class MmioExit(Protocol):
    """The fields of `pkvm.kvm.Mmio`, which this leaf cannot import."""

    @property
    def address(self) -> int:
        """IPA of the first byte."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def data(self) -> int:
        """What a write stores."""
        ...

    @property
    def is_write(self) -> bool:
        """Whether it is a store."""
        ...


class AgentVcpu(Protocol):
    """What the driver needs of a vCPU: `pkvm.kvm.Vcpu` has it."""

    def run(self) -> object:
        """Run the guest until its next exit."""
        ...

    def complete(self, mmio: Any, value: int) -> None:
        """Answer an MMIO read that `run` returned."""
        ...


class Answer(NamedTuple):
    """How a command ended."""

    status: int
    """A `Status`."""
    results: tuple[int, ...]
    """RESULT0-7."""


class SealedResult(NamedTuple):
    """What an operation changed in a CPU whose registers were filled (Command.SEALED)."""

    x: int
    """Mask of changed X registers, of those that were filled."""
    v: int
    """Mask of changed V registers."""
    system: Sealed
    """Changed system registers."""
    results: tuple[int, int, int, int]
    """X0-X3 afterwards."""
    first: int
    """Content of the first changed X register."""


class GuestExceptionError(Exception):
    """The operation raised an exception that the guest took to EL1."""

    def __init__(self, results: Sequence[int]) -> None:
        self.esr, self.far, self.elr, self.spsr, self.vector = results[:5]
        self.x = tuple(results[5:8])
        """X0-X2 at the exception."""
        super().__init__(
            f"exception class {self.esr >> 26:#x}, ESR {self.esr:#x}, FAR {self.far:#x}, "
            f"ELR {self.elr:#x}, SPSR {self.spsr:#x}, vector {self.vector:#x}"
        )


class AgentExitError(Exception):
    """KVM_RUN returned something that is not the agent's: `exit` is what. The command is still
    under way; `Agent.resume` waits on."""

    def __init__(self, exit_: object) -> None:
        super().__init__(f"the vCPU left the guest with {exit_!r}")
        self.exit = exit_


class AgentCommandError(Exception):
    """The agent does not know the command, or an exception broke the agent itself; `answer` has
    what it said."""

    def __init__(self, answer: Answer) -> None:
        status = answer.status
        word = next((known.name for known in Status if known == status), str(status))
        super().__init__(f"the agent answers {word}: {', '.join(map(hex, answer.results))}")
        self.answer = answer


def _is_mmio(exit_: object) -> TypeGuard[MmioExit]:
    return hasattr(exit_, "is_write")


class Agent:
    """The agent in one vCPU, at mailbox bank `cpu` (its MPIDR's Aff0).

    `on_mmio` gets every other MMIO exit: what it returns answers a read. Without it such an exit
    is raised.
    """

    def __init__(
        self,
        vcpu: AgentVcpu,
        cpu: int = 0,
        *,
        mailbox: int = MAILBOX_BASE,
        on_mmio: Callable[[MmioExit], int] | None = None,
    ) -> None:
        self.vcpu = vcpu
        self._bank = mailbox + Mailbox.BANK * cpu
        self.on_mmio = on_mmio
        """Answers the MMIO exits that are not this bank's; may be replaced between commands."""
        self._asking: MmioExit | None = None
        """The exit in which the agent waits for a command."""
        self._args: Sequence[int] = ()
        self._data: Sequence[int] = ()
        self._results = list(_NO_RESULTS)
        self._status = 0

    def start(self) -> None:
        """Run the vCPU until the agent asks for its first command. Raises AgentExitError."""
        self._wait()

    def call(self, command: int, args: Sequence[int] = (), data: Sequence[int] = ()) -> Answer:
        """Give a command with ARG0- and DATA0- and wait for its end. Values are taken modulo 2^64.
        Raises AgentExitError; ValueError if there are more values than registers."""
        if len(args) > Mailbox.ARGS or len(data) > Mailbox.DATAS:
            raise ValueError(f"{len(args)} arguments and {len(data)} registers do not fit")
        if self._asking is None:
            raise RuntimeError("the agent does not wait for a command: call start() or resume()")
        self._args, self._data = args, data
        self._results = list(_NO_RESULTS)
        self._status = 0
        self.vcpu.complete(self._asking, command)
        return self.resume()

    def resume(self) -> Answer:
        """Wait on for the end of a command that `AgentExitError` interrupted."""
        self._asking = None
        self._wait()
        return Answer(self._status, tuple(self._results))

    def _wait(self) -> None:
        """Serve the mailbox until COMMAND is read."""
        while True:
            exit_ = self.vcpu.run()
            if not _is_mmio(exit_):
                raise AgentExitError(exit_)
            offset = exit_.address - self._bank
            if not 0 <= offset < Mailbox.BANK:
                if self.on_mmio is None:
                    raise AgentExitError(exit_)
                self.vcpu.complete(exit_, self.on_mmio(exit_))
            elif exit_.is_write:
                self._store(offset, exit_.data)
            elif offset == Mailbox.COMMAND:
                self._asking = exit_
                return
            else:
                self.vcpu.complete(exit_, self._fetch(offset) & _MASK64)

    def _fetch(self, offset: int) -> int:
        for base, values in ((Mailbox.ARG, self._args), (Mailbox.DATA, self._data)):
            index = offset - base >> 3
            if 0 <= index < len(values):
                return values[index]
        return 0

    def _store(self, offset: int, value: int) -> None:
        index = offset - Mailbox.RESULT >> 3
        if 0 <= index < Mailbox.RESULTS:
            self._results[index] = value
        elif offset == Mailbox.STATUS:
            self._status = value

    def _done(
        self, command: int, args: Sequence[int] = (), data: Sequence[int] = ()
    ) -> tuple[int, ...]:
        answer = self.call(command, args, data)
        if answer.status == Status.EXCEPTION:
            raise GuestExceptionError(answer.results)
        if answer.status != Status.DONE:
            raise AgentCommandError(answer)
        return answer.results

    def op(self, operation: Op, *x: int) -> tuple[int, ...]:
        """Run an operation with X0, X1, ... and return X0-X7 afterwards.

        This and all below raise GuestExceptionError if the guest took an exception instead,
        AgentExitError and AgentCommandError.
        """
        return self._done(Command.RUN, (len(x), operation), x)

    def hvc(self, *x: int) -> tuple[int, ...]:
        """HVC #0 with X0, X1, ... (at most 16); X0-X7 afterwards."""
        return self.op(Op.HVC, *x)

    def smc(self, *x: int) -> tuple[int, ...]:
        """SMC #0, as `hvc`."""
        return self.op(Op.SMC, *x)

    def load(self, address: int, size: int = 8, *, signed: bool = False) -> int:
        """Load 1, 2, 4 or 8 bytes by one instruction with a valid syndrome; sign-extended to 64
        bits (and returned unsigned) if `signed`."""
        return self.op((_SIGNED_LOADS if signed else _LOADS)[size], address)[1]

    def store(self, address: int, value: int, size: int = 8) -> None:
        """Store the low 1, 2, 4 or 8 bytes of `value`, likewise."""
        self.op(_STORES[size], address, value)

    def execute(self, *words: int, x: Sequence[int] = ()) -> tuple[int, ...]:
        """Execute up to four A64 instruction words with X0, X1, ... = `x`; X0-X7 afterwards. They
        must fall through at their end; X30 belongs to the agent."""
        return self._done(Command.EXECUTE, (len(x), *words), x)

    def branch(self, address: int, *x: int) -> tuple[int, ...]:
        """Call what is at `address` with X0, X1, ...; X0-X7 when it returns."""
        return self._done(Command.BRANCH, (len(x), address), x)

    def eret(self, spsr: int, *words: int, x: Sequence[int] = ()) -> GuestExceptionError:
        """ERET to up to four instruction words with SPSR_EL1 = `spsr` and X0, X1, ... = `x`: EL0
        (0x3C0), AArch32 EL0 (0x1D0 for A32, 0x1F0 for T32), or what a test dares. SVC #0 follows
        the words; returned is the exception by which the guest comes back to EL1."""
        try:
            padded = (*words, 0, 0, 0, 0)[:4]
            results = self._done(Command.ERET, (len(x), *padded, spsr), x)
        except GuestExceptionError as exception:
            return exception
        raise AgentCommandError(Answer(Status.DONE, results))

    def read_sysreg(self, op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
        """MRS of a system register by its encoding (op0 2 or 3)."""
        return self.execute(_MRS_X0 | _sysreg_bits(op0, op1, crn, crm, op2))[0]

    def write_sysreg(self, op0: int, op1: int, crn: int, crm: int, op2: int, value: int) -> None:
        """MSR of `value` to a system register by its encoding, and ISB."""
        self.execute(_MSR_X0 | _sysreg_bits(op0, op1, crn, crm, op2), 0xD503_3FDF, x=(value,))

    def sealed(self, operation: Op, *x: int, seed: int = 1) -> SealedResult:
        """Run a one-instruction operation with X0, X1, ... = `x` and all other registers filled
        with a pattern of `seed`; tell what it changed."""
        results = self._done(Command.SEALED, (len(x), operation, seed), x)
        x0, x1, x2, x3 = results[3:7]
        return SealedResult(
            results[0], results[1], Sealed(results[2]), (x0, x1, x2, x3), results[7]
        )

    def boot_state(self) -> tuple[int, ...]:
        """The words of the state in which this CPU was entered, to be indexed by `Boot`."""
        words: list[int] = []
        for first in range(0, Boot.WORDS, 8):
            words += self._done(Command.BOOT, (first,))
        return tuple(words)

    def info(self) -> tuple[int, ...]:
        """Where things are, to be indexed by `Info`."""
        return self._done(Command.INFO)


def _sysreg_bits(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    return (op0 & 1) << 19 | op1 << 16 | crn << 12 | crm << 8 | op2 << 5


def pattern(seed: int, n: int) -> int:
    """Word `n` of a seed's pattern, as the guest programs make it (guests/lib/text.c): what a
    private page holds, for a test that looks whether the host can see it."""
    z = (seed + (n + 1) * 0x9E37_79B9_7F4A_7C15) & _MASK64
    z = ((z ^ z >> 30) * 0xBF58_476D_1CE4_E5B9) & _MASK64
    z = ((z ^ z >> 27) * 0x94D0_49BB_1331_11EB) & _MASK64
    return z ^ z >> 31
