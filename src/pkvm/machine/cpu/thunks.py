# SPDX-License-Identifier: GPL-2.0-or-later
"""Native code between libunicorn and Python: the paths too hot for Python.

libunicorn calls a hook for every exception and, if asked, for every translated
block. Both would cost a Python call (about 0.5 us), where most exceptions are
for EL1 and most blocks only want counting. So the hooks are a few machine
instructions in an executable page:

* An exception for EL1 is taken there and then (`arm_cpu_do_interrupt`).
* An exception for EL2 from AArch64 state fills ESR_EL2, and FAR_EL2 for an
  abort. An abort, which is nearly always for the host, stops emulation, and the
  function that started it returns ABORT. Anything else, and an abort while a
  virtual interrupt is pending (see `UnicornEngine._drop_lines`), calls the
  VECTOR callback, which takes no arguments; emulation stops if it returns
  anything but 0.
* Everything else (AArch32 state, translations in doubt, the unexpected) goes to
  the SLOW callback, which takes a hook's arguments and could do it all: it is
  the hook itself on hosts without native code.
* A block adds one to the counter, or stops emulation when the limit is reached,
  before it executes.
* An exception for EL1 with no block executed since the one before means that
  the vector itself cannot be fetched. It counts as a block, so that a guest
  that only faults cannot outlast its slice.
* Emulation starts at PC by a function without arguments: to pass five from
  Python costs twice the start.

The code is position-independent and the same for every engine; addresses come
from a pool of 8-byte words behind it. The words of COUNTERS are blocks so far,
limit, whether the limit stopped emulation, and blocks at the last exception
taken to EL1. Both versions were assembled from the instructions in the
comments.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass

POOL = (
    "UC",
    "CPU",
    "PC",
    "DO_INTERRUPT",
    "EMU_START",
    "EMU_STOP",
    "VECTOR",
    "SLOW",
    "COUNTERS",
    "REQUESTS",
    "PENDING",
    "NO_EXIT",
    "TARGET_EL",
    "AARCH64",
    "SYNDROME",
    "ESR_EL2",
    "VADDRESS",
    "FAR_EL2",
)
"""What the pool's words point to, in order."""
POOL_OFFSET = 0x180
COUNTER_WORDS = 4
COUNT, LIMIT, LIMIT_REACHED, LAST_DELIVERY = range(COUNTER_WORDS)
"""Indices of the words at COUNTERS."""
NO_LIMIT = (1 << 64) - 1
ABORT = -1
"""Status of a start that an abort to EL2 ended."""
LAST_ARCHITECTURAL = 13
"""Highest QEMU exception number that `arm_cpu_do_interrupt` may be given from a hook."""


@dataclass(frozen=True, slots=True)
class NativeCode:
    """Machine code of one host architecture and the offsets of its three entries."""

    text: bytes
    exception: int
    block: int
    start: int


