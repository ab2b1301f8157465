"""Writes architecture.svg: the processes of a run, and what they send to whom.

    python docs/images/architecture.py

`tests/unit/docs/test_generated.py` fails while the picture is older than this file.
"""

from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT = 980, 700
WORKER_Y, WORKER_WIDTH, WORKER_STEP = 400, 182, 257
STYLE = """
:root { --back: #ffffff; --ink: #1f2328; --dim: #57606a; --line: #6e7781; --box: #f6f8fa; --control: #ddf4ff;
        --data: #dafbe1; --store: #fff8c5; --flow: #0969da; --bulk: #1a7f37; --disk: #9a6700; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0d1117; --ink: #e6edf3; --dim: #9198a1; --line: #7d8590; --box: #161b22; --control: #12283f;
          --data: #12301b; --store: #332a0d; --flow: #58a6ff; --bulk: #56d364; --disk: #e3b341; } }
svg { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 12px; }
text { fill: var(--ink); } .dim { fill: var(--dim); } .title { font-size: 14px; font-weight: 600; }
.back { fill: var(--back); } .box { fill: var(--box); stroke: var(--line); }
.part { fill: var(--back); stroke: var(--line); }
.control { fill: var(--control); stroke: var(--flow); } .data { fill: var(--data); stroke: var(--bulk); }
.store { fill: var(--store); stroke: var(--disk); } .standby { stroke-dasharray: 5 4; }
path { fill: none; stroke-width: 1.5; }
.flow { stroke: var(--flow); } .bulk { stroke: var(--bulk); } .disk { stroke: var(--disk); }
text.flow { fill: var(--flow); stroke: none; } text.bulk { fill: var(--bulk); stroke: none; }
text.disk { fill: var(--disk); stroke: none; }
marker path { stroke: none; } marker .flow { fill: var(--flow); } marker .bulk { fill: var(--bulk); }
marker .disk { fill: var(--disk); }
"""


