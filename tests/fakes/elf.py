# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes ELF files, good and bad."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from pkvm.vmm.board import IMAGE_BASE

EM_AARCH64 = 183
ET_EXEC, ET_DYN = 2, 3
PT_LOAD = 1


@dataclass
class Phdr:
    ipa: int
    data: bytes = b""
    memory: int | None = None
    flags: int = 7
    kind: int = PT_LOAD
    file_bytes: int | None = None
    """Overrides what the header says."""


@dataclass
class Elf:
    entry: int = IMAGE_BASE
    phdrs: list[Phdr] = field(default_factory=lambda: [Phdr(IMAGE_BASE, b"\xd5" * 16)])
    kind: int = ET_EXEC
    machine: int = EM_AARCH64
    elf_class: int = 2
    endian: int = 1

    def build(self) -> bytes:
        order = "<" if self.endian == 1 else ">"
        at = 64 + 56 * len(self.phdrs)
        headers, bodies = b"", b""
        for phdr in self.phdrs:
            in_file = len(phdr.data) if phdr.file_bytes is None else phdr.file_bytes
            memory = len(phdr.data) if phdr.memory is None else phdr.memory
            headers += struct.pack(
                order + "II6Q", phdr.kind, phdr.flags, at, phdr.ipa, phdr.ipa, in_file, memory, 4096
            )
            bodies += phdr.data
            at += len(phdr.data)
        ident = b"\x7fELF" + bytes((self.elf_class, self.endian, 1)) + bytes(9)
        header = struct.pack(
            order + "HHIQQQIHHHHHH", self.kind, self.machine, 1, self.entry, 64, 0, 0, 64, 56,
            len(self.phdrs), 64, 0, 0,
        )  # fmt: skip
        return ident + header + headers + bodies
