# SPDX-License-Identifier: GPL-2.0-or-later
"""Protected KVM for arm64 (pKVM), the whole system, in Python.

`import pkvm` is lazy: a name below is imported when it is first used, so that an
arm64 host with neither numpy nor Unicorn can drive its real /dev/kvm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pkvm.opening import open
    from pkvm.system import System

_EXPORTS = {"System": "pkvm.system", "open": "pkvm.opening"}

__all__ = ["System", "__version__", "open"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'pkvm' has no attribute {name!r}")
