"""The command line: many calls in child processes, or one of them again."""

from __future__ import annotations

import argparse
import sys
import time

from fuzz import children
from fuzz.describing import describe


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, help="of the calls; by default the time")
    parser.add_argument("--calls", type=int, default=20_000, help="how many")
    parser.add_argument("--call", type=int, help="run this one only, and print its arguments")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--progress", help=argparse.SUPPRESS)
    parser.add_argument("--spoiled", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    seed = int(time.time()) if chosen.seed is None else chosen.seed
    if chosen.child:
        children.serve(seed, *chosen.child, chosen.progress, chosen.spoiled)
        return 0
    if chosen.call is not None:
        return describe(seed, chosen.call)
    begin = time.monotonic()
    print(f"seed {seed}, {chosen.calls} calls", flush=True)
    failures = children.run(seed, chosen.calls)
    seconds = time.monotonic() - begin
    print(children.report(seed, failures))
    print(f"{len(failures)} failures; {chosen.calls / seconds:.0f} calls a second")
    return bool(failures)


sys.exit(main())
