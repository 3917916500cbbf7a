# SPDX-License-Identifier: GPL-2.0-or-later
"""pkvm.fdt: what is written is read back, dtc agrees, and no malformed tree gets through."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvm import fdt
from pkvm.fdt import FdtError, Node, Tree

names = st.text("abcdefghijklmnopqrstuvwxyz0123456789,._+-", min_size=1, max_size=12)
u64 = st.integers(0, 2**64 - 1)


@st.composite
def nodes(draw: st.DrawFn, depth: int = 3) -> Node:
    children = []
    if depth:
        for name in draw(st.lists(names, unique=True, max_size=3)):
            child = draw(nodes(depth - 1))
            child.name = name
            children.append(child)
    return Node("", draw(st.dictionaries(names, st.binary(max_size=20), max_size=4)), children)


trees = st.builds(
    Tree,
    nodes(),
    st.lists(st.tuples(u64, u64).filter(any), max_size=3),
    st.integers(0, 2**32 - 1),
)


def sample() -> Tree:
    tree = Tree(reservations=[(0x8000_0000, 0x1000)])
    root = tree.root
    root.set_strings("compatible", "pkvm,virt", "linux,dummy-virt")
    root.set_u32("#address-cells", 2)
    root.set_u32("#size-cells", 2)
    memory = root.add("memory@40000000")
    memory.set_strings("device_type", "memory")
    memory.set_u64("reg", 0x4000_0000, 0x1000_0000)
    reserved = root.add("reserved-memory")
    reserved.set_u32("#address-cells", 2)
    reserved.set_u32("#size-cells", 2)
    reserved.set_empty("ranges")
    firmware = reserved.add("firmware@9fe00000")
    firmware.set_strings("compatible", "linux,pkvm-guest-firmware-memory")
    firmware.set_u64("reg", 0x9FE0_0000, 0x20_0000)
    firmware.set_empty("no-map")
    return tree


def dtc(blob: bytes, out: str) -> tuple[bytes, str]:
    done = subprocess.run(
        ["dtc", "-I", "dtb", "-O", out, "-q", "-"], input=blob, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout, done.stderr.decode()


def words(blob: bytes, changes: dict[int, int]) -> bytes:
    changed = bytearray(blob)
    for index, value in changes.items():
        struct.pack_into(">I", changed, 4 * index, value)
    return bytes(changed)


@given(trees, st.integers(0, 64))
def test_what_is_built_is_parsed(tree: Tree, padding: int) -> None:
    blob = fdt.build(tree, padding=padding)
    assert fdt.parse(blob) == tree
    assert fdt.parse(blob + b"behind the tree") == tree
    assert int.from_bytes(blob[4:8], "big") == len(blob)


def test_dtc_reads_what_is_built_and_we_read_what_dtc_writes() -> None:
    tree = sample()
    source, complaints = dtc(fdt.build(tree), "dts")
    assert complaints == ""
    text = source.decode()
    assert 'compatible = "pkvm,virt", "linux,dummy-virt";' in text.replace("\\0", '", "')
    assert re.search(r"/memreserve/\s+0x0*80000000 0x0*1000;", text)
    again, _ = dtc(fdt.build(tree), "dtb")
    assert fdt.parse(again) == tree


def test_access_by_path_property_and_cells() -> None:
    tree = fdt.parse(fdt.build(sample()))
    root = tree.root
    assert [path for path, _ in root.walk()] == [
        "/",
        "/memory@40000000",
        "/reserved-memory",
        "/reserved-memory/firmware@9fe00000",
    ]
    parent = root.find("/reserved-memory")
    assert parent is not None
    node = root.find("reserved-memory/firmware")
    assert node is not None
    assert node is parent.child("firmware@9fe00000")
    assert node.is_compatible("linux,pkvm-guest-firmware-memory")
    assert not node.is_compatible("linux,pkvm")
    assert "no-map" in node
    assert "reusable" not in node
    assert node.reg(parent) == [(0x9FE0_0000, 0x20_0000)]
    assert node.cells("reg") == (0, 0x9FE0_0000, 0, 0x20_0000)
    assert root.u32("#address-cells") == 2
    assert root.u32("#interrupt-cells", 7) == 7
    assert root.strings("compatible") == ("pkvm,virt", "linux,dummy-virt")
    memory = root.find("/memory")
    assert memory is not None
    assert memory.string("device_type") == "memory"
    assert root.find("/nowhere/at/all") is None
    assert root.find("/") is root


def test_a_name_without_unit_address_must_be_unambiguous() -> None:
    root = Node("")
    root.add("cpu@0")
    assert root.find("cpu") is not None
    root.add("cpu@1")
    assert root.find("cpu") is None
    assert root.find("cpu@1") is not None


def test_reg_in_other_cell_sizes() -> None:
    parent = Node("bus")
    child = parent.add("device@10")
    child.set_u32("reg", 0x10, 0x20, 0x30, 0x40)
    parent.set_u32("#address-cells", 1)
    assert child.reg(parent) == [(0x10, 0x20), (0x30, 0x40)]
    parent.set_u32("#size-cells", 0)
    assert child.reg(parent) == [(0x10, 0), (0x20, 0), (0x30, 0), (0x40, 0)]
    parent.set_u32("#address-cells", 3)
    with pytest.raises(FdtError, match="#address-cells 3"):
        child.reg(parent)
    with pytest.raises(FdtError, match="4 cells: not a multiple of 3"):
        child.reg(Node("a parent that sets none: 2 and 1"))


@pytest.mark.parametrize(
    ("value", "ask", "words"),
    [
        (b"abc", lambda n: n.cells("p"), "not a whole number of cells"),
        (b"abcdefgh", lambda n: n.u32("p"), "2 cells, not 1"),
        (b"abcd", lambda n: n.u64("p"), "1 cells, not 2"),
        (b"abcd", lambda n: n.string("p"), "not a NUL-terminated string"),
        (b"", lambda n: n.string("p"), "not a NUL-terminated string"),
        (b"a\0b\0", lambda n: n.string("p"), "2 strings, not one"),
        (b"\xff\0", lambda n: n.string("p"), "not a string"),
        (b"", lambda n: n.raw("q"), "no property 'q'"),
    ],
)
def test_a_property_of_another_shape_is_refused(
    value: bytes, ask: Callable[[Node], object], words: str
) -> None:
    with pytest.raises(FdtError, match=words):
        ask(Node("n", {"p": value}))


BLOB = fdt.build(sample())
STRUCT_AT, STRINGS_AT = struct.unpack_from(">2I", BLOB, 8)
STRINGS_SIZE, STRUCT_SIZE = struct.unpack_from(">2I", BLOB, 32)
FIRST_PROP = STRUCT_AT // 4 + 2
"""Word index of the first property's token: after BEGIN_NODE and the root's empty name."""


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({0: 0xD00D_FEEE}, "not a device tree"),
        ({1: len(BLOB) + 1}, "truncated"),
        ({1: 0xFFFF_FFFF}, "more than"),
        ({1: 40}, "does not lie in"),
        ({5: 16}, "version 16"),
        ({6: 18}, "compatible with 18"),
        ({2: STRUCT_AT + 2}, "not aligned"),
        ({4: 44}, "not aligned"),
        ({2: 0xFFFF_FFFC}, "structure block"),
        ({9: 0xFFFF_FFFF}, "structure block"),
        ({9: STRUCT_SIZE - 4}, "truncated"),
        ({9: STRUCT_SIZE + 4}, "follow its end|overlap"),
        ({3: 0xFFFF_FFFF}, "strings block"),
        ({3: STRUCT_AT}, "overlap"),
        ({2: 0}, "overlap"),
        ({4: STRUCT_AT}, "overlap|no end"),
        ({8: 4}, "outside the strings"),
        ({STRUCT_AT // 4: 2}, "unexpected token 0x2"),
        ({STRUCT_AT // 4: 9}, "before the root"),
        ({FIRST_PROP: 7}, "unexpected token 0x7"),
        ({FIRST_PROP: 9}, "inside node /"),
        ({FIRST_PROP + 1: 0xFFFF_FFFF}, "truncated"),
        ({FIRST_PROP + 2: 0xFFFF_FFFF}, "outside the strings"),
        ({FIRST_PROP - 1: 0x41000000}, "root node has a name"),
    ],
)
def test_a_malformed_tree_says_what_is_wrong(changes: dict[int, int], what: str) -> None:
    with pytest.raises(FdtError, match=what):
        fdt.parse(words(BLOB, changes))


@pytest.mark.parametrize("length", range(0, len(BLOB), 7))
def test_a_truncated_tree_is_refused(length: int) -> None:
    with pytest.raises(FdtError):
        fdt.parse(BLOB[:length])


def flat(*tokens: int | bytes) -> bytes:
    """A tree with this structure block, and the strings "a\\0b\\0"."""
    structure = b"".join(t if isinstance(t, bytes) else struct.pack(">I", t) for t in tokens)
    strings = b"a\0b\0"
    header = struct.pack(
        ">10I", fdt.MAGIC, 56 + len(structure) + len(strings), 56, 56 + len(structure), 40,
        17, 16, 0, len(strings), len(structure),
    )  # fmt: skip
    return header + bytes(16) + structure + strings


def test_structures_that_no_tree_has() -> None:
    node, end, prop, done = 1, 2, 3, 9
    assert fdt.parse(flat(node, 0, 4, prop, 0, 0, end, 4, done)).root.properties == {"a": b""}
    for tokens, what in (
        ((node, 0, prop, 0, 0, prop, 0, 0, end, done), "'a' twice"),
        ((node, 0, node, b"x\0\0\0", end, prop, 0, 0, end, done), "after a child"),
        ((node, 0, node, b"x\0\0\0", end, node, b"x\0\0\0", end, end, done), "two children"),
        ((node, 0, end, node, 0, end, done), "after the end of the root"),
        ((node, 0, end, end, done), "after the end of the root"),
        ((node, 0, end), "truncated"),
        ((node, b"xxxx"), "has no end"),
        ((node, 0, node, 0, end, end, done), "cannot be the name"),
        ((node, 0, node, b"a/b\0", end, end, done), "cannot be the name"),
        ((node, 0, prop, 0, 1, end, done), "cannot be the name"),
        ((node, 0) * 1 + (node, b"x\0\0\0") * 80, "deeper than"),
    ):
        with pytest.raises(FdtError, match=what):
            fdt.parse(flat(*tokens))


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(FdtError):
        fdt.parse(data)


@given(st.lists(st.tuples(st.integers(0, len(BLOB) - 1), st.integers(0, 255)), max_size=6))
def test_a_corrupted_tree_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(BLOB)
    for at, value in changes:
        data[at] = value
    try:
        tree = fdt.parse(data)
    except FdtError:
        return
    assert fdt.parse(fdt.build(tree)) == tree


def test_what_cannot_be_written_is_refused() -> None:
    deep = Tree()
    node = deep.root
    for _ in range(fdt.MAX_DEPTH):
        node = node.add("x")
    twice = Tree(Node("", {}, [Node("x"), Node("x")]))
    for tree, what in (
        (Tree(Node("root")), "must not have a name"),
        (Tree(Node("", {"": b""})), "cannot be the name of a property"),
        (Tree(Node("", {}, [Node("a/b")])), "cannot be the name of a node"),
        (Tree(Node("", {"p": bytes(fdt.MAX_BYTES)})), "more than"),
        (Tree(reservations=[(0, 0)]), "would end the block"),
        (Tree(reservations=[(-1, 0)]), "memory reservation"),
        (twice, "two children"),
        (deep, "deeper than"),
    ):
        with pytest.raises(FdtError, match=what):
            fdt.build(tree)
    with pytest.raises(FdtError, match="two children"):
        twice.root.add("x")
    with pytest.raises(FdtError, match="NUL"):
        Node("").set_strings("p", "a\0b")
    with pytest.raises(FdtError, match="'p'"):
        Node("").set_u32("p", 1 << 32)
