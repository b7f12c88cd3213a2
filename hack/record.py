#!/usr/bin/env python3
"""Runs a command in a terminal of its own, and writes what it prints, and when, as an animated SVG.
Long pauses are shortened, and before each bold line there is a pause to read.

    hack/record.py FILE.svg COMMAND [ARGUMENT]...
"""

import fcntl
import html
import os
import pty
import re
import struct
import sys
import termios
import time

COLUMNS, ROWS = 100, 30
CHARACTER, LINE, MARGIN = 8.05, 17, 12
# In seconds.
LONGEST_PAUSE, READING_PAUSE, LAST_PAUSE = 1.0, 3.0, 6.0

STYLE = """
rect { fill: #0d1117 }
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
       fill: #c9d1d9; white-space: pre }
.bold { fill: #58a6ff; font-weight: bold }
"""


def record(command):
    """The output of the command, as pairs of seconds since its start and bytes."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", COLUMNS=str(COLUMNS), LINES=str(ROWS))
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    start, events = time.monotonic(), []
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:
            break
        if not data:
            break
        events.append((time.monotonic() - start, data))
        os.write(sys.stdout.fileno(), data)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        sys.exit(f"error: {command[0]} exited with {status}")
    return events


def lines_of(events):
    """Pairs of the time at which a line is complete, and the line; long lines are folded."""
    rest, now, before = b"", 0.0, 0.0
    for seconds, data in events:
        now += min(seconds - before, LONGEST_PAUSE)
        before = seconds
        *complete, rest = (rest + data).split(b"\n")
        for line in complete:
            line = line.decode(errors="replace").replace("\r", "").expandtabs()
            bold = "\033[1m" in line
            now += READING_PAUSE if bold else 0
            line = re.sub(r"\033\[[0-9;?]*[A-Za-z]", "", line)
            for at in range(0, max(len(line), 1), COLUMNS):
                yield now, bold, line[at : at + COLUMNS]


def draw(lines):
    width = round(COLUMNS * CHARACTER) + 2 * MARGIN
    height = ROWS * LINE + 2 * MARGIN
    total = lines[-1][0] + LAST_PAUSE
    # The lines scroll up from the bottom, so that a line is seen when it was printed.
    steps = {0.0: 0}
    steps.update((seconds, number + 1) for number, (seconds, _, _) in enumerate(lines))
    frames = "".join(
        f"{100 * seconds / total:.3f}% {{ transform: translateY({-LINE * count}px) }}\n"
        for seconds, count in steps.items()
    )
    texts = []
    for number, (_, bold, line) in enumerate(lines):
        if line.strip():
            y = (ROWS + number + 1) * LINE - 5
            kind = ' class="bold"' if bold else ""
            texts.append(
                f'<text x="{MARGIN}" y="{y}"{kind} xml:space="preserve">{html.escape(line)}</text>'
            )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">
<style>{STYLE}#lines {{ animation: scroll {total:.1f}s step-end infinite }}
@keyframes scroll {{
{frames}100% {{ transform: translateY({-LINE * len(lines)}px) }}
}}</style>
<rect width="{width}" height="{height}" rx="6"/>
<svg x="0" y="{MARGIN}" width="{width}" height="{height - 2 * MARGIN}"><g id="lines">
{chr(10).join(texts)}
</g></svg>
</svg>
"""


def main():
    if len(sys.argv) < 3:
        sys.exit("usage: hack/record.py FILE.svg COMMAND [ARGUMENT]...")
    lines = list(lines_of(record(sys.argv[2:])))
    if not lines:
        sys.exit("error: the command printed nothing")
    picture = draw(lines)
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write(picture)


main()
