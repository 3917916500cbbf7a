# SPDX-License-Identifier: GPL-2.0-or-later
"""What the SMMU does with each stream, in words: its stream table as it would walk it now."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pkvm.machine.smmu import DmaDevice, Smmu


@dataclass(frozen=True, slots=True)
class Stream:
    """A device and what the SMMU does with its transactions."""

    device: str
    base: int
    """PA of the device's registers."""
    stream: int
    does: str
    """"translate", "bypass", "abort", or the event that each transaction ends in."""
    vmid: int | None = None
    root: int | None = None
    """PA of the first table, if it translates."""
    ipa_bits: int | None = None


def streams(smmu: Smmu, devices: tuple[DmaDevice, ...]) -> list[Stream]:
    """Every device of the machine."""
    found = []
    for device in devices:
        config = smmu.stream_config(device.stream)
        context = config.context
        does = "translate" if context is not None else "bypass" if config.bypass else "abort"
        if config.event is not None:
            does = config.event.name
        where = (context.vmid, context.root, context.ipa_bits) if context is not None else ()
        found.append(Stream(device.name, device.base, device.stream, does, *where))
    return found


def dump_smmu(smmu: Smmu, devices: tuple[DmaDevice, ...]) -> str:
    """The same as text, a line each."""
    lines = [f"smmu: registers at {smmu.window.base:#x}; streams that are not listed abort"]
    for one in streams(smmu, devices):
        text = f"  stream {one.stream:#x} ({one.device}, registers at {one.base:#x}): {one.does}"
        if one.root is not None:
            text += f" by VMID {one.vmid}, root {one.root:#x}, {one.ipa_bits}-bit addresses"
        lines.append(text)
    return "\n".join(lines)


def as_json(smmu: Smmu, devices: tuple[DmaDevice, ...]) -> list[dict[str, object]]:
    """The same as JSON objects."""
    return [asdict(one) for one in streams(smmu, devices)]
