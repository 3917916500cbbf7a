# SPDX-License-Identifier: GPL-2.0-or-later
"""Flattened device trees, version 17 (Devicetree Specification 0.4, chapter 5): read and write.

A tree is plain data: a `Node` has a name, properties (name -> bytes, in order)
and children. `parse` is strict: it gets its bytes from firmware or a user, so
every offset, length and string is checked before it is used, and what is wrong
is said in an `FdtError`. `build` writes what `parse` reads.

Standard library only; whoever hands over a device tree may import it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

MAGIC = 0xD00D_FEED
VERSION = 17
LAST_COMPATIBLE_VERSION = 16
MAX_BYTES = 2 << 20
"""Largest tree that an arm64 kernel takes (Documentation/arch/arm64/booting.rst)."""
MAX_DEPTH = 64

_HEADER = struct.Struct(">10I")
_RESERVATION = struct.Struct(">2Q")
_CELL = struct.Struct(">I")
_PROP = struct.Struct(">2I")
_BEGIN_NODE, _END_NODE, _PROP_TOKEN, _NOP, _END = 1, 2, 3, 4, 9


class FdtError(ValueError):
    """The device tree is malformed, or lacks what was asked of it; the text says what and where."""


@dataclass(slots=True)
class Node:
    """A node: its name with the unit address ("memory@40000000"; "" for the root), its properties
    and its children, both in the order in which they stand in the tree."""

    name: str
    properties: dict[str, bytes] = field(default_factory=dict)
    children: list[Node] = field(default_factory=list)

    def add(self, name: str) -> Node:
        """Append a child and return it. Raises FdtError if there is one of that name."""
        if any(child.name == name for child in self.children):
            raise FdtError(f"node {self.name or '/'} has two children named {name!r}")
        child = Node(name)
        self.children.append(child)
        return child

    def child(self, name: str) -> Node | None:
        """The child of that name; a name without unit address also finds the only child that has
        one (Devicetree Specification 2.2.3). None if there is none or it is ambiguous."""
        near = []
        for child in self.children:
            if child.name == name:
                return child
            if child.name.partition("@")[0] == name:
                near.append(child)
        return near[0] if len(near) == 1 else None

    def find(self, path: str) -> Node | None:
        """The node at a path relative to this one ("reserved-memory/firmware@80000000"; leading
        slashes do not matter; "" or "/" is this node), or None."""
        node: Node | None = self
        for name in path.split("/"):
            if name and node is not None:
                node = node.child(name)
        return node

    def walk(self, path: str = "") -> Iterator[tuple[str, Node]]:
        """This node and all below it with their paths, parents first, in the tree's order."""
        yield path or "/", self
        for child in self.children:
            yield from child.walk(f"{path}/{child.name}")

    def __contains__(self, name: str) -> bool:
        """Whether there is a property of that name (for those whose presence is the value)."""
        return name in self.properties

    def raw(self, name: str) -> bytes:
        """The bytes of a property. Raises FdtError if there is none."""
        try:
            return self.properties[name]
        except KeyError:
            raise FdtError(f"node {self.name or '/'} has no property {name!r}") from None

    def cells(self, name: str) -> tuple[int, ...]:
        """A property as big-endian 32-bit cells. Raises FdtError if absent or of odd length."""
        value = self.raw(name)
        if len(value) % 4:
            raise FdtError(
                f"property {name!r} of node {self.name or '/'} has {len(value)} bytes: "
                "not a whole number of cells"
            )
        return struct.unpack(f">{len(value) // 4}I", value)

    def u32(self, name: str, default: int | None = None) -> int:
        """A property of one cell; `default` where it is absent. Raises FdtError."""
        if default is not None and name not in self.properties:
            return default
        return self._one(name, 1)

    def u64(self, name: str) -> int:
        """A property of two cells, the high one first. Raises FdtError."""
        return self._one(name, 2)

    def strings(self, name: str) -> tuple[str, ...]:
        """A property as a list of NUL-terminated strings. Raises FdtError."""
        value = self.raw(name)
        if not value.endswith(b"\0"):
            raise FdtError(
                f"property {name!r} of node {self.name or '/'} is not a NUL-terminated string"
            )
        try:
            return tuple(value[:-1].decode().split("\0"))
        except UnicodeDecodeError:
            raise FdtError(
                f"property {name!r} of node {self.name or '/'} is not a string (UTF-8)"
            ) from None

    def string(self, name: str) -> str:
        """A property that is one string. Raises FdtError."""
        strings = self.strings(name)
        if len(strings) != 1:
            raise FdtError(
                f"property {name!r} of node {self.name or '/'} has {len(strings)} strings, not one"
            )
        return strings[0]

    def is_compatible(self, name: str) -> bool:
        """Whether `compatible` lists `name`. A node without it is compatible with nothing."""
        return "compatible" in self.properties and name in self.strings("compatible")

    def reg(self, parent: Node) -> list[tuple[int, int]]:
        """`reg` as (address, size) pairs, in the cell sizes that `parent` sets (2 and 1 where it
        sets none; Devicetree Specification 2.3.5). Raises FdtError."""
        address_cells = parent.u32("#address-cells", 2)
        size_cells = parent.u32("#size-cells", 1)
        if not 1 <= address_cells <= 2 or size_cells > 2:
            raise FdtError(
                f"node {parent.name or '/'}: #address-cells {address_cells} and #size-cells "
                f"{size_cells} are not what memory has (1 or 2, and 0 to 2)"
            )
        cells = self.cells("reg")
        step = address_cells + size_cells
        if len(cells) % step:
            raise FdtError(
                f"reg of node {self.name or '/'} has {len(cells)} cells: not a multiple of {step}"
            )
        return [
            (
                _join(cells[i : i + address_cells]),
                _join(cells[i + address_cells : i + step]),
            )
            for i in range(0, len(cells), step)
        ]

    def set_empty(self, name: str) -> None:
        """Set a property whose presence is its value."""
        self.properties[name] = b""

    def set_u32(self, name: str, *values: int) -> None:
        """Set a property of 32-bit cells. Raises FdtError for a value that does not fit."""
        self.properties[name] = self._pack(name, "I", values)

    def set_u64(self, name: str, *values: int) -> None:
        """Set a property of 64-bit values, two cells each. Raises FdtError."""
        self.properties[name] = self._pack(name, "Q", values)

    def set_strings(self, name: str, *values: str) -> None:
        """Set a property of one or more strings. Raises FdtError for a string with a NUL."""
        for value in values:
            if "\0" in value:
                raise FdtError(f"property {name!r}: a string holds a NUL: {value!r}")
        self.properties[name] = b"".join(value.encode() + b"\0" for value in values)

    def _one(self, name: str, count: int) -> int:
        cells = self.cells(name)
        if len(cells) != count:
            raise FdtError(
                f"property {name!r} of node {self.name or '/'} has {len(cells)} cells, not {count}"
            )
        return _join(cells)

    def _pack(self, name: str, code: str, values: tuple[int, ...]) -> bytes:
        try:
            return struct.pack(f">{len(values)}{code}", *values)
        except struct.error as error:
            raise FdtError(f"property {name!r} of node {self.name or '/'}: {error}") from None


