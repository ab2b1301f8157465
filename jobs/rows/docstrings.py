"""Chats made of the documentation in Python's own library, for tasks sft and dpo.

    python -m jobs.rows.docstrings chats jobs/data/chats.jsonl       # from the directory above jobs/
    python -m jobs.rows.docstrings pairs jobs/data/pairs.jsonl

A user asks what a function does, and the assistant answers with the first paragraph of its docstring. In a pair the
chosen answer is that paragraph, and the rejected one has its words in another order.
"""

import argparse
import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "turtledemo"}
WORDS = (6, 40)  # of an answer


def documented() -> Iterator[tuple[str, str]]:
    """Names of functions and classes of the library, each with the first paragraph of its docstring."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if LEFT_OUT.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                paragraph = re.sub(r"\s+", " ", (ast.get_docstring(node) or "").split("\n\n")[0]).strip()
                if WORDS[0] <= len(paragraph.split()) <= WORDS[1]:
                    yield f"{'.'.join(part for part in parts if part != '__init__')}.{node.name}", paragraph


def chats() -> Iterator[dict]:
    """A question and its answer."""
    for name, answer in documented():
        question = f"What does {name} do?"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"messages": turns}


def pairs() -> Iterator[dict]:
    """A question with the answer, and with its words in another order."""
    draw = random.Random(0)
    for name, answer in documented():
        words = answer.split()
        shuffled = draw.sample(words, len(words))
        if shuffled != words:
            yield {"prompt": f"What does {name} do?", "chosen": answer, "rejected": " ".join(shuffled)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("chats", "pairs"))
    parser.add_argument("file", type=Path)
    wanted = parser.parse_args()
    wanted.file.parent.mkdir(parents=True, exist_ok=True)
    with wanted.file.open("w", encoding="utf-8") as file:
        for row in chats() if wanted.kind == "chats" else pairs():
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
