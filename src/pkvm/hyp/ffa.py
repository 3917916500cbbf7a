# SPDX-License-Identifier: GPL-2.0-or-later
"""The FF-A proxy: between the host and a secure world that believes it (facts §9.4).

The secure world reaches all memory and cannot know whose a page is. A host that
lends it a guest's page would have it read the guest's secrets: the confused
deputy. So EL2 speaks with the secure world in the host's name. It lets memory
through that is the host's own, marks it as given for as long as the secure
world has it, and refuses calls that it cannot follow.

A transaction in several fragments is kept until it is complete. When one of its
fragments is refused, by EL2 or by the secure world, all of it is taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pkvm.arm64 import ffa, ffa_memory
from pkvm.arm64.ffa import W_MASK, Function, Registers, Status
from pkvm.arm64.ffa_memory import Constituent
from pkvm.arm64.stage2 import PAGE_SIZE
from pkvm.events import Message, Recorder, Refusal
from pkvm.hyp.errors import Refused
from pkvm.hyp.ffa_buffers import FfaBuffers
from pkvm.hyp.ffa_memory import (
    FfaRefused,
    SecureSharing,
    first_ranges,
    invalid,
    more_ranges,
)
from pkvm.hyp.mem_protect import MemProtect
from pkvm.machine.host_cpus import HostCpu

MAX_BYTES = 4 * PAGE_SIZE
"""Of a transaction's descriptors: about a thousand ranges."""
REFUSED = frozenset(
    {
        Function.FFA_RXTX_MAP_32,
        Function.FFA_MEM_DONATE_32,
        Function.FFA_MEM_DONATE_64,
        Function.FFA_MEM_RETRIEVE_REQ_32,
        Function.FFA_MEM_RETRIEVE_REQ_64,
        Function.FFA_MEM_RELINQUISH,
        Function.FFA_MEM_OP_PAUSE,
        Function.FFA_MEM_OP_RESUME,
        Function.FFA_MEM_FRAG_RX,
        Function.FFA_MSG_SEND,
        Function.FFA_MSG_SEND2,
        Function.FFA_MSG_POLL,
        Function.FFA_MSG_WAIT,
        Function.FFA_NOTIFICATION_BITMAP_CREATE,
        Function.FFA_NOTIFICATION_BITMAP_DESTROY,
        Function.FFA_NOTIFICATION_BIND,
        Function.FFA_NOTIFICATION_UNBIND,
        Function.FFA_NOTIFICATION_SET,
        Function.FFA_NOTIFICATION_GET,
        Function.FFA_NOTIFICATION_INFO_GET_32,
        Function.FFA_NOTIFICATION_INFO_GET_64,
        Function.FFA_RX_ACQUIRE,
        Function.FFA_MSG_SEND_DIRECT_REQ2,
        Function.FFA_MSG_SEND_DIRECT_RESP2,
        Function.FFA_CONSOLE_LOG_32,
        Function.FFA_CONSOLE_LOG_64,
        Function.FFA_PARTITION_INFO_GET_REGS,
    }
)
"""Calls that the host does not have."""


class Passed(Exception):
    """The secure world refused: the host gets its answer."""

    def __init__(self, answer: Registers) -> None:
        super().__init__(f"the secure world answered {answer[:4]}")
        self.answer = answer


@dataclass(slots=True)
class Pending:
    """A transaction of which fragments are missing."""

    handle: int
    total_bytes: int
    received_bytes: int
    ranges: list[Constituent]
    lend: bool


