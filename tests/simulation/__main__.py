"""`python -m tests.simulation [SIZE …]` prints the tables of docs/scale.md as Markdown, for all sizes or for these."""

from __future__ import annotations

import sys
import time

from tests.simulation.tables import SIZES, TABLES, markdown

sizes = tuple(int(given) for given in sys.argv[1:]) or SIZES
for number, (name, head, rows) in enumerate(TABLES, 1):
    began = time.monotonic()
    if sys.stderr.isatty():
        print(f"\r\033[K[{number}/{len(TABLES)}] {name} …", end="", file=sys.stderr, flush=True)
    print(f"<!-- {name} -->\n")
    for line in markdown(head, rows(sizes)):
        print(line, flush=True)
    print()
    if sys.stderr.isatty():
        print(f"\r\033[K[{number}/{len(TABLES)}] {name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
