"""What it costs a pull to choose its lane: microseconds of CPU time, by what else waits.

    .venv/bin/python -m tools.lanes --against ../before

measures this checkout and another one by turns, each in a process of its own, and prints both. One turn is what each
pull of one job asks of the directory: the next lane, its new head, and whose turn it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 0.5
"""How long each situation is measured, in each round."""


def situations() -> Iterator[tuple[str, Any, Any]]:
    """(what waits, the directory, the pull's offer)"""
    from sheratan_hub.rules.lanes import Lanes, Offer, lane_name

    def lanes(names: Callable[[int], str], n: int) -> Lanes:
        return Lanes({names(i): i * 1024 for i in range(n)}, 0)

    everything, nothing = Offer(frozenset(), frozenset()), ()
    yield "1 kind", lanes(lambda i: lane_name(2, "k", "", nothing), 1), everything
    for n in (100, 1000, 10_000):
        yield f"{n} kinds", lanes(lambda i: lane_name(2, f"k{i}", "", nothing), n), everything
    yield "1000 kinds of 10 sources", lanes(lambda i: lane_name(2, f"k{i}", f"s{i % 10}", nothing), 1000), everything
    yield (
        "1000 kinds, 3 asked for",
        lanes(lambda i: lane_name(2, f"k{i}", "", nothing), 1000),
        Offer(frozenset(), frozenset({"k5", "k6", "k7"})),
    )
    one = Lanes({lane_name(2, "k", "", nothing): 1}, 0)
    for i in range(1000):
        one.set(lane_name(1, "k", "", (f"cap-{i}",)), i * 1024)
    yield "1000 needs, none of which it has", one, everything
    caps = frozenset(f"cap-{i}" for i in range(1000))
    yield (
        "1000 needs, all of which it has",
        lanes(lambda i: lane_name(2, "k", "", (f"cap-{i}",)), 1000),
        Offer(caps, frozenset()),
    )


def measure() -> dict[str, float]:
    """Microseconds of CPU a turn, by situation."""
    found = {}
    for what, lanes, offer in situations():
        head = 1 << 40
        turns, began = 0, time.process_time()
        while (spent := time.process_time() - began) < SECONDS:
            for _ in range(20):
                (name,) = lanes.turn(offer, 1, (), 0)
                head += 1024
                lanes.serve(offer, (name,))
                lanes.set(name, head)
            turns += 20
        found[what] = spent / turns * 1e6
    return found


def run(root: Path) -> dict[str, float]:
    """The same in a process of its own, with the code of that checkout."""
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import runpy, json;" + (
        f"print(json.dumps(runpy.run_path({str(Path(__file__))!r})['measure']()))"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    answer: dict[str, float] = json.loads(told.stdout)
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--against", type=Path, help="another checkout, as it was before")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts")
    given = parser.parse_args()
    roots = [root.resolve() for root in (given.against, ROOT) if root is not None]
    rounds: list[list[dict[str, float]]] = [[run(root) for root in roots] for _ in range(given.rounds)]
    print(
        f"{'what waits':34}"
        + "".join(f"{name:>12}" for name in ("before", "now")[-len(roots) :])
        + "  us of CPU a turn"
    )
    for what in rounds[0][0]:
        best = (min(one[place][what] for one in rounds) for place in range(len(roots)))
        print(f"{what:34}" + "".join(f"{us:12.1f}" for us in best))
    return 0


if __name__ == "__main__":
    sys.exit(main())