class FfaProxy:
    """The proxy. `el3` is EL3's vector. Whoever calls holds EL2's lock for SMCs."""

    def __init__(
        self,
        mem: MemProtect,
        el3: Callable[[HostCpu, Registers], Registers],
        recorder: Recorder,
    ) -> None:
        self._mem = mem
        self._el3 = el3
        self._record = recorder.record
        self._sharing = SecureSharing(mem)
        self._version = 0
        """What host, EL2 and secure world speak; 0 until the host has asked."""
        self._buffers: FfaBuffers | None = None
        self._pending: Pending | None = None
        self._calls: dict[int, Callable[[HostCpu, Registers], Registers]] = {
            Function.FFA_FEATURES: self._features,
            Function.FFA_RXTX_MAP_64: self._rxtx_map,
            Function.FFA_RXTX_UNMAP: self._rxtx_unmap,
            Function.FFA_RX_RELEASE: self._rx_release,
            Function.FFA_PARTITION_INFO_GET: self._partition_info,
            Function.FFA_MEM_SHARE_32: self._give,
            Function.FFA_MEM_SHARE_64: self._give,
            Function.FFA_MEM_LEND_32: self._give,
            Function.FFA_MEM_LEND_64: self._give,
            Function.FFA_MEM_FRAG_TX: self._next_fragment,
            Function.FFA_MEM_RECLAIM: self._reclaim,
        }

    @property
    def host_buffers(self) -> tuple[int, ...]:
        """PAs of the host's buffers; none if there are none."""
        return () if self._buffers is None else self._buffers.host

    def call(self, cpu: HostCpu, function: int, registers: Registers) -> Registers:
        """An FF-A call of the host's on `cpu`: X0-X17 for the host."""
        if function == Function.FFA_VERSION:
            return ffa.registers(self._negotiate(cpu, registers[1] & W_MASK))
        try:
            if not self._version:
                raise invalid("ffa_version", "no version has been agreed on")
            if function in REFUSED:
                why = "the host does not have this call"
                raise FfaRefused(Status.NOT_SUPPORTED, "ffa_function", why)
            handler = self._calls.get(function)
            if handler is None:
                return self._el3(cpu, registers)
            return handler(cpu, (function, *registers[1:]))
        except FfaRefused as refused:
            name = _name(function)
            self._record(Refusal(name, refused.check, 0, refused.why, pa=refused.pa))
            return ffa.error(refused.status)
        except Passed as passed:
            return passed.answer
        finally:
            if self._buffers is not None:
                self._buffers.clear()

    def _negotiate(self, cpu: HostCpu, asked: int) -> int:
        """FFA_VERSION: the version, or VERSION_NOT_SUPPORTED. The host may have a lower one than
        EL2 would take, but has only one choice."""
        fields = ffa.VERSION.decode(asked)
        if fields["mbz"] or fields["major"] != 1:
            return ffa.VERSION_NOT_SUPPORTED
        if self._version:
            return self._version if asked >= self._version else ffa.VERSION_NOT_SUPPORTED
        version = min(asked, ffa.VERSION_1_2)
        answer = self._el3(cpu, ffa.registers(Function.FFA_VERSION, version))[0] & W_MASK
        if answer == ffa.VERSION_NOT_SUPPORTED:
            return answer
        try:
            self._buffers = FfaBuffers(self._mem)
        except Refused:
            return ffa.VERSION_NOT_SUPPORTED
        self._version = min(version, answer)
        return self._version

    def _features(self, cpu: HostCpu, x: Registers) -> Registers:
        if x[1] & W_MASK in REFUSED:
            raise FfaRefused(Status.NOT_SUPPORTED, "ffa_function", "the host does not have it")
        return self._el3(cpu, x)

    def _rxtx_map(self, cpu: HostCpu, x: Registers) -> Registers:
        buffers = self._own()
        with self._mem.lock:
            buffers.map(*x[1:4])
            try:
                self._ask(cpu, Function.FFA_RXTX_MAP_64, buffers.tx, buffers.rx, 1)
            except Passed:
                buffers.unmap()
                raise
        return ffa.success()

    def _rxtx_unmap(self, cpu: HostCpu, x: Registers) -> Registers:
        if x[1] & W_MASK:
            raise invalid("ffa_sender", "another endpoint's buffers")
        buffers = self._mapped()
        with self._mem.lock:
            buffers.check_unmap()
            self._ask(cpu, Function.FFA_RXTX_UNMAP)
            buffers.unmap()
        return ffa.success()

    def _rx_release(self, cpu: HostCpu, x: Registers) -> Registers:
        """EL2's own buffer was released when its message was copied."""
        buffers = self._mapped()
        if not buffers.host_has_rx:
            raise FfaRefused(Status.DENIED, "ffa_rx", "the buffer is not the host's to release")
        buffers.host_has_rx = False
        return ffa.success()

    def _partition_info(self, cpu: HostCpu, x: Registers) -> Registers:
        buffers = self._mapped()
        if buffers.host_has_rx:
            raise FfaRefused(Status.BUSY, "ffa_rx", "the host has not released its buffer")
        answer = self._ask(cpu, Function.FFA_PARTITION_INFO_GET, *x[1:6])
        if x[5] & ffa.COUNT_ONLY and self._version > ffa.VERSION_1_0:
            return answer
        size = ffa_memory.PARTITION_INFO_1_0_BYTES
        if self._version > ffa.VERSION_1_0:
            size = answer[3] & W_MASK
        nbytes = (answer[2] & W_MASK) * size
        buffers.deliver(self._receive(cpu, nbytes))
        return answer

    def _give(self, cpu: HostCpu, x: Registers) -> Registers:
        """MEM_SHARE and MEM_LEND."""
        buffers = self._mapped()
        total, length = x[1] & W_MASK, x[2] & W_MASK
        if x[3] or x[4] & W_MASK:
            raise invalid("ffa_buffer", "descriptors lie in the TX buffer only")
        if length > total:
            raise invalid("ffa_fragment", "a fragment is longer than the whole")
        if total > MAX_BYTES:
            why = f"more than {MAX_BYTES} bytes of descriptors"
            raise FfaRefused(Status.NO_MEMORY, "ffa_length", why)
        if length < total and self._pending is not None:
            why = "another transaction waits for fragments"
            raise FfaRefused(Status.BUSY, "ffa_pending", why)
        data = buffers.take(length)
        ranges = first_ranges(data, total, self._version)
        lend = x[0] in (Function.FFA_MEM_LEND_32, Function.FFA_MEM_LEND_64)
        self._sharing.give(ranges, lend=lend)
        buffers.send(data)
        answer = self._el3(cpu, ffa.registers(x[0], total, length))
        return self._settle(cpu, answer, Pending(0, total, length, ranges, lend))

    def _next_fragment(self, cpu: HostCpu, x: Registers) -> Registers:
        buffers = self._mapped()
        pending = self._pending
        if pending is None or ffa.handle_of(x[1], x[2]) != pending.handle or x[4] & W_MASK:
            raise invalid("ffa_handle", "no fragment of this transaction is missing")
        length = x[3] & W_MASK
        try:
            if not 0 < length <= pending.total_bytes - pending.received_bytes:
                raise invalid("ffa_fragment", f"{length} bytes are not what is missing")
            data = buffers.take(length)
            ranges = more_ranges(data)
            self._sharing.give(ranges, lend=pending.lend)
        except FfaRefused:
            self._give_up(cpu, pending)
            raise
        buffers.send(data)
        pending.ranges += ranges
        pending.received_bytes += length
        request = ffa.registers(Function.FFA_MEM_FRAG_TX, x[1] & W_MASK, x[2] & W_MASK, length)
        return self._settle(cpu, self._el3(cpu, request), pending)

    def _settle(self, cpu: HostCpu, answer: Registers, sent: Pending) -> Registers:
        """The secure world's answer to a fragment whose pages are marked already."""
        function = answer[0] & W_MASK
        if sent.received_bytes == sent.total_bytes:
            if function == Function.FFA_SUCCESS_32:
                if sent is self._pending:
                    self._pending = None
                return answer
        elif function == Function.FFA_MEM_FRAG_RX and answer[3] & W_MASK == sent.received_bytes:
            sent.handle = ffa.handle_of(answer[1], answer[2])
            self._pending = sent
            return answer
        refused = ffa.status_of(answer) is not None
        if not refused:
            handle = 2 if function == Function.FFA_SUCCESS_32 else 1
            sent.handle = ffa.handle_of(*answer[handle : handle + 2])
        self._give_up(cpu, sent, refused=refused)
        return answer if refused else ffa.error(Status.ABORTED)

    def _give_up(self, cpu: HostCpu, sent: Pending, *, refused: bool = False) -> bool:
        """Take a transaction back that is not complete, and which the secure world `refused`
        itself or not. What it does not let go of stays given: then False."""
        if sent is self._pending:
            self._pending = None
        gone = refused
        if sent.handle:
            words = ffa.handle_words(sent.handle)
            answer = self._el3(cpu, ffa.registers(Function.FFA_MEM_RECLAIM, *words))
            if answer[0] & W_MASK == Function.FFA_SUCCESS_32:
                gone = True
            elif ffa.status_of(answer) != Status.INVALID_PARAMETERS:
                gone = False
        if gone:
            self._sharing.take_back(sent.ranges)
            return True
        why = f"the secure world may keep {len(sent.ranges)} ranges: they stay given"
        self._record(Message("el2", why))
        return False

    def _reclaim(self, cpu: HostCpu, x: Registers) -> Registers:
        handle, flags = ffa.handle_of(x[1], x[2]), x[3] & W_MASK
        words = ffa.handle_words(handle)
        pending = self._pending
        if pending is not None and pending.handle == handle:
            return ffa.success() if self._give_up(cpu, pending) else ffa.error(Status.DENIED)
        ranges = self._describe(cpu, handle)
        self._sharing.check_given(ranges)
        answer = self._ask(cpu, Function.FFA_MEM_RECLAIM, *words, flags)
        self._sharing.take_back(ranges)
        return answer

    def _describe(self, cpu: HostCpu, handle: int) -> list[Constituent]:
        """What the secure world says it has under this handle."""
        buffers = self._mapped()
        version = self._version
        request = ffa_memory.write_retrieval(version, handle)
        buffers.send(request)
        size = len(request)
        answer = self._ask(cpu, Function.FFA_MEM_RETRIEVE_REQ_32, size, size)
        total, length = answer[1] & W_MASK, answer[2] & W_MASK
        if answer[0] & W_MASK != Function.FFA_MEM_RETRIEVE_RESP or total > MAX_BYTES:
            raise FfaRefused(Status.ABORTED, "ffa_retrieve", "the secure world's answer is none")
        data = self._receive(cpu, length)
        while len(data) < total:
            words = ffa.handle_words(handle)
            answer = self._ask(cpu, Function.FFA_MEM_FRAG_RX, *words, len(data))
            part = self._receive(cpu, answer[3] & W_MASK)
            if answer[0] & W_MASK != Function.FFA_MEM_FRAG_TX or not part:
                raise FfaRefused(Status.ABORTED, "ffa_retrieve", "a fragment is missing")
            data += part
        return first_ranges(data, total, version)

    def _receive(self, cpu: HostCpu, nbytes: int) -> bytes:
        """The message in EL2's RX buffer, which goes back to the secure world."""
        buffers = self._mapped()
        data = buffers.received(min(nbytes, PAGE_SIZE))
        self._el3(cpu, ffa.registers(Function.FFA_RX_RELEASE))
        if nbytes > PAGE_SIZE:
            raise FfaRefused(Status.ABORTED, "ffa_length", "a message longer than its buffer")
        return data

    def _ask(self, cpu: HostCpu, function: Function, *arguments: int) -> Registers:
        """A call of the secure world. Raises Passed with an error."""
        answer = self._el3(cpu, ffa.registers(function, *arguments))
        if ffa.status_of(answer) is not None:
            raise Passed(answer)
        return answer

    def _own(self) -> FfaBuffers:
        assert self._buffers is not None
        return self._buffers

    def _mapped(self) -> FfaBuffers:
        """The buffers, of which the host's are there. Raises FfaRefused."""
        buffers = self._own()
        if not buffers.host:
            raise invalid("ffa_unmapped", "the host has no buffers")
        return buffers


def _name(function: int) -> str:
    try:
        return Function(function).name.lower()
    except ValueError:
        return f"{function:#010x}"
