"""What an index must come through, at any length; the exit status says whether it did.

What to run, from the folder of the repository:

    python -m benchmarks.torture kills --times 1000
    python -m benchmarks.torture damage --times 2000
    python -m benchmarks.torture readers --seconds 60
    python -m benchmarks.torture disk
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # this process forks, and a fork takes only one thread along

from benchmarks.torture import breaking, entries, full_disk, kills, readers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "damage", "readers", "disk"])
    parser.add_argument("--times", type=int, help="kills (1,000) or damages (2,000)")
    parser.add_argument("--seconds", type=float, default=60.0, help="that the readers read")
    parser.add_argument("--sizes", type=int, nargs="+", default=full_disk.FREE_KB, help="KB that are free on the disk")
    parser.add_argument("--kinds", nargs="+", choices=entries.KINDS, default=list(entries.KINDS), help="of structures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to work; the system's folder for temporary files by default")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON document")
    return parser


def main() -> int:
    """Run one torture, print its figures and what was wrong."""
    args = _parser().parse_args()
    entries.use_small_blocks()
    entries.KINDS[:] = args.kinds
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        home = Path(folder)
        report: Any
        match args.what:
            case "kills":
                report = kills.run(home, args.times or 1_000, args.seed, _say)
            case "damage":
                report = breaking.run(home, args.times or 2_000, args.seed, _say)
            case "readers":
                report = readers.run(home, args.seconds, seed=args.seed)
            case _:
                report = full_disk.run(home, args.sizes)
    figures = {name: _plain(value) for name, value in vars(report).items()}
    if args.json:
        print(json.dumps(figures))
    else:
        _print(figures)
        print(*(breaking.table(report) if args.what == "damage" else []), sep="\n")
    return 1 if report.problems else 0


def _plain(value: Any) -> Any:
    """Return a counter as a mapping that JSON can hold: pairs become "file: outcome"."""
    if not isinstance(value, dict):
        return value
    return {": ".join(name) if isinstance(name, tuple) else name: count for name, count in sorted(value.items())}


def _print(figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        if name == "problems":
            print(f"problems: {len(value)}", *value[:40], sep="\n  ")
        elif isinstance(value, dict):
            print(f"{name}:", *(f"{key} {count:,}" for key, count in value.items()), sep="\n  ")
        else:
            print(f"{name}: {value:,.0f}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