# System V: rdi = uc, esi = exception number; nothing else of the arguments is used.
X86_64 = NativeCode(
    text=bytes.fromhex(
        # exception:
        "48 8b 05 d1 01 00 00"  # mov rax,[NO_EXIT]
        "80 38 01"  # cmp byte [rax],0x1
        "0f 85 c6 00 00 00"  # jne slow
        "83 fe 0d"  # cmp esi,0xd
        "0f 87 bd 00 00 00"  # ja slow
        "48 8b 05 c0 01 00 00"  # mov rax,[TARGET_EL]
        "8b 00"  # mov eax,dword [rax]
        "83 f8 02"  # cmp eax,0x2
        "74 43"  # je to_el2
        "83 f8 01"  # cmp eax,0x1
        "0f 85 a6 00 00 00"  # jne slow
        "48 83 ec 08"  # sub rsp,0x8
        "48 8b 3d 4d 01 00 00"  # mov rdi,[CPU]
        "ff 15 57 01 00 00"  # call [DO_INTERRUPT]
        "48 83 c4 08"  # add rsp,0x8
        "48 8b 15 74 01 00 00"  # mov rdx,[COUNTERS]
        "48 8b 02"  # mov rax,[rdx]
        "48 3b 42 18"  # cmp rax,[rdx+0x18]
        "75 10"  # jne delivered
        "48 3b 42 08"  # cmp rax,[rdx+0x8]
        "0f 83 94 00 00 00"  # jae stop
        "48 ff c0"  # inc rax
        "48 89 02"  # mov [rdx],rax
        # delivered:
        "48 89 42 18"  # mov [rdx+0x18],rax
        "c3"  # ret
        # to_el2:
        "48 8b 05 77 01 00 00"  # mov rax,[AARCH64]
        "83 38 00"  # cmp dword [rax],0x0
        "74 60"  # je slow
        "48 8b 05 73 01 00 00"  # mov rax,[SYNDROME]
        "8b 00"  # mov eax,dword [rax]
        "48 8b 15 72 01 00 00"  # mov rdx,[ESR_EL2]
        "48 89 02"  # mov [rdx],rax
        "8d 46 fd"  # lea eax,[rsi-0x3]
        "83 f8 01"  # cmp eax,0x1
        "77 32"  # ja vector
        "48 8b 05 68 01 00 00"  # mov rax,[VADDRESS]
        "48 8b 00"  # mov rax,[rax]
        "48 8b 15 66 01 00 00"  # mov rdx,[FAR_EL2]
        "48 89 02"  # mov [rdx],rax
        "48 8b 05 1c 01 00 00"  # mov rax,[REQUESTS]
        "f7 00 40 02 00 00"  # test dword [rax],0x240
        "75 0f"  # jne vector
        "48 8b 05 15 01 00 00"  # mov rax,[PENDING]
        "c7 00 01 00 00 00"  # mov dword [rax],0x1
        "eb 38"  # jmp halt
        # vector:
        "48 83 ec 08"  # sub rsp,0x8
        "ff 15 e3 00 00 00"  # call [VECTOR]
        "48 83 c4 08"  # add rsp,0x8
        "85 c0"  # test eax,eax
        "75 26"  # jne halt
        "c3"  # ret
        # slow:
        "ff 25 dc 00 00 00"  # jmp [SLOW]
        # block:
        "48 8b 15 dd 00 00 00"  # mov rdx,[COUNTERS]
        "48 8b 02"  # mov rax,[rdx]
        "48 3b 42 08"  # cmp rax,[rdx+0x8]
        "73 07"  # jae stop
        "48 ff c0"  # inc rax
        "48 89 02"  # mov [rdx],rax
        "c3"  # ret
        # stop:
        "48 c7 42 10 01 00 00 00"  # mov [rdx+0x10],0x1
        # halt:
        "48 8b 3d 7e 00 00 00"  # mov rdi,[UC]
        "ff 25 a0 00 00 00"  # jmp [EMU_STOP]
        # start:
        "48 83 ec 08"  # sub rsp,0x8
        "48 8b 3d 6d 00 00 00"  # mov rdi,[UC]
        "48 8b 05 76 00 00 00"  # mov rax,[PC]
        "48 8b 30"  # mov rsi,[rax]
        "31 d2"  # xor edx,edx
        "31 c9"  # xor ecx,ecx
        "45 31 c0"  # xor r8d,r8d
        "ff 15 76 00 00 00"  # call [EMU_START]
        "48 83 c4 08"  # add rsp,0x8
        "48 8b 15 9b 00 00 00"  # mov rdx,[PENDING]
        "83 3a 00"  # cmp dword [rdx],0x0
        "74 0b"  # je started
        "c7 02 00 00 00 00"  # mov dword [rdx],0x0
        "b8 ff ff ff ff"  # mov eax,0xffffffff
        # started:
        "c3"  # ret
    ),
    exception=0,
    block=220,
    start=264,
)

