#!/usr/bin/env python3
"""Checks the links of every Markdown file in the repository, without a network: files and anchors
that links lead to exist, references are defined and used, and addresses are https.

    hack/check-links.py
"""

import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def prose(content):
    """Without code, in which brackets are no links. Lines keep their numbers."""
    content = re.sub(
        r"^( *)(```+|~~~+).*?^\1\2 *$",
        lambda match: "\n" * match.group().count("\n"),
        content,
        flags=re.M | re.S,
    )
    return re.sub(r"(`+)[^`].*?\1", lambda match: "\n" * match.group().count("\n"), content)


def anchors(path):
    """The anchors that GitHub gives to the headings of a file."""
    found = {}
    content = re.sub(r"^( *)(```+).*?^\1\2 *$", "", path.read_text(), flags=re.M | re.S)
    for heading in re.findall(r"^#+ +(.+?) *#*$", content, re.M):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        if count:
            found[f"{slug}-{count}"] = 1
    return found


def problems(path):
    content = prose(path.read_text())
    definition = re.compile(r"^\[([^]]+)\]: +(\S+)", re.M)
    defined = {name.lower(): target for name, target in definition.findall(content)}
    body = definition.sub("", content)
    used = [name.lower() for name in re.findall(r"\]\[([^]]+)\]", body)]
    yield from (f"undefined reference [{name}]" for name in used if name not in defined)
    yield from (f"unused reference [{name}]" for name in defined if name not in used)
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", body)
    for target in [*targets, *defined.values()]:
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            if not target.startswith(("https://", "mailto:")):
                yield f"{target}: not https"
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.is_relative_to(ROOT) or not file.exists():
            yield f"{target}: no such file"
        elif anchor and (file.suffix != ".md" or anchor not in anchors(file)):
            yield f"{target}: no such heading"


def main():
    failed = False
    for directory, inner, names in os.walk(ROOT):
        inner[:] = [name for name in inner if name not in {".git", "target"}]
        for name in sorted(names):
            if not name.endswith(".md"):
                continue
            path = pathlib.Path(directory, name)
            for problem in problems(path):
                failed = True
                print(f"error: {path.relative_to(ROOT)}: {problem}", file=sys.stderr)
    sys.exit(failed)


main()
