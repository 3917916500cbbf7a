# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm info`: what this host offers, asked at the seam as any VMM would, and of the machine.

Whether a real kernel protects VMs shows only when one is made: so one is, which
has upstream's kernel mark itself as tainted.
"""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pkvm
from pkvm.cli import cpu_features, options, status, terminal
from pkvm.trace.counting import CountingRecorder
from pkvm.uapi.dialects import ROWS, Creation, Dialect
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
        default=argparse.SUPPRESS,
        help="say what a protected guest gets of the CPU, what it does not get, and why",
    )


def execute(args: argparse.Namespace) -> int:
    """Print what the host offers; the exit status."""
    options.settle(args)
    if args.backend != options.MODEL:
        return _print(args, _device_facts(args.backend))
    firmware = options.firmware(args)
    recorder = CountingRecorder()
    with options.make_system(args, recorder, DEFAULT_RAM_BYTES, firmware=firmware) as system:
        if args.features:
            return cpu_features.show(system, args)
        facts = _model_facts(args, system)
    facts["messages"] = [f"{message.source}: {message.text}" for message in recorder.messages()]
    return _print(args, facts)


def _print(args: argparse.Namespace, facts: dict[str, Any]) -> int:
    if args.json:
        import json

        terminal.write_line(json.dumps(facts))
    else:
        terminal.write_line(_text(facts))
    return status.OK


def _device_facts(path: str) -> dict[str, Any]:
    """What the kernel of this computer offers. Raises OSError."""
    # Imported here: each run needs a device or the machine.
    import resource

    from pkvm.opening import open_device

    kernel = os.uname()
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    with open_device(path) as kvm:
        dialect = kvm.dialect()
        facts = _asked(kvm, dialect, protected=True)
    return {
        "version": pkvm.__version__,
        "backend": path,
        "dialect": dialect.name,
        "ipa_bits": facts["capabilities"]["ARM_VM_IPA_SIZE"],
        "kernel": f"{kernel.sysname} {kernel.release}",
        "memlock": None if limit == resource.RLIM_INFINITY else limit,
        **facts,
        "messages": [],
    }


def _model_facts(args: argparse.Namespace, system: System) -> dict[str, Any]:
    from pkvm.machine.cpu.unicorn_layout import LAYOUT
    from pkvm.machine.machine import IPA_BITS, RAM_BASE

    with system.open() as kvm:
        facts = _asked(kvm, system.dialect, protected=system.protected)
    return {
        "version": pkvm.__version__,
        "backend": args.backend,
        "dialect": args.dialect,
        "ipa_bits": IPA_BITS,
        "ram": {"base": RAM_BASE, "bytes": system.machine.memory.ram_bytes},
        "hyp_bytes": 4096 * sum(system.census().hyp.values()),
        "cpu_model": args.cpu_model,
        "engine": "Unicorn " + ".".join(str(part) for part in LAYOUT.version),
        "clock": args.clock,
        "dma_devices": system.streams(),
        **facts,
        "hypercalls": _hypercalls(args.dialect) if system.protected else [],
    }


def _asked(kvm: Kvm, dialect: Dialect, *, protected: bool) -> dict[str, Any]:
    """What is asked at the seam; of a VM that is protected if `protected` and that can be."""
    capabilities = {cap.name: _extension(kvm.check_extension, cap) for cap in Cap}
    try:
        by_type = protected and dialect.creation is Creation.TYPE_BIT
        vm = kvm.create_vm(TYPE_PROTECTED if by_type else 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        protected = False
        vm = kvm.create_vm()
    with vm:
        of_vm = {cap.name: _extension(vm.check_extension, cap) for cap in Cap}
        firmware_size = 0
        if protected and dialect.capability is not None:
            firmware_size = vm.protected_vm_info(cap=dialect.capability).firmware_size
    return {
        "protected_mode": protected,
        "api_version": kvm.api_version(),
        "firmware_size": firmware_size,
        "max_vcpus": capabilities["MAX_VCPUS"],
        "capabilities": capabilities,
        "not_for_protected": [name for name, value in of_vm.items() if value != capabilities[name]],
        "rules": {row.topic: row.answer(dialect) for row in ROWS},
    }


def _extension(ask: Callable[[int], int], cap: int) -> int:
    """KVM_CHECK_EXTENSION; 0 for what is not answered."""
    try:
        return ask(cap)
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
    offered = [f"{name} {value}" for name, value in facts["capabilities"].items() if value]
    missing = [name for name, value in facts["capabilities"].items() if not value]
    rows = [
        ("pkvm", f"{facts['version']}, back-end {facts['backend']}, dialect {facts['dialect']}"),
        (
            "protected mode",
            "yes" if facts["protected_mode"] else "no: every VM is open to the host",
        ),
        ("guest firmware", f"{facts['firmware_size']} bytes" if facts["firmware_size"] else "none"),
        ("KVM API", f"version {facts['api_version']}, up to {facts['max_vcpus']} vCPUs a VM"),
        *(_kernel_rows(facts) if "kernel" in facts else _machine_rows(facts)),
        ("capabilities", ", ".join(offered)),
        ("not offered", ", ".join(missing)),
        ("not protected", ", ".join(facts["not_for_protected"]) or "the same"),
    ]
    if "hypercalls" in facts:
        rows.append(("hypercalls", ", ".join(facts["hypercalls"]) or "none"))
    rows += [("message", message) for message in facts["messages"]]
    lines = [f"{name + ':':<16}{value}" for name, value in rows]
    lines += ["", f"In the dialect {facts['dialect']}:"]
    lines += [f"  {topic}: {answer}" for topic, answer in facts["rules"].items()]
    return "\n".join(lines)


def _machine_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    mib, ram = 1 << 20, facts["ram"]
    return [
        ("RAM", f"{ram['bytes'] // mib} MiB at PA {ram['base']:#x}, {facts['ipa_bits']}-bit IPA"),
        ("EL2 keeps", f"{facts['hyp_bytes'] // 1024} KiB, firmware included"),
        ("CPU", f"{facts['cpu_model']} on {facts['engine']}, clock {facts['clock']}"),
        ("DMA", "; ".join(_device_words(device) for device in facts["dma_devices"]) or "none"),
    ]


def _device_words(device: dict[str, Any]) -> str:
    return f"{device['device']} is stream {device['stream']}, the SMMU's answer: {device['does']}"


def _kernel_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    limit = facts["memlock"]
    return [
        ("kernel", f"{facts['kernel']}, {facts['ipa_bits']}-bit IPA"),
        ("memlock", "unlimited" if limit is None else f"{limit >> 10} KiB a guest may have"),
    ]
