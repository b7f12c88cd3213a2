#!/usr/bin/env python3
"""Writes results of virtual machines into a page: the rows of the cells that ran, and below the
table a note with each known failure once.

    hack/vm/page.py PAGE TABLE <CELLS

A line of TABLE has a cell, a scenario, its result and a text, with tabs between them. CELLS is the
list in hack/vm/run.sh.
"""

import datetime
import pathlib
import re
import sys
import textwrap

HEADING = "## Virtual machines"
NOTE = "Known failures:"


def row(cell, sets, results):
    """The row of a cell. Of known failures it has the names only."""
    versions = "".join(text for scenario, _, text in results if scenario == "versions")
    passed = sum(result == "passed" for _, result, _ in results)
    known = [f"`{scenario}`" for scenario, result, _ in results if result == "known"]
    others = [f"known: {', '.join(known)}"] if known else []
    for scenario, result, text in results:
        if result not in ("passed", "known"):
            others.append(f"{result}: `{scenario}`" + (f", {text}" if text else ""))
    today = datetime.datetime.now(datetime.timezone.utc).date()
    columns = [cell, versions, today, sets, f"{passed} of {len(results)}", ". ".join(others)]
    return "| " + " | ".join(map(str, columns)) + " |"


def without_figures(text):
    """Without what was measured, which differs in each run and is last, in parentheses."""
    return re.sub(r" \([^()]*\)$", "", text)


def read_note(lines):
    """The texts of each scenario in a note."""
    items = re.sub(r"\n +", " ", "\n".join(lines))
    found = re.findall(r"^- `(\w+)`: (.*)$", items, re.M)
    return {scenario: texts.split("; ") for scenario, texts in found}


def note(texts):
    """The lines of a note."""
    lines = []
    for scenario in sorted(texts):
        item = f"- `{scenario}`: {'; '.join(texts[scenario])}"
        options = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
        lines += textwrap.wrap(item, 100, **options)
    return [NOTE, "", *lines] if lines else []


def main():
    page = pathlib.Path(sys.argv[1])
    results = {}
    for line in pathlib.Path(sys.argv[2]).read_text().splitlines():
        cell, scenario, result, text = (line.split("\t") + ["", "", ""])[:4]
        results.setdefault(cell, []).append((scenario, result, text))
    cells = [line.split(None, 5) for line in sys.stdin if line.strip()]

    lines = page.read_text().splitlines()
    start = lines.index(HEADING)
    first = next(n for n in range(start, len(lines)) if lines[n].startswith("| --- ")) + 1
    end = next((n for n in range(first, len(lines)) if lines[n][:1] != "|"), len(lines))
    former = {line.split(" | ")[0].lstrip("| "): line for line in lines[first:end]}
    rest = next((n for n in range(end, len(lines)) if lines[n].startswith("## ")), len(lines))
    if NOTE in lines[end:rest]:
        texts = read_note(lines[end:rest])
    else:
        texts, rest = {}, end

    rows = []
    for name, *_, sets in cells:
        if name in results:
            rows.append(row(name, sets.strip(), results[name]))
        elif name in former:
            rows.append(former[name])
    # Texts of former runs stay only for the cells that have not run now.
    if all(name in results for name, *_ in cells):
        texts = {}
    for scenario, result, text in (one for of_cell in results.values() for one in of_cell):
        text = without_figures(text)
        if result == "known" and text not in texts.setdefault(scenario, []):
            texts[scenario].append(text)
    named = set(re.findall(r"`(\w+)`", "\n".join(rows)))
    texts = {scenario: texts[scenario] for scenario in texts if scenario in named}

    following = lines[rest:]
    while following and not following[0]:
        following.pop(0)
    parts = [lines[:first] + rows, note(texts), following]
    page.write_text("\n\n".join("\n".join(part) for part in parts if part) + "\n")


main()
