# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VMM says about input that it cannot use."""

from __future__ import annotations


class LoadError(ValueError):
    """An image, or the machine asked for it, cannot be used; the text says what to do."""
