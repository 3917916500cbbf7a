# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/dialects.md, written from the table of the dialects: `python -m pkvm.check.dialect_page`.

What a user sees comes from `uapi.dialects`, what EL2 serves a guest from
`hyp.policy`, what KVM answers at the host from `host.policy`.
"""

from __future__ import annotations

import sys

from pkvm.arm64.smccc import function_name
from pkvm.host.policy import POLICIES as HOST
from pkvm.hyp.policy import POLICIES as EL2
from pkvm.uapi.dialects import ALWAYS_ASKED, DIALECTS, ROWS
from pkvm.uapi.kvm import Cap

_HEAD = """\
<!-- Written by `python -m pkvm.check.dialect_page`; tests/contract/test_dialects.py holds it. -->
# The three dialects

A host speaks one dialect of protected KVM, and its EL2 with it:

* `rfc`: "[RFC PATCH 4/4] KVM: arm64: Introduce KVM_CAP_ARM_PROTECTED_VM" of 2021, made to work.
* `android`: what the Android common kernel (6.12) made of it.
* `upstream`: what Linux 7.3 has.

```
pkvm run --dialect upstream
pkvm info --dialect android
```

From Python: `pkvm.System(dialect="upstream")`, `pkvm.open(dialect="android")`;
`Kvm.dialect()` tells a VMM what it has met. In every dialect a VMM that touches a private page of a
guest's gets `ProtectedPageError` (SIGSEGV of a load or store, EFAULT of a system call), a machine
has at most 255 VMs (ENOMEM), and a VM has a GICv3 or none.

## What users see

"""


def page() -> str:
    """The whole page."""
    names = list(DIALECTS)
    lines = [_HEAD + _line(["", *names]), _line(["---"] * (1 + len(names)))]
    for row in ROWS:
        cells = [row.answer(dialect) for dialect in DIALECTS.values()]
        lines.append(_line([row.topic, *cells]))
    lines += ["", "## Hypercalls that EL2 serves a protected guest", "", _line(["", *names])]
    lines.append(_line(["---"] * (1 + len(names))))
    served = {name: EL2[name].vendor_calls | EL2[name].device_calls for name in names}
    functions = sorted(set().union(*served.values()))
    for function in functions:
        cells = ["yes" if function in served[name] else "" for name in names]
        lines.append(_line([f"`{function_name(function)}` {function:#010x}", *cells]))
    lines += ["", "## What the host's KVM answers a guest that is not protected", ""]
    lines += [_line(["", *names]), _line(["---"] * (1 + len(names)))]
    lines.append(
        _line(["PSCI versions", *(", ".join(_versions(name)) for name in names)]),
    )
    lines.append(_line(["KVM_FEATURES", *(f"{HOST[name].features:#x}" for name in names)]))
    lines.append(
        _line(["TRNG, PTP, PV_TIME", *("yes" if HOST[name].services else "" for name in names)]),
    )
    lines += ["", "## What the host loses with FFA_MEM_LEND", ""]
    lines += [_line(["", *names]), _line(["---"] * (1 + len(names)))]
    takes = [EL2[name].memory.lend_takes_access for name in names]
    lines.append(_line(["access, until it reclaims", *("yes" if it else "" for it in takes)]))
    lines += ["", "## Capabilities that a protected VM's descriptor reports", ""]
    lines += [_line(["", *names]), _line(["---"] * (1 + len(names)))]
    listed = set().union(*(dialect.caps or () for dialect in DIALECTS.values()))
    for cap in sorted(listed):
        cells = ["yes" if dialect.offers(cap) else "0" for dialect in DIALECTS.values()]
        lines.append(_line([f"KVM_CAP_{cap.name}", *cells]))
    cells = ["0" if dialect.caps else "yes" for dialect in DIALECTS.values()]
    lines.append(_line(["any other of the architecture's", *cells]))
    others = ", ".join(cap.name for cap in Cap if cap in ALWAYS_ASKED)
    lines += ["", f"These are KVM's own and pass every filter: {others}."]
    return "\n".join(lines) + "\n"


def _versions(name: str) -> list[str]:
    return [f"{version >> 16}.{version & 0xFFFF}" for version in HOST[name].psci_versions]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.stdout.write(page())
