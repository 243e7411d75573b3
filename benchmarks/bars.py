"""Bars as an SVG: the rate of each row, and a line from its slowest to its fastest round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

LEFT, WIDTH, BAR = 210, 420, 18
OURS, OTHERS, TARGET = "#1f77b4", "#bbb", "#c00"


def chart(panels: Sequence[tuple[str, float | None, Sequence[Mapping[str, Any]]]]) -> str:
    """
    Args:
        panels: one below the other; title, target or None, rows with name, rate, least, most.
    """
    parts, top = [], 8
    for title, target, rows in panels:
        parts.append(f'<text x="8" y="{top + 16}" font-size="14">{escape(title)}</text>')
        top += 26
        scale = WIDTH / max(target or 0.0, *(row["most"] for row in rows), 1.0)
        if target:
            at = LEFT + target * scale
            path = f"M{at:.1f} {top - 4}V{top + BAR * len(rows)}"
            parts.append(f'<path d="{path}" stroke="{TARGET}" stroke-dasharray="4 3"/>')
        for row in rows:
            parts += _bar(row, top, scale)
            top += BAR
        top += 12
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {top}"'
        ' font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


def _bar(row: Mapping[str, Any], top: int, scale: float) -> list[str]:
    middle, length = top + BAR // 2, row["rate"] * scale
    least, most = LEFT + row["least"] * scale, LEFT + row["most"] * scale
    color = OURS if row["name"].startswith("lonelyps") else OTHERS
    return [
        f'<text x="{LEFT - 6}" y="{middle + 4}" text-anchor="end">{escape(row["name"])}</text>',
        f'<rect x="{LEFT}" y="{top + 2}" width="{length:.1f}" height="{BAR - 4}" fill="{color}"/>',
        f'<path d="M{least:.1f} {middle}H{most:.1f}" stroke="#000"/>',
        f'<text x="{max(most, LEFT + length) + 5:.1f}" y="{middle + 4}">{row["rate"]:,.0f}</text>',
    ]
