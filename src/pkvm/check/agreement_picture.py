# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of a comparison as a small picture (SVG 1.1) for documents: a bar for each topic."""

from __future__ import annotations

from html import escape

from pkvm.check.comparison import Comparison, Verdict
from pkvm.check.scenarios.runner import title

_ROW, _LEFT, _BAR, _NUMBERS = 22, 330, 300, 150
_COLOURS = {Verdict.SAME: "#4c9f70", Verdict.EXPLAINED: "#e0b040", Verdict.DIFFERENT: "#c8402f"}
_HEAD = 58


def svg(comparison: Comparison, subtitle: str) -> str:
    """The picture's text. `subtitle` says what was compared with what."""
    topics = comparison.topics()
    width = _LEFT + _BAR + _NUMBERS
    height = _HEAD + _ROW * (len(topics) + 1) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<text x="12" y="22" font-size="16" font-weight="bold">Model and kernel</text>',
        f'<text x="12" y="42" fill="#555555">{escape(subtitle)}</text>',
    ]
    y = _HEAD
    for topic in (*topics, None):
        counts = {verdict: comparison.count(verdict, topic) for verdict in Verdict}
        parts += _row(y, "all" if topic is None else title(topic), counts, bold=topic is None)
        y += _ROW
    x = 12
    for verdict, colour in _COLOURS.items():
        parts.append(f'<rect x="{x}" y="{y + 8}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 18}" y="{y + 18}">{verdict.value}</text>')
        x += 40 + 8 * len(verdict.value)
    return "\n".join((*parts, "</svg>", ""))


def _row(y: int, name: str, counts: dict[Verdict, int], *, bold: bool) -> list[str]:
    weight = ' font-weight="bold"' if bold else ""
    total = sum(counts.values())
    parts = [f'<text x="12" y="{y + 15}"{weight}>{escape(name)}</text>']
    x = float(_LEFT)
    for verdict, count in counts.items():
        length = _BAR * count / max(1, total)
        if count:
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 3}" width="{length:.1f}" height="{_ROW - 6}" '
                f'fill="{_COLOURS[verdict]}"/>'
            )
        x += length
    numbers = " / ".join(str(count) for count in counts.values())
    parts.append(f'<text x="{_LEFT + _BAR + 10}" y="{y + 15}"{weight}>{numbers}</text>')
    return parts