# AAPCS64: x0 = uc, w1 = exception number.
AARCH64 = NativeCode(
    text=bytes.fromhex(
        # exception:
        "c9 0e 00 58"  # ldr x9, NO_EXIT
        "29 01 40 39"  # ldrb w9, [x9]
        "3f 05 00 71"  # cmp w9, #0x1
        "01 07 00 54"  # b.ne slow
        "3f 34 00 71"  # cmp w1, #0xd
        "c8 06 00 54"  # b.hi slow
        "49 0e 00 58"  # ldr x9, TARGET_EL
        "29 01 40 b9"  # ldr w9, [x9]
        "3f 09 00 71"  # cmp w9, #0x2
        "80 02 00 54"  # b.eq to_el2
        "3f 05 00 71"  # cmp w9, #0x1
        "01 06 00 54"  # b.ne slow
        "fd 7b bf a9"  # stp x29, x30, [sp, #-16]!
        "fd 03 00 91"  # mov x29, sp
        "80 0a 00 58"  # ldr x0, CPU
        "e9 0a 00 58"  # ldr x9, DO_INTERRUPT
        "20 01 3f d6"  # blr x9
        "fd 7b c1 a8"  # ldp x29, x30, [sp], #16
        "ca 0b 00 58"  # ldr x10, COUNTERS
        "4b 31 40 a9"  # ldp x11, x12, [x10]
        "4d 0d 40 f9"  # ldr x13, [x10, #24]
        "7f 01 0d eb"  # cmp x11, x13
        "a1 00 00 54"  # b.ne delivered
        "7f 01 0c eb"  # cmp x11, x12
        "82 05 00 54"  # b.cs stop
        "6b 05 00 91"  # add x11, x11, #0x1
        "4b 01 00 f9"  # str x11, [x10]
        # delivered:
        "4b 0d 00 f9"  # str x11, [x10, #24]
        "c0 03 5f d6"  # ret
        # to_el2:
        "a9 0b 00 58"  # ldr x9, AARCH64
        "29 01 40 b9"  # ldr w9, [x9]
        "89 03 00 34"  # cbz w9, slow
        "89 0b 00 58"  # ldr x9, SYNDROME
        "29 01 40 b9"  # ldr w9, [x9]
        "8a 0b 00 58"  # ldr x10, ESR_EL2
        "49 01 00 f9"  # str x9, [x10]
        "29 0c 00 51"  # sub w9, w1, #0x3
        "3f 05 00 71"  # cmp w9, #0x1
        "c8 01 00 54"  # b.hi vector
        "29 0b 00 58"  # ldr x9, VADDRESS
        "29 01 40 f9"  # ldr x9, [x9]
        "2a 0b 00 58"  # ldr x10, FAR_EL2
        "49 01 00 f9"  # str x9, [x10]
        "e9 08 00 58"  # ldr x9, REQUESTS
        "29 01 40 b9"  # ldr w9, [x9]
        "0a 48 80 52"  # mov w10, #0x240
        "3f 01 0a 6a"  # tst w9, w10
        "a1 00 00 54"  # b.ne vector
        "89 08 00 58"  # ldr x9, PENDING
        "2a 00 80 52"  # mov w10, #0x1
        "2a 01 00 b9"  # str w10, [x9]
        "13 00 00 14"  # b halt
        # vector:
        "fd 7b bf a9"  # stp x29, x30, [sp, #-16]!
        "fd 03 00 91"  # mov x29, sp
        "c9 06 00 58"  # ldr x9, VECTOR
        "20 01 3f d6"  # blr x9
        "fd 7b c1 a8"  # ldp x29, x30, [sp], #16
        "a0 01 00 35"  # cbnz w0, halt
        "c0 03 5f d6"  # ret
        # slow:
        "69 06 00 58"  # ldr x9, SLOW
        "20 01 1f d6"  # br x9
        # block:
        "6a 06 00 58"  # ldr x10, COUNTERS
        "4b 31 40 a9"  # ldp x11, x12, [x10]
        "7f 01 0c eb"  # cmp x11, x12
        "82 00 00 54"  # b.cs stop
        "6b 05 00 91"  # add x11, x11, #0x1
        "4b 01 00 f9"  # str x11, [x10]
        "c0 03 5f d6"  # ret
        # stop:
        "29 00 80 d2"  # mov x9, #0x1
        "49 09 00 f9"  # str x9, [x10, #16]
        # halt:
        "40 03 00 58"  # ldr x0, UC
        "69 04 00 58"  # ldr x9, EMU_STOP
        "20 01 1f d6"  # br x9
        # start:
        "fd 7b bf a9"  # stp x29, x30, [sp, #-16]!
        "fd 03 00 91"  # mov x29, sp
        "a0 02 00 58"  # ldr x0, UC
        "09 03 00 58"  # ldr x9, PC
        "21 01 40 f9"  # ldr x1, [x9]
        "02 00 80 d2"  # mov x2, #0x0
        "03 00 80 d2"  # mov x3, #0x0
        "04 00 80 d2"  # mov x4, #0x0
        "e9 02 00 58"  # ldr x9, EMU_START
        "20 01 3f d6"  # blr x9
        "fd 7b c1 a8"  # ldp x29, x30, [sp], #16
        "09 04 00 58"  # ldr x9, PENDING
        "2a 01 40 b9"  # ldr w10, [x9]
        "6a 00 00 34"  # cbz w10, started
        "3f 01 00 b9"  # str wzr, [x9]
        "00 00 80 12"  # mov w0, #0xffffffff
        # started:
        "c0 03 5f d6"  # ret
    ),
    exception=0,
    block=244,
    start=292,
)


@dataclass(frozen=True, slots=True)
class NativeHooks:
    """The two hooks, as addresses to give to `uc_hook_add`, and `start`, a C function without
    arguments that returns `uc_emu_start`'s status or ABORT; alive as long as this object."""

    exception: int
    block: int
    start: int
    _page: mmap.mmap


def image(code: NativeCode, pool: Mapping[str, int]) -> bytes:
    """`code` with its pool behind it. Raises KeyError if `pool` lacks a word."""
    words = struct.pack(f"<{len(POOL)}Q", *(pool[name] for name in POOL))
    return code.text.ljust(POOL_OFFSET, b"\0") + words


_HOSTS = {
    ("linux", "x86_64"): X86_64,
    ("darwin", "x86_64"): X86_64,
    ("linux", "aarch64"): AARCH64,
}


def host_code() -> NativeCode | None:
    """The code for this host, or None if there is none."""
    return _HOSTS.get((sys.platform, platform.machine()))


def build(pool: Mapping[str, int]) -> NativeHooks | None:
    """Native hooks with `pool`'s addresses; None where they cannot be had: an unknown host, or one
    that refuses writable and executable memory."""
    code = host_code()
    if code is None:
        return None
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    data = image(code, pool)
    page[: len(data)] = data
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    if code is AARCH64 and not _synchronise_instruction_cache(address, len(data)):
        return None
    return NativeHooks(address + code.exception, address + code.block, address + code.start, page)


def _synchronise_instruction_cache(address: int, length: int) -> bool:
    """Make written code visible to instruction fetch; False if the host offers no means."""
    try:
        clear_cache = ctypes.CDLL("libgcc_s.so.1")["__clear_cache"]
    except (OSError, AttributeError):
        return False
    clear_cache.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    clear_cache.restype = None
    clear_cache(address, address + length)
    return True
