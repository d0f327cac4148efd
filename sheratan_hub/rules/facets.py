"""What waiting jobs and nodes count for: the names of the counters that are kept of them (see `view.facets`)."""

from __future__ import annotations

from functools import lru_cache

from sheratan_hub.rules.lanes import read_lane


@lru_cache(4096)
def of_ready(lane: str) -> tuple[str, str]:
    """A pending job that may be claimed now, by the lane it stands in: also by its level."""
    return "job:pending", f"claimable:{read_lane(lane).level}"


@lru_cache(4096)
def of_node(state: str | None, attestation: str | None, health: str | None, draining: str | None) -> tuple[str, ...]:
    """A node by its state and what it attests; one that is ONLINE by its health, too; one that is drained."""
    found = [f"node:{state}", f"attestation:{attestation}"]
    if state == "ONLINE" and health is not None:
        found.append(f"nodes:{health}")
    return (*found, "nodes:draining") if draining else tuple(found)