def text(x: float, y: float, words: str, style: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{style}">{words}</text>'


def box(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" class="{style}"/>'


def actor(x: float, y: float, width: float, height: float, style: str, title: str, lines: Sequence[str] = ()) -> str:
    """A box with its name, and lines of smaller text below it."""
    first = y + height / 2 + 5 - 8 * len(lines)
    parts = [box(x, y, width, height, style), text(x + width / 2, first, title, "title")]
    parts += [text(x + width / 2, first + 17 * (i + 1), line, "dim") for i, line in enumerate(lines)]
    return "\n".join(parts)


def arrow(path: str, style: str, both: bool = False) -> str:
    start = f' marker-start="url(#{style})"' if both else ""
    return f'<path d="{path}" class="{style}"{start} marker-end="url(#{style})"/>'


def marker(style: str) -> str:
    """The head of arrows of a style, named like it."""
    size = 'markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto-start-reverse"'
    return f'<marker id="{style}" {size}><path d="M0,0.5 L8,4 L0,7.5 Z" class="{style}"/></marker>'


def worker(number: int) -> str:
    """A worker's process; the last one is a standby, which holds no state."""
    x, standby = 250 + WORKER_STEP * number, number == 2
    parts = [box(x, WORKER_Y, WORKER_WIDTH, 200, "box standby" if standby else "box")]
    parts.append(text(x + 91, WORKER_Y + 22, f"Worker w{number}", "title"))
    parts.append(text(x + 91, WORKER_Y + 39, "standby: warm, no state" if standby else f"rank {number}", "dim"))
    parts.append(box(x + 10, WORKER_Y + 49, WORKER_WIDTH - 20, 28, "part"))
    parts.append(text(x + 91, WORKER_Y + 67, "control thread"))
    parts.append(box(x + 10, WORKER_Y + 83, WORKER_WIDTH - 20, 44, "control" if standby else "data"))
    parts.append(text(x + 91, WORKER_Y + 101, "training thread"))
    parts.append(text(x + 91, WORKER_Y + 117, "imports, a first step" if standby else f"shard of rank {number}", "dim"))
    if not standby:
        parts.append(box(x + 10, WORKER_Y + 133, WORKER_WIDTH - 20, 58, "data"))
        parts.append(text(x + 91, WORKER_Y + 151, "snapshots in memory"))
        parts.append(text(x + 91, WORKER_Y + 167, f"its own, rank {number}", "dim"))
        parts.append(text(x + 91, WORKER_Y + 183, f"as buddy: rank {1 - number}", "dim"))
    return "\n".join(parts)


def picture() -> str:
    centre, above = [250 + WORKER_STEP * i + 91 for i in range(3)], WORKER_Y - 4
    parts = [
        actor(20, 20, 180, 66, "box", "Client", ["command line, Python"]),
        actor(335, 20, 250, 66, "control", "Scheduler", ["one per cluster: queue, autoscaling"]),
        actor(780, 20, 180, 52, "store", "MLflow", ["SQLite, or a server"]),
        actor(335, 180, 250, 72, "control", "Controller", ["one per run:", "observe, decide, journal, act"]),
        actor(780, 118, 180, 60, "control", "Tracker", ["keeps what MLflow lacks"]),
        actor(780, 222, 180, 60, "control", "Rendezvous", ["TCP store of all generations"]),
        box(20, 180, 180, 330, "store"),
        text(110, 204, "Run storage", "title"),
        text(110, 221, "outlives the cluster", "dim"),
        actor(20, 590, 180, 60, "control", "Preparation", ["tokenizes the text, once"]),
        *(
            text(36, 252 + 24 * i, line, anchor="start")
            for i, line in enumerate(("job file", "journal: decisions, steps", "outbox of metrics", "logs, status"))
        ),
        *(text(36, 445 + 24 * i, line, anchor="start") for i, line in enumerate(("checkpoints", "token store"))),
        # client, scheduler, controller
        arrow("M200,44 H328", "flow"),
        text(265, 37, "submit, scale, stop", "flow"),
        arrow("M335,66 H207", "flow"),
        text(268, 82, "status", "flow"),
        arrow("M110,86 V173", "disk"),
        text(118, 128, "report, logs: no cluster needed", "disk", "start"),
        arrow("M430,86 V173", "flow"),
        text(422, 158, "number requested, granted", "flow", "end"),
        arrow("M490,180 V93", "flow"),
        text(498, 134, "status, room it needs", "flow", "start"),
        # services
        arrow("M585,196 H680 V148 H773", "flow"),
        text(690, 141, "steps, events", "flow"),
        arrow("M870,118 V79", "flow"),
        text(862, 103, "until accepted", "flow", "end"),
        arrow("M335,216 H207", "disk"),
        text(268, 209, "journal", "disk"),
        text(268, 233, "before it acts", "disk"),
        # controller and workers
        arrow(f"M440,252 V306 H{centre[0] - 30} V{above}", "flow"),
        arrow(f"M440,306 H{centre[2] - 30} V{above}", "flow"),
        arrow(f"M{centre[1] - 30},306 V{above}", "flow"),
        text(432, 284, "Directive: desired state", "flow", "end"),
        f'<path d="M{centre[0] + 20},{WORKER_Y} V336 H480" class="flow"/>',
        f'<path d="M{centre[1] + 20},{WORKER_Y} V336 H480" class="flow"/>',
        f'<path d="M{centre[2] + 20},{WORKER_Y} V336 H480" class="flow"/>',
        arrow("M480,336 V259", "flow"),
        text(488, 284, "Report: phase, committed steps", "flow", "start"),
        arrow(f"M{centre[2] + 60},{WORKER_Y} V289", "flow", both=True),
        text(centre[2] + 52, 324, "addresses", "flow", "end"),
        # run storage
        arrow("M250,440 H207", "disk"),
        arrow("M200,465 H243", "disk"),
        text(225, 424, "shards", "disk"),
        text(225, 484, "rows", "disk"),
        arrow("M110,590 V517", "disk"),
        # between workers
        arrow(f"M432,{WORKER_Y + 96} L500,{WORKER_Y + 176}", "bulk"),
        arrow(f"M507,{WORKER_Y + 96} L439,{WORKER_Y + 176}", "bulk"),
        text(470, WORKER_Y + 88, "each step", "bulk"),
        text(470, WORKER_Y + 198, "to buddy", "bulk"),
        *(arrow(f"M{x},{WORKER_Y + 207} V{WORKER_Y + 233}", "bulk", both=True) for x in centre),
        box(250, WORKER_Y + 240, 696, 44, "data"),
        text(598, WORKER_Y + 258, "peer to peer, through no other process", "title"),
        text(
            598,
            WORKER_Y + 275,
            "each step: tokens to experts, gradients, the vote · rescale, recovery: pieces of shards",
        ),
        *(worker(number) for number in range(3)),
    ]
    title = "Processes of a run, and what they send to whom"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f"<defs>{''.join(map(marker, ('flow', 'bulk', 'disk')))}</defs>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" class="back"/>',
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