@dataclass(slots=True)
class Tree:
    """A device tree: its root node and what the header and the reservation block say."""

    root: Node = field(default_factory=lambda: Node(""))
    reservations: list[tuple[int, int]] = field(default_factory=list)
    """Memory reservation block: (address, bytes)."""
    boot_cpuid: int = 0


def build(tree: Tree, *, padding: int = 0) -> bytes:
    """Flatten `tree`; `padding` zero bytes at the end are counted in `totalsize`, as room for a
    firmware that edits the tree in place. Raises FdtError for names that cannot be written or a
    tree that is deeper than MAX_DEPTH or larger than MAX_BYTES."""
    if tree.root.name:
        raise FdtError(f"the root node must not have a name, not {tree.root.name!r}")
    strings = bytearray()
    offsets: dict[str, int] = {}
    structure = bytearray()

    def emit(node: Node, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise FdtError(f"the tree is deeper than {MAX_DEPTH} nodes at {node.name!r}")
        if depth > 1:
            _check_name("node", node.name)
        structure.extend(_CELL.pack(_BEGIN_NODE))
        _append_padded(structure, node.name.encode() + b"\0")
        for name, value in node.properties.items():
            if name not in offsets:
                _check_name("property", name)
                offsets[name] = len(strings)
                strings.extend(name.encode() + b"\0")
            structure.extend(_CELL.pack(_PROP_TOKEN) + _PROP.pack(len(value), offsets[name]))
            _append_padded(structure, value)
        seen: set[str] = set()
        for child in node.children:
            if child.name in seen:
                raise FdtError(f"node {node.name or '/'} has two children named {child.name!r}")
            seen.add(child.name)
            emit(child, depth + 1)
        structure.extend(_CELL.pack(_END_NODE))

    emit(tree.root, 1)
    structure.extend(_CELL.pack(_END))
    try:
        reserved = b"".join(_RESERVATION.pack(*entry) for entry in [*tree.reservations, (0, 0)])
    except struct.error as error:
        raise FdtError(f"memory reservation: {error}") from None
    if (0, 0) in tree.reservations:
        raise FdtError("a memory reservation of address 0 and size 0 would end the block")
    reserved_at = _HEADER.size
    structure_at = reserved_at + len(reserved)
    strings_at = structure_at + len(structure)
    total = strings_at + len(strings) + padding
    if total > MAX_BYTES:
        raise FdtError(f"the tree has {total} bytes: more than {MAX_BYTES}")
    header = _HEADER.pack(
        MAGIC, total, structure_at, strings_at, reserved_at, VERSION, LAST_COMPATIBLE_VERSION,
        tree.boot_cpuid, len(strings), len(structure),
    )  # fmt: skip
    return b"".join((header, reserved, structure, strings, bytes(padding)))


def parse(data: bytes | bytearray | memoryview) -> Tree:
    """Read a flattened tree. Bytes after `totalsize` are ignored (a region is often larger than
    the tree in it). Raises FdtError for anything malformed or truncated."""
    if len(data) < _HEADER.size:
        raise FdtError(f"{len(data)} bytes are too few for a device tree's header of 40")
    (
        magic, total, structure_at, strings_at, reserved_at, version, compatible,
        boot_cpuid, strings_size, structure_size,
    ) = _HEADER.unpack_from(data)  # fmt: skip
    if magic != MAGIC:
        raise FdtError(f"not a device tree: it starts with {magic:#010x}, not {MAGIC:#010x}")
    if version < VERSION or compatible > VERSION:
        raise FdtError(
            f"device tree version {version} (compatible with {compatible}) is not readable: "
            f"version {VERSION} is (make it with dtc -V {VERSION})"
        )
    if total > MAX_BYTES:
        raise FdtError(f"the tree claims {total} bytes: more than {MAX_BYTES}")
    if total > len(data):
        raise FdtError(f"the tree is truncated: it claims {total} bytes and has {len(data)}")
    if reserved_at % 8 or structure_at % 4:
        raise FdtError("the reservation block or the structure block is not aligned")
    image = bytes(data[:total])
    structure = _block(image, structure_at, structure_size, "structure")
    strings = _block(image, strings_at, strings_size, "strings")
    reservations = _read_reservations(image, reserved_at)
    blocks = sorted(
        (
            (0, _HEADER.size, "header"),
            (reserved_at, _RESERVATION.size * (len(reservations) + 1), "reservation block"),
            (structure_at, structure_size, "structure block"),
            (strings_at, strings_size, "strings block"),
        )
    )
    for (start, size, name), (other, _, other_name) in pairwise(blocks):
        if start + size > other:
            raise FdtError(f"the {name} and the {other_name} overlap")
    return Tree(_read_structure(structure, strings), reservations, boot_cpuid)


def _read_reservations(image: bytes, start: int) -> list[tuple[int, int]]:
    entries: list[tuple[int, int]] = []
    for at in range(start, len(image) - _RESERVATION.size + 1, _RESERVATION.size):
        entry: tuple[int, int] = _RESERVATION.unpack_from(image, at)
        if entry == (0, 0):
            return entries
        entries.append(entry)
    raise FdtError("the memory reservation block has no end")


def _read_structure(structure: bytes, strings: bytes) -> Node:
    root: Node | None = None
    open_nodes: list[Node] = []
    taken: list[set[str]] = []  # names of the children so far, one set an open node
    at = 0
    while True:
        token, at = _cell(structure, at)
        if token == _NOP:
            continue
        if token == _END:
            break
        if root is not None and not open_nodes:
            raise FdtError(f"token {token:#x} after the end of the root node")
        if token == _BEGIN_NODE:
            name, at = _node_name(structure, at)
            if root is None:
                if name:
                    raise FdtError(f"the root node has a name: {name!r}")
                root = node = Node("")
            else:
                _check_name("node", name)
                if name in taken[-1]:
                    raise FdtError(
                        f"node {open_nodes[-1].name or '/'} has two children named {name!r}"
                    )
                taken[-1].add(name)
                node = Node(name)
                open_nodes[-1].children.append(node)
            open_nodes.append(node)
            taken.append(set())
            if len(open_nodes) > MAX_DEPTH:
                raise FdtError(f"the tree is deeper than {MAX_DEPTH} nodes at {name!r}")
        elif token == _END_NODE and open_nodes:
            open_nodes.pop()
            taken.pop()
        elif token == _PROP_TOKEN and open_nodes:
            at = _read_property(structure, at, strings, open_nodes[-1])
        else:
            raise FdtError(f"unexpected token {token:#x} at offset {at - 4:#x} of the structure")
    if root is None or open_nodes:
        where = f"inside node {open_nodes[-1].name or '/'}" if open_nodes else "before the root"
        raise FdtError(f"the structure block ends {where}")
    if at != len(structure):
        raise FdtError(f"{len(structure) - at} bytes of the structure block follow its end token")
    return root


def _read_property(structure: bytes, at: int, strings: bytes, node: Node) -> int:
    length, at = _cell(structure, at)
    name_at, at = _cell(structure, at)
    if node.children:
        raise FdtError(f"node {node.name or '/'} has a property after a child node")
    end = strings.find(b"\0", name_at)
    if name_at >= len(strings) or end < 0:
        raise FdtError(f"a property of node {node.name or '/'} has its name outside the strings")
    name = strings[name_at:end].decode("latin-1")
    _check_name("property", name)
    if length > len(structure) - at:
        raise FdtError(f"property {name!r} of node {node.name or '/'} is truncated")
    if name in node.properties:
        raise FdtError(f"node {node.name or '/'} has property {name!r} twice")
    node.properties[name] = structure[at : at + length]
    return _align4(at + length)


def _node_name(structure: bytes, at: int) -> tuple[str, int]:
    end = structure.find(b"\0", at)
    if end < 0:
        raise FdtError(f"the node name at offset {at:#x} of the structure has no end")
    return structure[at:end].decode("latin-1"), _align4(end + 1)


def _cell(structure: bytes, at: int) -> tuple[int, int]:
    if at + 4 > len(structure):
        raise FdtError(f"the structure block is truncated at offset {at:#x}")
    value: int = _CELL.unpack_from(structure, at)[0]
    return value, at + 4


def _block(image: bytes, start: int, size: int, name: str) -> bytes:
    if start > len(image) or size > len(image) - start:
        raise FdtError(
            f"the {name} block (offset {start:#x}, {size:#x} bytes) does not lie in the tree's "
            f"{len(image):#x} bytes"
        )
    return image[start : start + size]


def _check_name(kind: str, name: str) -> None:
    if not name or not all("!" <= c <= "~" and c != "/" for c in name):
        raise FdtError(f"{name!r} cannot be the name of a {kind}")


def _append_padded(buffer: bytearray, data: bytes) -> None:
    buffer.extend(data)
    buffer.extend(bytes(-len(data) % 4))


def _align4(value: int) -> int:
    return (value + 3) & ~3


def _join(cells: tuple[int, ...]) -> int:
    value = 0
    for cell in cells:
        value = value << 32 | cell
    return value
