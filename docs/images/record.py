"""Records a real `orchestrator demo` in a terminal and writes it as an animated picture, demo.svg.

    python docs/images/record.py      # takes as long as the demo, about two minutes

The picture needs no script: CSS shows each line of the terminal while it was there, in shortened time. The directory
of the run is cut out. Readers who prefer no motion, and programs that don't animate, see the last screen.
"""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[2]
COLUMNS = 150  # the longest line fits
PROMPT = "$ orchestrator demo"
LASTS_S, HOLDS_S = 22.0, 6.0  # of the picture: the recording, and the last screen
FRAME_S = 0.12  # changes that follow sooner are shown together
CHAR_WIDTH, LINE_HEIGHT, MARGIN = 7.23, 17.0, 14.0  # of DejaVu Sans Mono and its like at 12 px
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()].|[\r\n]|[^\x1b\r\n]+")

Screen = tuple[str, ...]


def record(command: Sequence[str], cwd: Path, env: dict[str, str]) -> list[tuple[float, str]]:
    """Run a command in a terminal of `COLUMNS` columns. Returns its output, with seconds since the start.

    Raises:
        RuntimeError: it did not end with 0.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    process = subprocess.Popen(command, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    began_s, events = time.monotonic(), []
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the last process has closed the terminal
            break
        if not data:
            break
        events.append((time.monotonic() - began_s, data.decode(errors="replace")))
    os.close(ours)
    if code := process.wait():
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{''.join(text for _, text in events)}")
    return events


def screens(events: Iterable[tuple[float, str]]) -> Iterator[tuple[float, Screen]]:
    """The terminal's lines after each event. Understands line ends and the erasure of a line, and drops colours."""
    lines, column = [""], 0
    for time_s, output in events:
        for part in CONTROL.findall(output):
            if part == "\n":
                lines.append("")
                column = 0
            elif part == "\r":
                column = 0
            elif part.startswith("\x1b"):
                lines[-1] = "" if part == "\x1b[2K" else lines[-1]
            else:
                lines[-1] = lines[-1][:column].ljust(column) + part + lines[-1][column + len(part) :]
                column += len(part)
        wrapped = [line[i : i + COLUMNS] for line in lines for i in range(0, max(len(line), 1), COLUMNS)]
        yield time_s, (PROMPT, *wrapped)


def frames(shown: Iterable[tuple[float, Screen]]) -> list[tuple[float, Screen]]:
    """Screens at times of the picture, at most one per `FRAME_S`; the newest one of those that are too close."""
    found = list(shown)
    speed = max(1.0, found[-1][0] / LASTS_S)
    kept: list[tuple[float, Screen]] = [(0.0, (PROMPT,))]
    for time_s, screen in found:
        frame_s = round(time_s / speed / FRAME_S) * FRAME_S
        if frame_s <= kept[-1][0]:
            kept[-1] = (kept[-1][0], screen)
        elif screen != kept[-1][1]:
            kept.append((frame_s, screen))
    return kept


def spans(kept: Sequence[tuple[float, Screen]]) -> list[tuple[int, str, float, float | None]]:
    """Row, text, begin and end of everything that was on the screen; no end for what is there at last."""
    done: list[tuple[int, str, float, float | None]] = []
    live: dict[int, tuple[str, float]] = {}
    for time_s, screen in kept:
        now = {row: line for row, line in enumerate(screen) if line.strip()}
        for row, (line, since_s) in list(live.items()):
            if now.get(row) != line:
                done.append((row, line, since_s, time_s))
                del live[row]
        for row, line in now.items():
            live.setdefault(row, (line, time_s))
    return [*done, *((row, line, since_s, None) for row, (line, since_s) in live.items())]


def picture(events: Sequence[tuple[float, str]]) -> str:
    kept = frames(screens(events))
    whole_s = kept[-1][0] + HOLDS_S
    found = sorted(spans(kept), key=lambda span: (span[2], span[0]))
    width = COLUMNS * CHAR_WIDTH + 2 * MARGIN
    height = (max(row for row, *_ in found) + 1) * LINE_HEIGHT + 2 * MARGIN
    rules, texts = [], []
    for number, (row, line, since_s, until_s) in enumerate(found):
        end = f" {until_s / whole_s:.2%}{{visibility:hidden}}" if until_s is not None else ""
        before = "0%{visibility:hidden} " if since_s else ""
        begin = f"{before}{since_s / whole_s:.2%}{{visibility:visible}}"
        rules.append(f"@keyframes k{number}{{{begin}{end}}} #t{number}{{animation-name:k{number}}}")
        kind = kind_of(line) + (" past" if until_s is not None else "")
        y = MARGIN + LINE_HEIGHT * (row + 0.75)
        texts.append(f'<text id="t{number}" x="{MARGIN:g}" y="{y:g}" class="{kind}">{escape(line.rstrip())}</text>')
    style = (
        'text{font:12px "DejaVu Sans Mono",Menlo,Consolas,monospace;fill:#c9d1d9;white-space:pre}'
        ".prompt{fill:#8b949e}.change{fill:#7ee787}.kill{fill:#ff7b72}.progress{fill:#79c0ff}.past{visibility:hidden}"
        "@media (prefers-reduced-motion: no-preference){"
        f"text{{animation-duration:{whole_s:.2f}s;animation-timing-function:step-end;animation-iteration-count:infinite}}"
        f"{''.join(rules)}}}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img"'
    return "\n".join(
        [
            f'{head} aria-label="Recording of orchestrator demo, in shortened time">',
            f"<style>{style}</style>",
            f'<rect width="{width:.0f}" height="{height:.0f}" rx="8" fill="#0d1117"/>',
            *texts,
            "</svg>\n",
        ]
    )


def kind_of(line: str) -> str:
    """The colour of a line."""
    if line.startswith("["):
        return "progress"
    if line == PROMPT:
        return "prompt"
    if "is killed" in line:
        return "kill"
    return "change" if " rescaled " in line or " recovered" in line else "plain"


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        env = {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "ORCHESTRATOR_HOME": f"{place}/.home", "TERM": "xterm"}
        events = record([sys.executable, "-m", "orchestrator.cli.main", "demo"], Path(place), env)
        events = [(time_s, output.replace(os.path.realpath(place), "…")) for time_s, output in events]
    Path(__file__).with_name("demo.svg").write_text(picture(events), encoding="utf-8")


if __name__ == "__main__":
    main()
