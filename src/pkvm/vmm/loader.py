# SPDX-License-Identifier: GPL-2.0-or-later
"""Images: flat binaries, ELF files and kernel files, from bytes to segments at IPAs.

An image comes from a user and may be anything. Whatever is wrong with it is a
`LoadError` that says what to do; what passes lies wholly in RAM, behind the
device tree, and does not overlap itself.
"""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any, NamedTuple

from pkvm.vmm.board import DTB_BYTES, IMAGE_BASE, RAM_BASE, Board
from pkvm.vmm.errors import LoadError

ELF_MAGIC = b"\x7fELF"
GZIP_MAGIC = b"\x1f\x8b"
IMAGE_MAGIC = b"ARM\x64"
IMAGE_MAGIC_AT = 56
_HOW_TO_LINK = (
    f"link it statically at {IMAGE_BASE:#x} or above (ld -static -no-pie -Ttext={IMAGE_BASE:#x})"
)


class Segment(NamedTuple):
    """Bytes at an IPA, followed by zeroes up to `memory_bytes`."""

    ipa: int
    data: bytes
    memory_bytes: int

    @property
    def end(self) -> int:
        """IPA behind the segment's last byte, zeroes included."""
        return self.ipa + self.memory_bytes


class Image(NamedTuple):
    """What to load and where to enter it (IPA)."""

    segments: tuple[Segment, ...]
    entry: int
    page_bytes: int = 0
    """The granule of the kernel's own page tables, if its header says: 4, 16 or 64 KiB; else 0."""

    @property
    def base(self) -> int:
        """IPA of the lowest byte."""
        return min(segment.ipa for segment in self.segments)

    @property
    def size(self) -> int:
        """Bytes from the lowest to the highest, gaps included."""
        return max(segment.end for segment in self.segments) - self.base


def is_image_format(data: bytes) -> bool:
    """Whether these bytes have the header of Linux's arm64 `Image`."""
    return data[IMAGE_MAGIC_AT : IMAGE_MAGIC_AT + 4] == IMAGE_MAGIC


def is_zboot(data: bytes) -> bool:
    """Whether these bytes begin like an EFI zboot file."""
    return data[:2] == b"MZ" and data[4:8] == b"zimg"


def is_kernel_file(data: bytes) -> bool:
    """Whether these bytes begin like a kernel file: an Image, a gzip file or an EFI zboot file."""
    return is_image_format(data) or is_zboot(data) or data.startswith(GZIP_MAGIC)


def load_image(data: bytes, board: Board) -> Image:
    """An ELF file by its own physical addresses, a kernel file where its header says, anything
    else as a flat binary at IMAGE_BASE. Raises LoadError."""
    if not data:
        raise LoadError("the image is empty")
    if data.startswith(ELF_MAGIC):
        return _load_elf(data, board)
    if is_kernel_file(data):
        # Imported here: not every run has a kernel.
        from pkvm.vmm.kernel_file import load_kernel

        return load_kernel(data, board)
    room = board.bounce_base - IMAGE_BASE
    if len(data) > room:
        raise LoadError(
            f"the image has {len(data)} bytes, and RAM has room for {max(room, 0)} behind the "
            f"device tree: give the guest more with --memory"
        )
    return Image((Segment(IMAGE_BASE, data, len(data)),), IMAGE_BASE)


def _load_elf(data: bytes, board: Board) -> Image:
    header, program_headers = _read_elf(data)
    _check_elf_header(header)
    segments = []
    executable = []
    for number, phdr in enumerate(program_headers):
        if phdr["p_type"] != "PT_LOAD" or phdr["p_memsz"] == 0:
            continue
        segment = _segment(number, phdr, data, board)
        segments.append(segment)
        if phdr["p_flags"] & 1:
            executable.append(segment)
    if not segments:
        raise LoadError(f"the ELF file has nothing to load (no PT_LOAD): {_HOW_TO_LINK}")
    segments.sort(key=lambda segment: segment.ipa)
    for lower, upper in pairwise(segments):
        if lower.end > upper.ipa:
            raise LoadError(
                f"ELF segments at {lower.ipa:#x} and {upper.ipa:#x} overlap: link it again"
            )
    entry = header["e_entry"]
    if entry % 4 or not any(s.ipa <= entry < s.end for s in executable):
        raise LoadError(
            f"the ELF entry point {entry:#x} is not the address of an instruction in an "
            "executable segment: link it with physical equal to virtual addresses and an entry "
            "symbol (ld -e _start)"
        )
    return Image(tuple(segments), entry)


def _read_elf(data: bytes) -> tuple[Any, list[Any]]:
    # Imported here: most runs load no ELF file, and it costs 30 ms.
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        elf = ELFFile(io.BytesIO(data))
        return elf.header, [segment.header for segment in elf.iter_segments()]
    except ELFError as error:
        raise LoadError(f"the ELF file cannot be read ({error}): is it truncated?") from None
    except Exception as error:
        # pyelftools lets whatever its parser stumbles over escape (KeyError, AttributeError,
        # UnicodeDecodeError, MemoryError, ... by file): all of it means one thing here.
        raise LoadError(
            f"the ELF file is malformed ({type(error).__name__}: {error}): build it again"
        ) from None


def _check_elf_header(header: Any) -> None:
    ident = header["e_ident"]
    if ident["EI_CLASS"] != "ELFCLASS64" or header["e_machine"] != "EM_AARCH64":
        raise LoadError(
            f"the ELF file is {ident['EI_CLASS']} {header['e_machine']}, not AArch64: "
            "build it for aarch64"
        )
    if ident["EI_DATA"] != "ELFDATA2LSB":
        raise LoadError("the ELF file is big-endian: build it little-endian")
    if header["e_type"] == "ET_DYN":
        raise LoadError(
            f"the ELF file is position-independent (ET_DYN), and nobody here relocates it: "
            f"{_HOW_TO_LINK}"
        )
    if header["e_type"] != "ET_EXEC":
        raise LoadError(f"the ELF file is {header['e_type']}, not an executable: {_HOW_TO_LINK}")


def _segment(number: int, phdr: Any, data: bytes, board: Board) -> Segment:
    offset, ipa = phdr["p_offset"], phdr["p_paddr"]
    in_file, in_memory = phdr["p_filesz"], phdr["p_memsz"]
    if in_file > in_memory:
        raise LoadError(
            f"ELF segment {number} has {in_file} bytes in the file and only {in_memory} in "
            "memory: link it again"
        )
    if offset + in_file > len(data):
        raise LoadError(
            f"ELF segment {number} ends at byte {offset + in_file} of a file of {len(data)}: "
            "the file is truncated, copy it again"
        )
    first = RAM_BASE + DTB_BYTES
    if ipa < first or ipa + in_memory > board.bounce_base:
        raise LoadError(
            f"ELF segment {number} ({ipa:#x} to {ipa + in_memory:#x}) does not lie in the RAM "
            f"that images may use ({first:#x} to {board.bounce_base:#x}; the device tree is "
            f"below): {_HOW_TO_LINK}, or give the guest more with --memory"
        )
    return Segment(ipa, data[offset : offset + in_file], in_memory)
