# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm info`: what this host offers, asked at the seam as any VMM would, and of the machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import pkvm
from pkvm.cli import cpu_features, options, status, terminal
from pkvm.trace.counting import CountingRecorder
from pkvm.uapi.dialects import ROWS, Creation
from pkvm.uapi.kvm import TYPE_PROTECTED, Cap
from pkvm.vmm.board import DEFAULT_RAM_BYTES

if TYPE_CHECKING:
    from pkvm.kvm import Kvm
    from pkvm.system import System


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    options.add_machine_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument(
        "--features",
        action="store_true",
        help="say what a protected guest gets of the CPU, what it does not get, and why",
    )


def execute(args: argparse.Namespace) -> int:
    """Print what the host offers; the exit status."""
    options.need_model(args, "info")
    options.settle(args)
    firmware = options.firmware(args)
    recorder = CountingRecorder()
    with options.make_system(args, recorder, DEFAULT_RAM_BYTES, firmware=firmware) as system:
        if args.features:
            return cpu_features.show(system, args)
        facts = _facts(args, system)
    facts["messages"] = [f"{message.source}: {message.text}" for message in recorder.messages()]
    if args.json:
        import json

        terminal.write_line(json.dumps(facts))
    else:
        terminal.write_line(_text(facts))
    return status.OK


def _facts(args: argparse.Namespace, system: System) -> dict[str, Any]:
    from pkvm.machine.cpu.unicorn_layout import LAYOUT
    from pkvm.machine.machine import IPA_BITS, RAM_BASE

    dialect = system.dialect
    protected = system.protected
    kind = TYPE_PROTECTED if protected and dialect.creation is Creation.TYPE_BIT else 0
    with system.open() as kvm, kvm.create_vm(kind) as vm:
        capabilities = {cap.name: _extension(kvm, cap) for cap in Cap}
        filtered = [cap.name for cap in Cap if _extension(kvm, cap) != vm.check_extension(cap)]
        firmware_size = 0
        if protected and dialect.capability is not None:
            firmware_size = vm.protected_vm_info(cap=dialect.capability).firmware_size
        api_version = kvm.api_version()
    return {
        "version": pkvm.__version__,
        "backend": args.backend,
        "dialect": args.dialect,
        "protected_mode": protected,
        "api_version": api_version,
        "firmware_size": firmware_size,
        "max_vcpus": capabilities["MAX_VCPUS"],
        "ipa_bits": IPA_BITS,
        "ram": {"base": RAM_BASE, "bytes": system.machine.memory.ram_bytes},
        "hyp_bytes": 4096 * sum(system.census().hyp.values()),
        "cpu_model": args.cpu_model,
        "engine": "Unicorn " + ".".join(str(part) for part in LAYOUT.version),
        "clock": args.clock,
        "capabilities": capabilities,
        "not_for_protected": filtered,
        "hypercalls": _hypercalls(dialect.name) if protected else [],
        "rules": {row.topic: row.answer(dialect) for row in ROWS},
    }


def _extension(kvm: Kvm, cap: int) -> int:
    """KVM_CHECK_EXTENSION; 0 for what the system does not answer."""
    try:
        return kvm.check_extension(cap)
    except OSError:
        return 0


def _hypercalls(dialect: str) -> list[str]:
    """What EL2 serves a protected guest."""
    from pkvm.arm64.smccc import Function, function_name
    from pkvm.hyp import policy, psci, trng

    spoken = policy.POLICIES[dialect]
    functions: set[int] = {*spoken.vendor_calls}
    if spoken.isolation is not None:
        functions |= {Function.SMCCC_VERSION, Function.SMCCC_ARCH_FEATURES, Function.VENDOR_UID}
        functions |= psci.FEATURES
        if spoken.isolation.trng:
            functions |= trng.FEATURES
    return [function_name(function) for function in sorted(functions)]


def _text(facts: dict[str, Any]) -> str:
    mib = 1 << 20
    offered = [f"{name} {value}" for name, value in facts["capabilities"].items() if value]
    missing = [name for name, value in facts["capabilities"].items() if not value]
    ram = facts["ram"]
    rows = [
        ("pkvm", f"{facts['version']}, back-end {facts['backend']}, dialect {facts['dialect']}"),
        (
            "protected mode",
            "yes" if facts["protected_mode"] else "no: every VM is open to the host",
        ),
        ("guest firmware", f"{facts['firmware_size']} bytes" if facts["firmware_size"] else "none"),
        ("KVM API", f"version {facts['api_version']}, up to {facts['max_vcpus']} vCPUs a VM"),
        ("RAM", f"{ram['bytes'] // mib} MiB at PA {ram['base']:#x}, {facts['ipa_bits']}-bit IPA"),
        ("EL2 keeps", f"{facts['hyp_bytes'] // 1024} KiB, firmware included"),
        ("CPU", f"{facts['cpu_model']} on {facts['engine']}, clock {facts['clock']}"),
        ("capabilities", ", ".join(offered)),
        ("not offered", ", ".join(missing)),
        ("not protected", ", ".join(facts["not_for_protected"]) or "the same"),
        ("hypercalls", ", ".join(facts["hypercalls"]) or "none"),
        *(("message", message) for message in facts["messages"]),
    ]
    lines = [f"{name + ':':<16}{value}" for name, value in rows]
    lines += ["", f"In the dialect {facts['dialect']}:"]
    lines += [f"  {topic}: {answer}" for topic, answer in facts["rules"].items()]
    return "\n".join(lines)
