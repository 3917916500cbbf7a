# SPDX-License-Identifier: GPL-2.0-or-later
"""Why the model and a Linux 7.3 kernel may differ: data for `pkvm.check.comparison`.

An explanation that no longer explains anything is an error, and all of them together may speak for
no more than one observation in twenty.
"""

from __future__ import annotations

from pkvm.check.comparison import Explanation

EXPLANATIONS: tuple[Explanation, ...] = ()
"""What is known. The first one that fits counts."""
