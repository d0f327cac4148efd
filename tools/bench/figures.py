"""The arithmetic of a run: windows of load, their neighbours, ratios, medians, and the targets they are held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any, NamedTuple


class Failed(Exception):
    """A row that cannot be trusted: something was refused, did not start, or was not what it seemed."""


class Window(NamedTuple):
    """What one window of load brought: jobs (of the empty handler, requests) a second, milliseconds of one request,
    CPU seconds of the server for 10,000 of those jobs, and the share of a core that the load took."""

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_s: float = 0.0
    busy: float = 0.0


class Sample(NamedTuple):
    """A window and its two neighbours, which it is compared with."""

    window: Window
    before: Window
    after: Window

    def ratio(self, of: str = "rate") -> float:
        """How many times what its neighbours had on the average."""
        theirs: float = mean((getattr(self.before, of), getattr(self.after, of)))
        mine: float = getattr(self.window, of)
        return mine / theirs if theirs else 0.0


Measure = Callable[[], Window]


def alternate(base: Measure, sides: Mapping[str, Measure], windows: int) -> dict[str, list[Sample]]:
    """base, A, base, B, base, A, ...: each side gets so many windows, each between two of the base."""
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    before = base()
    for _ in range(windows):
        for name, measure in sides.items():
            window = measure()
            after = base()
            samples[name].append(Sample(window, before, after))
            before = after
    return samples


class Target(NamedTuple):
    """`at` is "least" or "most"; a goal is shown and promised to nobody."""

    at: str
    bound: float
    goal: bool = False

    def met(self, figure: float) -> bool:
        return figure >= self.bound if self.at == "least" else figure <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at == "least" else "<="
        return f"{sign} {self.bound:g}{' (goal)' if self.goal else ''}"


TARGETS: dict[tuple[str, str], Target] = {
    ("submit", "ratio"): Target("least", 0.45),
    ("mixed", "ratio"): Target("least", 0.40),
    ("keys", "ratio"): Target("least", 0.35, goal=True),
    ("bulk", "ratio"): Target("least", 2.0),
    ("result-pull", "ratio"): Target("least", 0.25),
    ("idle", "p50 ratio"): Target("most", 8),
    ("million-submit", "ratio"): Target("least", 0.8),
    ("million-submit", "p99 ratio"): Target("most", 3),
    ("million-pull", "ratio"): Target("least", 0.8),
    ("million-pull", "p99 ratio"): Target("most", 3),
    ("million-start", "start s"): Target("most", 10),
    ("slow", "ratio"): Target("least", 15),
    ("client", "ratio"): Target("least", 0.9),
}
"""By row and figure; the same for every store."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: a row of one store and side, or why there is none. `figures` are compared with targets."""

    store: str
    row: str
    side: str = ""
    against: str = ""
    window: Window | None = None
    figures: dict[str, float] = field(default_factory=dict)
    error: str = ""
    samples: Sequence[Sample] = ()

    def targets(self) -> list[tuple[str, float, Target | None]]:
        """(name, figure, target) for each figure."""
        return [(name, value, TARGETS.get((self.row, name))) for name, value in self.figures.items()]

    def missed(self) -> bool:
        return any(not target.met(value) for _, value, target in self.targets() if target and not target.goal)

    def document(self) -> dict[str, Any]:
        """For JSON; windows with their neighbours and all."""
        told = {name: {"is": value, "target": str(aim) if aim else None} for name, value, aim in self.targets()}
        for name, value, aim in self.targets():
            told[name]["met"] = aim.met(value) if aim else None
        return {
            "store": self.store,
            "row": self.row,
            "side": self.side,
            "against": self.against,
            **(self.window._asdict() if self.window else {}),
            "figures": told,
            "error": self.error,
            "samples": [{name: one._asdict() for name, one in sample._asdict().items()} for sample in self.samples],
        }


def line(
    store: str,
    row: str,
    side: str,
    against: str,
    samples: Sequence[Sample],
    ratios: Mapping[str, str] | None = None,
) -> Line:
    """The medians of a row's windows. `ratios` names each figure and the field of a window that it compares."""
    compared = {"ratio": "rate"} if ratios is None else ratios
    figures = {name: median(sample.ratio(of) for sample in samples) for name, of in compared.items()}
    window = middle([sample.window for sample in samples])
    return Line(store, row, side, against, window, figures, samples=tuple(samples))


def middle(windows: Sequence[Window]) -> Window:
    """The median of each figure."""
    return Window(*(median(figures) for figures in zip(*windows, strict=True)))
