# SPDX-License-Identifier: GPL-2.0-or-later
"""Paravirtualised time: the structure in which a hypervisor says how much time it took away from a
vCPU (Arm DEN 0057A 3.3; Documentation/virt/kvm/arm/pvtime.rst).
"""

from __future__ import annotations

import struct

STOLEN_TIME = struct.Struct("<IIQ48x")
"""Revision (0), attributes (0), stolen time in nanoseconds, padding; aligned to its 64 bytes."""
STOLEN_NS = 8
"""Offset of the stolen time: 8 bytes."""
