# SPDX-License-Identifier: GPL-2.0-or-later
"""The error of the CPU engine layer."""

from __future__ import annotations


class EngineError(RuntimeError):
    """The CPU engine cannot do what it is there for: a wrong library, or a state that no guest
    can bring about. The text says what to do where something can be done."""
