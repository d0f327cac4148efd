"""`sheratan-hub top`: what a snapshot tells of a hub, and how it looks on wide and narrow terminals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console

from sheratan_hub import top
from sheratan_hub.cli_top import draw
from sheratan_hub.client import HubClient, HubRefused, HubUnreachable
from sheratan_hub.clock import VirtualClock
from sheratan_hub.metrics import table
from sheratan_hub.top import STARTED, PerSecond, Sampler, Snapshot, read_samples
from tests.conftest import TOKEN, MakeSite, Site
from tests.web.test_docs import column


def client(site: Site, token: str = TOKEN) -> HubClient:
    urls = (f"http://127.0.0.1:{site.app.ports[plane]}" for plane in ("control", "data"))
    return HubClient(*urls, token, patience_seconds=0)


def look(shown: Snapshot, width: int = 120) -> list[str]:
    console = Console(width=width, force_terminal=False)
    with console.capture() as text:
        console.print(draw(shown, width, None))
    return [line.rstrip() for line in text.get().splitlines()]


async def test_a_snapshot_tells_of_nodes_jobs_ages_and_rates(make_site: MakeSite) -> None:
    site, clock = await make_site(), VirtualClock()
    async with client(site) as hub:
        sampler = Sampler(hub, clock)
        first = await sampler.sample()
        assert (first.rates["submitted"], first.commands_per_second) == (None, None)
        for priority in (1, 1, 2, 2):
            await site.submit(priority=priority)
        for node in ("b", "a"):
            await site.control("POST", "/api/hosts/heartbeat", {"node_id": node, "current_jobs": 0})
        await site.control("POST", "/api/hosts/b/drain", {})
        await site.finish(await site.lease("n1"))
        await site.lease("n1")
        await clock.advance(2000)
        shown = await sampler.sample()
    assert shown.health == {"control": "ok", "data": "ok"}
    assert shown.version
    assert (shown.nodes["ONLINE"], shown.nodes["DEAD"]) == (2, 0)
    assert [node.node_id for node in shown.node_list or ()] == ["b", "a"]
    assert {name: n for name, n in shown.jobs.items() if n} == {"pending": 2, "running": 1, "completed": 1}
    assert shown.rates == {
        "submitted": 2.0,
        "leased": 1.0,
        "completed": 0.5,
        "failed": 0.0,
        "retried": 0.0,
        "lost": 0.0,
    }
    assert shown.commands_per_second is not None
    assert shown.commands_per_second > 0
    assert shown.oldest_seconds.keys() == {"CRITICAL", "HIGH", "NORMAL", "LOW"}
    assert (shown.oldest_seconds["NORMAL"] or 0) > 0
    assert shown.alerts == []
    text = "\n".join(look(shown))
    for words in ("2 ONLINE", "2 pending", "1 running", "2 submitted", "draining", "no alerts"):
        assert words in text, words


async def test_a_token_that_may_only_look_sees_the_rest(make_site: MakeSite) -> None:
    site = await make_site()
    _, made = await site.control("POST", "/api/access", {"role": "node", "node_id": "n"})
    async with client(site, made["token"]) as hub:
        shown = await Sampler(hub, VirtualClock()).sample()
    assert shown.jobs["pending"] == 0
    assert (shown.node_list is None) or (shown.alerts is None)
    assert "not for this token" in "\n".join(look(shown))


async def test_a_wrong_token_is_refused_and_a_hub_that_is_gone_unreachable(make_site: MakeSite) -> None:
    site = await make_site()
    async with client(site, "wrong") as hub:
        with pytest.raises(HubRefused):
            await Sampler(hub, VirtualClock()).sample()
    async with HubClient("http://127.0.0.1:9", "http://127.0.0.1:9", TOKEN, patience_seconds=0) as hub:
        with pytest.raises(HubUnreachable):
            await Sampler(hub, VirtualClock()).sample()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/metrics", 'sheratan_jobs{status="pend'),
        ("/health", '{"checks": 3}'),
        ("/api/hosts", '{"nodes": 3}'),
        ("/api/alerts", "{}"),
    ],
)
async def test_answers_that_no_hub_gives_are_as_good_as_none(path: str, body: str) -> None:
    told = {"/metrics": "sheratan_jobs 1\n", "/health": "{}", "/api/hosts": '{"nodes": []}'}
    told["/api/alerts"] = '{"alerts": []}'

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=told[request.path])

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    async with TestServer(app) as server, HubClient(*[str(server.make_url("/"))] * 2, TOKEN, patience_seconds=0) as hub:
        assert (await Sampler(hub, VirtualClock()).sample()).alerts == []
        told[path] = body
        with pytest.raises(HubUnreachable, match="does not answer as a hub"):
            await Sampler(hub, VirtualClock()).sample()


async def test_a_hub_that_is_not_well_says_so(make_site: MakeSite) -> None:
    site = await make_site()
    site.app.hub.ready = False
    async with client(site) as hub:
        shown = await Sampler(hub, VirtualClock()).sample()
    assert (shown.health["control"] or "").startswith("not ")
    assert "control plane not started" in "\n".join(look(shown))


def test_rates_are_none_once_the_counters_began_anew() -> None:
    before = {("n_total", ""): 5.0, STARTED: 1.0}
    assert PerSecond(3000, {("n_total", ""): 9.0, STARTED: 1.0}, (1000, before)).of("n_total", "") == 2.0
    assert PerSecond(3000, {("n_total", ""): 9.0, STARTED: 2.0}, (1000, before)).of("n_total", "") is None
    assert PerSecond(3000, {("n_total", ""): 4.0, STARTED: 1.0}, (1000, before)).of("n_total", "") is None
    assert PerSecond(1000, {("n_total", ""): 9.0, STARTED: 1.0}, (1000, before)).of("n_total", "") is None


def test_samples_are_those_of_the_hub_with_one_label_or_none() -> None:
    text = (
        '# TYPE sheratan_jobs gauge\nsheratan_jobs{status="pending"} 3\n# TYPE sheratan_http_requests counter\n'
        'sheratan_http_requests_total{plane="data",route="/",status="200"} 9\n# TYPE other gauge\nother 1\n'
        "# TYPE sheratan_long_polls gauge\nsheratan_long_polls 2\n"
    )
    assert read_samples(text) == {("sheratan_jobs", "pending"): 3.0, ("sheratan_long_polls", ""): 2.0}


def test_what_it_asks_for_is_what_metrics_tell() -> None:
    assert (top.PRIORITIES, top.STATUSES, top.STATES) == (table.PRIORITIES, table.JOB_STATUSES, table.NODE_STATES)
    names = set(re.findall(r'"(sheratan_\w+)"', Path(top.__file__).read_text()))
    assert len(names) > 5
    assert names <= table.BY_NAME.keys()
    assert set(top.RATES.values()) <= set(column("Ledger"))


SHOWN = Snapshot(
    ts="2026-11-21T10:00:00.000Z",
    version="1",
    health={"control": "ok", "data": None},
    nodes={"ONLINE": 30, "STALE": 1, "DEAD": 0},
    jobs={"pending": 100_000, "running": 20, "failed": 2},
    ready={"HIGH": 1, "LOW": None},
    oldest_seconds={"HIGH": 59.25, "LOW": 7300},
    rates={"submitted": 1234.5, "lost": None},
    node_list=[],
    alerts=[{"ts": "2026-11-21T09:59:00.000Z", "rule": "auth_failure", "text": "21 AUTH_FAILURE within 60 s"}],
)


@pytest.mark.parametrize("width", [20, 40, 80, 120, 200])
def test_nothing_is_wider_than_the_terminal_and_nothing_is_left_out(width: int) -> None:
    lines = look(SHOWN, width)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    words = ("ONLINE", "100000", "59.2 s", "2 h", "1234.5", "auth_failure") if width >= 40 else ("ONLINE", "100000")
    for word in words:
        assert word in text, word


def test_while_the_hub_is_away_the_old_numbers_are_marked_as_old() -> None:
    text = "\n".join(look(msgspec.structs.replace(SHOWN, away="no answer from http://h: refused\x1b[2J")))
    assert "AWAY, what follows is old: no answer from http://h: refused?[2J" in text
    assert "100000 pending" in text


def test_names_cannot_steer_the_terminal() -> None:
    from sheratan_hub.answers import Node

    wicked: dict[str, Any] = {"rule": "\x1b[31m", "text": "[bold]a\nb", "ts": "now"}
    shown = msgspec.structs.replace(SHOWN, node_list=[Node(node_id="a\x1b]0;x\x07b", status="ONLINE")], alerts=[wicked])
    text = "\n".join(look(shown, 200))
    assert "\x1b" not in text
    assert "a?]0;x?b" in text
    assert "[bold]a?b" in text
