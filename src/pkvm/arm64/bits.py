# SPDX-License-Identifier: GPL-2.0-or-later
"""Bit layouts as immutable data: declared once, used to encode, decode and print.

A register or descriptor is a `Layout` of `Field`s. `encode` refuses a value
that does not fit and says which; hot paths take the ready-made `mask` and
`shift` of a field as module constants instead of calling anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Field:
    """Bits [hi:lo] of a register, inclusive, by the Arm ARM's numbering.

    `names` gives words for values, used by `Layout.describe`.
    """

    name: str
    hi: int
    lo: int
    names: Mapping[int, str] = field(default_factory=dict, compare=False)

    @property
    def width(self) -> int:
        """Number of bits."""
        return self.hi - self.lo + 1

    @property
    def mask(self) -> int:
        """The field's bits in place."""
        return ((1 << self.width) - 1) << self.lo

    def get(self, word: int) -> int:
        """The field's value in `word`, shifted down."""
        return (word >> self.lo) & ((1 << self.width) - 1)

    def put(self, value: int) -> int:
        """`value` shifted into place. Raises ValueError if it does not fit."""
        if not 0 <= value < 1 << self.width:
            raise ValueError(f"{self.name} is {self.width} bits wide and cannot hold {value:#x}")
        return value << self.lo


class Layout:
    """A register's or descriptor's fields; fields must not overlap (ValueError)."""

    def __init__(self, name: str, *fields: Field) -> None:
        taken = 0
        for item in fields:
            if taken & item.mask:
                raise ValueError(f"{name}.{item.name} overlaps another field")
            taken |= item.mask
        self.name = name
        self.fields: dict[str, Field] = {item.name: item for item in fields}

    def __getitem__(self, name: str) -> Field:
        return self.fields[name]

    def encode(self, **values: int) -> int:
        """The word with these fields set and all others 0.

        Raises KeyError for an unknown field and ValueError for a value out of range.
        """
        word = 0
        for name, value in values.items():
            word |= self.fields[name].put(value)
        return word

    def decode(self, word: int) -> dict[str, int]:
        """Every field's value, by name."""
        return {name: item.get(word) for name, item in self.fields.items()}

    def describe(self, word: int) -> str:
        """The non-zero fields of `word` in words, e.g. "EC=DABT_LOW ISV=1"."""
        parts = []
        for name, item in self.fields.items():
            value = item.get(word)
            if value:
                parts.append(f"{name}={item.names.get(value, hex(value))}")
        return " ".join(parts) or "0"
