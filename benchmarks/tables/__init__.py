"""`python -m benchmarks tables`: the README's tables, made from the result files and from nothing else.

In the README a table stands between two markers, each on a line of its own; what lies between them is replaced:

    <!-- table:NAME -->
    <!-- /table -->

NAME is one of TABLES. A table whose results do not exist says which command makes them.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.tables.quality import finetuning, forgetting, ladder, learning, tasks, unbalanced, width
from benchmarks.tables.speed import codegen, generation, kernels, tokenizer, training

BLOCK = re.compile(
    r"^(?P<open>[ \t]*<!-- table:(?P<name>[^\n]*?) -->[ \t]*\n)(?P<body>.*?)(?P<close>^[ \t]*<!-- /table -->)",
    re.M | re.S,
)
MARKER = re.compile(r"^[ \t]*<!-- (?:table:.*|/table) -->", re.M)
TABLES: dict[str, Callable[[Path], str]] = {
    "learning": learning,
    "ladder": ladder,
    "width": width,
    "codegen": codegen,
    "kernels": kernels,
    "generation": generation,
    "tokenizer": tokenizer,
    "training": training,
    "finetuning": finetuning,
    "tasks": tasks,
    "unbalanced": unbalanced,
    "forgetting": forgetting,
}


def run(readme: Path, results: Path, *, check: bool = False) -> int:
    """Rewrites the tables in `readme`; with `check` changes nothing and returns 1 where one is out of date.

    Raises ValueError for a file that cannot be read, an unknown table, and a marker without its partner.
    """
    try:
        before = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{readme} cannot be read ({error}): give the file with --readme") from error
    after = rewritten(before, results, str(readme))
    if check:
        print(f"{readme}: {'up to date' if before == after else 'out of date, run `python -m benchmarks tables`'}")
        return int(before != after)
    if before != after:
        readme.write_text(after, encoding="utf-8")
    print(f"{readme}: {'nothing changed' if before == after else 'written'}", file=sys.stderr)
    return 0


def rewritten(text: str, results: Path, where: str = "the text") -> str:
    """`text` with the table of every pair of markers made anew from the files under `results`."""
    if 2 * len(BLOCK.findall(text)) != len(MARKER.findall(text)):
        raise ValueError(f"{where}: each <!-- table:NAME --> needs a <!-- /table --> on a line of its own after it")

    def table(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in TABLES:
            near = difflib.get_close_matches(name, TABLES, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TABLES)}"
            raise ValueError(f"{where}: there is no table {name!r}: {hint}")
        return f"{found['open']}\n{TABLES[name](results)}\n\n{found['close']}"

    return BLOCK.sub(table, text)
