"""Who is asking: browsers of other sites, proxies, addresses that keep failing, strangers; and the id of a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import make_mocked_request

from sheratan_hub import __version__
from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.config import AuthSettings, ControlSettings, DataSettings
from sheratan_hub.web.callers import ADDRESSES_MAX, FORWARDED, HELD_PER_ADDRESS_MAX, Failures, Proxies
from tests.conftest import TOKEN, MakeSite, Site


@pytest.fixture
async def anonymous() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


# Browsers

SAME = [
    {"Origin": "http://127.0.0.1:8787"},
    {"Origin": "https://localhost"},
    {"Origin": "http://[::1]:3000"},
    {"Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
]
FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "https://evil.example:8787"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "file://"},
    {"Origin": "http://127.0.0.1.evil.example"},
    {"Origin": "http://localhost@evil.example"},
    {"Origin": "127.0.0.1"},
    {"Origin": "chrome-extension://127.0.0.1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"},
    {"Origin": "http://evil.example", "Sec-Fetch-Mode": "navigate"},
]
PATHS = [
    ("data", "POST", "/api/jobs"),
    ("control", "GET", "/api/hosts"),
    ("data", "GET", "/livez"),
    ("data", "GET", "/metrics"),
]


@pytest.mark.parametrize("headers", FOREIGN)
async def test_a_page_of_another_site_is_refused_with_and_without_the_token(
    make_site: MakeSite, anonymous: aiohttp.ClientSession, headers: dict[str, str]
) -> None:
    site = await make_site()
    for who in (site, Site(site.app, anonymous)):
        for plane, method, path in PATHS:
            status, body, answered = await who.ask(plane, method, path, headers=headers)
            assert (status, body["code"]) == (403, "foreign_origin"), path
            assert not any(name.startswith("Access-Control") for name in answered)
    assert await site.stored() == ({}, 0)


@pytest.mark.parametrize("headers", SAME)
async def test_a_page_of_this_hub_or_a_link_to_it_is_fine(make_site: MakeSite, headers: dict[str, str]) -> None:
    site = await make_site()
    assert (await site.ask("data", "GET", "/api/jobs", headers=headers))[0] == 200


async def test_off_loopback_an_origin_must_be_the_host_or_one_of_those_listed(make_site: MakeSite) -> None:
    plane = DataSettings(host="0.0.0.0", port=0, hosts=("hub.example", "board.example"))
    site = await make_site(data=plane)
    for origin, status in (
        ("https://hub.example", 200),
        ("https://board.example:444", 200),
        ("http://127.0.0.1", 403),
        ("https://other.example", 403),
    ):
        headers = {"Host": "hub.example", "Origin": origin}
        assert (await site.ask("data", "GET", "/api/jobs", headers=headers))[0] == status, origin


# Proxies


def seen(trusted: tuple[str, ...], *forwarded: str, peer: str = "10.0.0.9") -> str | None:
    request = make_mocked_request("GET", "/", headers=[("X-Forwarded-For", one) for one in forwarded])  # type: ignore[arg-type]
    return Proxies(trusted).client(request.clone(remote=peer))


@pytest.mark.parametrize(
    ("trusted", "forwarded", "expected"),
    [
        ((), ("1.2.3.4",), "10.0.0.9"),
        (("10.0.0.8",), ("1.2.3.4",), "10.0.0.9"),
        (("10.0.0.9",), ("1.2.3.4",), "1.2.3.4"),
        (("10.0.0.0/8",), ("1.2.3.4",), "1.2.3.4"),
        (("10.0.0.0/8",), ("6.6.6.6, 1.2.3.4",), "1.2.3.4"),
        (("10.0.0.0/8",), ("6.6.6.6", "1.2.3.4"), "1.2.3.4"),
        (("10.0.0.0/8",), ("127.0.0.1, 1.2.3.4, 10.1.1.1",), "1.2.3.4"),
        (("10.0.0.0/8",), ("1.2.3.4:5678",), "1.2.3.4"),
        (("10.0.0.0/8",), ("[2001:db8::1]:5678",), "2001:db8::1"),
        (("10.0.0.0/8",), ("2001:db8::1",), "2001:db8::1"),
        (("10.0.0.0/8",), ("::ffff:1.2.3.4",), "1.2.3.4"),
        (("10.0.0.0/8",), ("127.0.0.1, nonsense",), "10.0.0.9"),
        (("10.0.0.0/8",), ("unknown",), "10.0.0.9"),
        (("10.0.0.0/8",), ("",), "10.0.0.9"),
        (("10.0.0.0/8",), (), "10.0.0.9"),
        (("10.0.0.0/8",), ("10.0.0.1, 10.0.0.2",), "10.0.0.1"),
    ],
)
def test_the_address_that_counts(trusted: tuple[str, ...], forwarded: tuple[str, ...], expected: str) -> None:
    assert seen(trusted, *forwarded) == expected


@pytest.mark.parametrize("header", FORWARDED)
@pytest.mark.parametrize("value", ["1.2.3.4", "127.0.0.1", "for=127.0.0.1"])
async def test_what_a_proxy_that_is_not_trusted_brings_is_not_from_this_machine(
    make_site: MakeSite, header: str, value: str
) -> None:
    site = await make_site()
    status, body, _ = await site.ask("data", "GET", "/health", headers={header: value})
    assert (status, body["code"]) == (403, "loopback_only")
    assert (await site.ask("data", "GET", "/health"))[0] == 200


async def test_what_a_trusted_proxy_brings_is_from_where_it_says(make_site: MakeSite) -> None:
    site = await make_site(data=DataSettings(port=0, trusted_proxies=("127.0.0.1",)))
    for address, status in (("1.2.3.4", 403), ("127.0.0.1, 1.2.3.4", 403), ("127.0.0.1", 200), ("1.2.3.4, ::1", 200)):
        assert (await site.ask("data", "GET", "/health", headers={"X-Forwarded-For": address}))[0] == status, address
    await site.ask("data", "GET", "/api/jobs", headers={"X-Forwarded-For": "1.2.3.4", "Authorization": "Bearer wrong"})
    assert [line["remote_addr"] for line in site.audit() if line["event"] == "AUTH_FAILURE"] == ["1.2.3.4"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Forwarded": "for=1.2.3.4"},
        {"X-Real-IP": "1.2.3.4"},
        {"Via": "1.1 proxy"},
        {"X-Forwarded-For": "unknown"},
        {"X-Forwarded-For": ""},
        {"X-Forwarded-For": "1.2.3.4, unknown, 127.0.0.1"},
    ],
)
async def test_what_a_trusted_proxy_brings_without_saying_from_where_is_not_from_this_machine(
    make_site: MakeSite, headers: dict[str, str]
) -> None:
    site = await make_site(data=DataSettings(port=0, trusted_proxies=("127.0.0.1",)))
    for path in ("/health", "/admin/queue"):
        status, body, _ = await site.ask("data", "GET", path, headers=headers)
        assert (status, body["code"]) == (403, "loopback_only"), path


# Failures


async def waits(failures: Failures, clock: VirtualClock, address: str) -> int:
    """How long (ms) one more refusal takes."""
    began = clock.now()
    task = asyncio.create_task(failures.refused(address))
    await settle()
    while not task.done():
        await clock.advance(50)
    return clock.now() - began


async def test_the_first_refusals_come_at_once_then_later_and_later_up_to_a_bound(clock: VirtualClock) -> None:
    failures = Failures(clock, free=20, delay_ms=500)
    took = [await waits(failures, clock, "1.2.3.4") for _ in range(70)]
    assert took == [0] * 20 + [100] * 10 + [200] * 10 + [300] * 10 + [400] * 10 + [500] * 10
    assert await waits(failures, clock, "1.2.3.5") == 0


async def test_an_address_that_is_quiet_is_forgiven(clock: VirtualClock) -> None:
    failures = Failures(clock, free=5, delay_ms=500)
    for _ in range(10):
        await waits(failures, clock, "1.2.3.4")
    await clock.advance(200_000)
    assert await waits(failures, clock, "1.2.3.4") == 0


async def test_ipv6_addresses_of_one_network_are_one(clock: VirtualClock) -> None:
    failures = Failures(clock, free=1, delay_ms=500)
    took = [await waits(failures, clock, address) for address in ("2001:db8::1", "2001:db8::2", "2001:db9::1")]
    assert took == [0, 100, 0]


async def test_a_delay_of_nothing_switches_it_off(clock: VirtualClock) -> None:
    failures = Failures(clock, free=0, delay_ms=0)
    assert [await waits(failures, clock, "1.2.3.4") for _ in range(50)] == [0] * 50


async def test_addresses_are_remembered_within_bounds(clock: VirtualClock) -> None:
    failures = Failures(clock, free=1, delay_ms=500)
    for place in range(ADDRESSES_MAX + 500):
        assert await failures.refused(f"10.{place >> 16}.{place >> 8 & 255}.{place & 255}")
    assert len(failures) == ADDRESSES_MAX


async def test_no_more_than_so_many_of_one_address_wait_at_once(clock: VirtualClock) -> None:
    failures = Failures(clock, free=0, delay_ms=500)
    tasks = [asyncio.create_task(failures.refused("1.2.3.4")) for _ in range(HELD_PER_ADDRESS_MAX + 10)]
    await settle()
    assert [task.result() for task in tasks if task.done()] == [False] * 10
    await clock.advance(1000)
    assert all(task.done() for task in tasks)
    assert failures._held == {}


async def test_a_refusal_waits_while_a_valid_token_of_the_same_address_does_not(
    make_site: MakeSite, clock: VirtualClock
) -> None:
    site = await make_site(clock=clock, auth=AuthSettings(refusals_free=3))
    wrong = {"headers": {"Authorization": "Bearer wrong"}}
    for _ in range(3):
        assert (await site.ask("control", "GET", "/api/hosts", **wrong))[0] == 403
    late = asyncio.create_task(site.ask("control", "GET", "/api/hosts", **wrong))
    missing = asyncio.create_task(site.ask("control", "GET", "/api/hosts", headers={"Authorization": ""}))
    for _ in range(20):
        assert (await site.control("GET", "/api/hosts"))[0] == 200
    assert not late.done()
    assert not missing.done()
    assert len([line for line in site.audit() if line["event"] == "AUTH_FAILURE"]) >= 1, "audited before the wait"
    await clock.advance(100)
    assert [(await task)[0] for task in (late, missing)] == [403, 403]


async def test_other_refusals_do_not_count(make_site: MakeSite, clock: VirtualClock) -> None:
    site = await make_site(clock=clock, auth=AuthSettings(refusals_free=0))
    for _ in range(50):
        assert (await site.data("GET", "/api/jobs/x"))[0] == 404


# Strangers


async def test_health_tells_its_version_to_this_machine_only_and_of_no_token_whether_it_is_good(
    make_site: MakeSite, anonymous: aiohttp.ClientSession
) -> None:
    site = await make_site(control=ControlSettings(port=0, trusted_proxies=("127.0.0.1",)))
    far = {"X-Forwarded-For": "1.2.3.4"}
    stranger = Site(site.app, anonymous)
    told = [
        (await who.ask("control", "GET", "/health", headers={**far, **more}))[1]
        for who, more in ((stranger, {}), (stranger, {"Authorization": "Bearer x"}), (site, {}))
    ]
    assert told[0] == told[1] == told[2]
    assert "version" not in told[0]
    assert (await stranger.ask("control", "GET", "/health"))[1]["version"] == __version__


async def test_no_header_of_any_answer_tells_a_version(site: Site) -> None:
    for plane, method, path in [*PATHS, ("data", "GET", "/nowhere"), ("control", "GET", "/metrics?format=json")]:
        _, _, headers = await site.ask(plane, method, path)
        assert headers["Server"] == "sheratan-hub", path
        assert not any(char.isdigit() for char in headers["Server"])


# Request ids


async def test_every_answer_has_an_id_of_its_own(site: Site) -> None:
    answers = [await site.ask(plane, method, path) for plane, method, path in [*PATHS, *PATHS, ("data", "GET", "/no")]]
    ids = [headers["X-Request-ID"] for _, _, headers in answers]
    assert len(set(ids)) == len(ids)


async def test_an_answer_that_leases_has_one_too(site: Site) -> None:
    await site.submit()
    _, body, headers = await site.ask("data", "POST", "/api/jobs/pull", json={"node_id": "n1"})
    assert body["jobs"]
    assert headers["X-Request-ID"]


async def test_a_sane_id_of_the_client_is_kept(site: Site) -> None:
    _, _, headers = await site.ask("data", "GET", "/api/jobs", headers={"X-Request-ID": "trace-1.2:3_4"})
    assert headers["X-Request-ID"] == "trace-1.2:3_4"


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, '"quoted"', "<script>", "ä"])
async def test_a_strange_id_of_the_client_is_not(site: Site, given: str) -> None:
    _, _, headers = await site.ask("data", "GET", "/api/jobs", headers={"X-Request-ID": given})
    assert headers["X-Request-ID"] not in ("", given)


async def test_the_log_of_a_bug_names_the_clients_id(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = await make_site()

    async def broken(*_: object) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(site.app.hub, "page", broken)
    logging.getLogger("sheratan").addHandler(caplog.handler)
    try:
        _, body, headers = await site.ask("data", "GET", "/api/jobs", headers={"X-Request-ID": "mine-1"})
    finally:
        logging.getLogger("sheratan").removeHandler(caplog.handler)
    assert (body["request_id"], headers["X-Request-ID"]) == ("mine-1", "mine-1")
    assert any("mine-1" in record.getMessage() for record in caplog.records)
    assert TOKEN not in caplog.text
