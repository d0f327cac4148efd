"""All rows of a store, as a dict, through the check and through repair."""

from __future__ import annotations

from itertools import groupby

from sheratan_hub.rules.consistency import PROBLEMS, Consistency, Problem
from sheratan_hub.rules.mending import Found
from sheratan_hub.storage import Key, Row

Rows = dict[Key, Row]


def seen(rows: Rows, pieces: int = 3) -> tuple[Consistency, list[Problem]]:
    """All rows through the check, some at a time as a store gives them."""
    rules, problems = Consistency(), []
    for _, group in groupby(sorted(rows), key=lambda key: key.kind):
        keys = list(group)
        for start in range(0, len(keys), pieces):
            piece = [rows[key] for key in keys[start : start + pieces]]
            beside = {key: rows[key] for key in rules.beside(piece) if key in rows}
            problems += rules.see(piece, beside)
    recount = rules.recount()
    if recount is not None:
        for kind in recount.KINDS:
            recount.see([row for key, row in rows.items() if key.kind == kind])
        problems += recount.problems()
    return rules, problems


def wrong(rows: Rows, counts: dict[str, int]) -> list[Problem]:
    rules, problems = seen(rows)
    return [one for one in (*problems, *rules.counted(counts)) if one.code in PROBLEMS]


def put_right(rows: Rows, counts: dict[str, int]) -> tuple[Rows, dict[str, int]]:
    """What repair makes of these rows and counters."""
    found, right, rules = Found(), {}, Consistency()
    of = {kind: [row for key, row in rows.items() if key.kind == kind] for kind in ("job", "edge", "link")}
    found.see_jobs(of["job"], {key: rows[key] for key in found.beside_job(of["job"]) if key in rows})
    found.see_edges(of["edge"], {key: rows[key] for key in found.beside_edge(of["edge"]) if key in rows})
    found.see_links(of["link"])
    for key in sorted(rows):
        beside = {one: rows[one] for one in found.beside([rows[key]]) if one in rows}
        for row in found.mended(rows[key], beside).rows:
            assert row.key not in right, "a row is made twice"
            right[row.key] = row
    list(rules.see(list(right.values()), {}))
    return right, rules.recounted(counts)
