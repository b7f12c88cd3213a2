#!/usr/bin/env python3
"""Makes an SVG of boxes and arrows from the text in docs/images/NAME.txt.

    hack/picture.py [--check]     writes, or compares, docs/images/NAME.svg for each NAME.txt
"""

import html
import pathlib
import re
import sys

STYLE = """
svg { background: #fff }
text { font: 14px sans-serif; fill: #24292f }
.title { font-weight: bold }
.label { font-size: 13px; fill: #57606a }
rect { fill: #f6f8fa; stroke: #57606a; stroke-width: 1.2 }
.outer { fill: none; stroke-dasharray: 5 4 }
path { stroke: #0969da; stroke-width: 1.6; fill: none; marker-end: url(#head) }
"""
LINE = 19


def text(x, y, value, kind="", anchor="middle"):
    value = html.escape(value)
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{kind}">{value}</text>'


def point(box, side):
    """The point of a side of a box: "top+40" is 40 right of the middle of its top."""
    side, offset = re.fullmatch(r"([a-z]+)([+-]\d+)?", side).groups()
    x, y, width, height = box
    offset = int(offset or 0)
    return {
        "top": (x + width // 2 + offset, y),
        "bottom": (x + width // 2 + offset, y + height),
        "left": (x, y + height // 2 + offset),
        "right": (x + width, y + height // 2 + offset),
    }[side]


def draw(source):
    boxes, parts, size = {}, [], (0, 0)
    for line in source.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "size":
            size = tuple(map(int, rest.split()))
        elif kind == "box":
            name, x, y, width, height, label = rest.split(None, 5)
            x, y, width, height = (int(n) for n in (x, y, width, height))
            lines = [part.strip() for part in label.split("|")]
            boxes[name] = (x, y, width, height)
            outer = len(lines) == 1
            shape = ' class="outer"' if outer else ""
            parts.append(
                f'<rect{shape} x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'
            )
            if outer:
                parts.append(text(x + width - 14, y + 22, lines[0], "title", "end"))
                continue
            first = y + (height - LINE * len(lines)) // 2 + 14
            for number, value in enumerate(lines):
                kind = "label" if number else "title"
                parts.append(text(x + width // 2, first + LINE * number, value, kind))
        elif kind == "arrow":
            one, side, other, end, label = rest.split(None, 4)
            (x1, y1), (x2, y2) = point(boxes[one], side), point(boxes[other], end)
            parts.append(f'<path d="M{x1} {y1}L{x2} {y2}"/>')
            if x1 == x2:
                parts.append(text(x1 + 8, (y1 + y2) // 2 + 5, label, "label", "start"))
            else:
                parts.append(text((x1 + x2) // 2, (y1 + y2) // 2 - 8, label, "label"))
    width, height = size
    head = '<marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
    head += '<polygon points="0 0,9 4,0 8" fill="#0969da"/></marker>'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
            f"<style>{STYLE}</style><defs>{head}</defs>",
            *parts,
            "</svg>\n",
        ]
    )


def main():
    check = sys.argv[1:] == ["--check"]
    images = pathlib.Path(__file__).resolve().parent.parent / "docs" / "images"
    for source in sorted(images.glob("*.txt")):
        picture, made = source.with_suffix(".svg"), draw(source.read_text())
        if not check:
            picture.write_text(made)
        elif not picture.exists() or picture.read_text() != made:
            sys.exit(f"error: {picture.name} differs from {source.name}; run hack/picture.py")


main()
