"""Tokens over HTTP: rotation by settings and over the API, through restarts; who used which; what is audited."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from sheratan_hub.clock import VirtualClock, rfc3339
from sheratan_hub.config import AuthSettings, Secrets
from sheratan_hub.storage import StoreRefused
from tests.conftest import MakeSite, Site

OLD, NEW, THIRD = "old-token-0123456789", "new-token-0123456789", "third-token-0123456789"
MINUTE = 60_000

Ask = Callable[..., Awaitable[tuple[int, Any]]]


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def as_token(session: aiohttp.ClientSession) -> Ask:
    """`as_token(site, token, "GET", path, body, plane=)` asks with that token only: (status, body)."""

    async def ask(
        site: Site, token: str, method: str, path: str, body: Any = None, plane: str = "control"
    ) -> tuple[int, Any]:
        options = {} if body is None else {"json": body}
        headers = {"X-Sheratan-Token": token}
        return (await Site(site.app, session).ask(plane, method, path, headers=headers, **options))[:2]

    return ask


def until(clock: VirtualClock, ms: int) -> AuthSettings:
    return AuthSettings(refusal_delay_ms=0, rotation_until=rfc3339(clock.now() + ms))


async def rotating(make_site: MakeSite, clock: VirtualClock, scheme: str = "memory", ms: int = MINUTE) -> Site:
    """A hub whose settings rotate from OLD to NEW within a minute."""
    return await make_site(scheme, clock, Secrets(OLD, token_next=NEW), auth=until(clock, ms))


async def stop(site: Site) -> None:
    await site.session.close()
    await site.app.stop()


def lines(site: Site, *events: str) -> list[dict[str, Any]]:
    return [line for line in site.audit() if line["event"] in events]


def beat(node_id: str = "n1") -> tuple[str, str, dict[str, str]]:
    return "POST", "/api/hosts/heartbeat", {"node_id": node_id}


async def ended(site: Site) -> list[str]:
    """The names of the ledger's events on rotations."""
    found = [json.loads(line.line)["event"] for line in await site.app.store.events()]
    return [name.removeprefix("token.rotation_") for name in found if name.startswith("token.")]


# A rotation by the settings


async def test_in_the_window_both_tokens_are_good_and_audited_per_node(
    make_site: MakeSite, clock: VirtualClock, as_token: Ask
) -> None:
    site = await rotating(make_site, clock)
    for token, node_id in ((OLD, "n1"), (NEW, "n2"), (NEW, "n2"), (OLD, "n1")):
        assert (await as_token(site, token, *beat(node_id)))[0] == 200
    await clock.advance(2000)
    told = [(line["event"], line["node_id"]) for line in lines(site, "TOKEN_ACCEPTED_OLD", "TOKEN_ACCEPTED_NEXT")]
    assert sorted(told) == [("TOKEN_ACCEPTED_NEXT", "n2")] * 2 + [("TOKEN_ACCEPTED_OLD", "n1")] * 2
    assert len(lines(site, "TOKEN_ROTATION_STARTED")) == 1


async def test_outside_of_a_rotation_the_token_is_not_news(make_site: MakeSite) -> None:
    site = await make_site()
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1"})
    assert lines(site, "TOKEN_ACCEPTED_OLD", "TOKEN_ACCEPTED_NEXT") == []


@pytest.mark.parametrize("scheme", ["memory", "sqlite", "file"])
async def test_at_the_deadline_the_next_takes_over_without_a_request(
    make_site: MakeSite, clock: VirtualClock, as_token: Ask, scheme: str
) -> None:
    site = await rotating(make_site, clock, scheme)
    await clock.advance(MINUTE - 1)
    assert (await as_token(site, OLD, "GET", "/api/hosts"))[0] == 200
    await clock.advance(1)
    while not lines(site, "TOKEN_ROTATION_FINALIZED"):
        await clock.advance(10)
    status, body = await as_token(site, OLD, "GET", "/api/hosts")
    assert (status, body["code"]) == (403, "old_token")
    assert (await as_token(site, NEW, "GET", "/api/hosts"))[0] == 200
    await clock.advance(5000)
    assert len(lines(site, "TOKEN_ROTATION_FINALIZED")) == 1
    assert [line["reason"] for line in lines(site, "AUTH_FAILURE")] == ["old_token"]
    assert len(lines(site, "TOKEN_RETIRED")) == 1


async def test_the_old_token_ends_at_the_deadline_even_if_the_store_fails_then(
    make_site: MakeSite, clock: VirtualClock, as_token: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await rotating(make_site, clock)

    def broken(*_: object) -> Any:
        from sheratan_hub.storage import StoreDown

        raise StoreDown("out of order")

    monkeypatch.setattr(site.app.store, "begin", broken)
    await clock.advance(MINUTE)
    assert (await as_token(site, OLD, "GET", "/api/hosts"))[1]["code"] == "old_token"
    assert (await as_token(site, NEW, "GET", "/api/hosts"))[0] == 200
    assert lines(site, "TOKEN_ROTATION_FINALIZED") == []
    monkeypatch.undo()
    await clock.advance(5000)
    assert len(lines(site, "TOKEN_ROTATION_FINALIZED")) == 1


@pytest.mark.parametrize("scheme", ["sqlite", "file"])
async def test_a_retired_token_stays_retired_through_starts_with_the_same_settings(
    make_site: MakeSite, clock: VirtualClock, as_token: Ask, scheme: str
) -> None:
    for _ in range(3):
        site = await rotating(make_site, clock, scheme, ms=-1)
        assert (await as_token(site, OLD, "GET", "/api/hosts"))[1]["code"] == "old_token"
        assert (await as_token(site, NEW, "GET", "/api/hosts"))[0] == 200
        assert await ended(site) == ["finalized"]
        await stop(site)
    assert len(lines(site, "TOKEN_ROTATION_FINALIZED")) == 1


async def test_settings_that_newly_name_only_a_retired_token_stop_the_start(
    make_site: MakeSite, clock: VirtualClock
) -> None:
    await stop(await rotating(make_site, clock, "sqlite", ms=-1))
    with pytest.raises(StoreRefused, match="retired and stays so"):
        await make_site("sqlite", clock, Secrets(OLD))


# A rotation over the API


async def test_a_rotation_over_the_api_from_begin_to_end(
    make_site: MakeSite, clock: VirtualClock, as_token: Ask
) -> None:
    site = await make_site("sqlite", clock, Secrets(OLD))
    status, begun = await as_token(site, OLD, "POST", "/api/tokens/rotation", {"seconds": 60})
    assert (status, begun["until"]) == (201, rfc3339(clock.now() + MINUTE))
    value = begun["token"]
    assert len(value) == len("shn_") + 64
    status, told = await as_token(site, value, *beat())
    assert (status, told["token"]) == (200, {"retiring": False, "until": None})
    status, told = await as_token(site, OLD, *beat("n2"))
    assert (status, told["token"]) == (200, {"retiring": True, "until": begun["until"]})
    _, state = await as_token(site, value, "GET", "/api/tokens")
    assert {node: use["token_id"] for node, use in state["nodes"].items()} == {
        "n1": begun["next"]["id"],
        "n2": begun["active"]["id"],
    }
    assert state["locked_out"] == ["n2"]
    await stop(site)
    site = await make_site("sqlite", clock, Secrets(OLD))
    assert (await as_token(site, value, "GET", "/api/hosts"))[0] == 200
    await clock.advance(MINUTE)
    while not lines(site, "TOKEN_ROTATION_FINALIZED"):
        await clock.advance(10)
    assert (await as_token(site, OLD, "GET", "/api/hosts"))[1]["code"] == "old_token"
    _, state = await as_token(site, value, "GET", "/api/tokens")
    assert (state["active"]["id"], state["next"], state["until"]) == (begun["next"]["id"], None, None)
    assert [one["id"] for one in state["retired"]] == [begun["active"]["id"]]
    assert value not in json.dumps(state) + site.app.audit.path.read_text()


async def test_what_nodes_used_before_a_rotation_and_a_restart_is_known(make_site: MakeSite, as_token: Ask) -> None:
    site = await make_site("sqlite", secrets=Secrets(OLD))
    await as_token(site, OLD, *beat("n1"))
    _, made = await as_token(site, OLD, "POST", "/api/access", {"role": "node", "node_id": "n2"})
    await as_token(site, made["token"], *beat("n2"))
    await stop(site)
    site = await make_site("sqlite", secrets=Secrets(OLD))
    _, begun = await as_token(site, OLD, "POST", "/api/tokens/rotation", {"seconds": 60})
    _, state = await as_token(site, OLD, "GET", "/api/tokens")
    assert {node: use["token_id"] for node, use in state["nodes"].items()} == {
        "n1": begun["active"]["id"],
        "n2": made["access_id"],
    }
    assert state["locked_out"] == ["n1"]


async def test_a_given_token_is_not_shown_and_may_be_sent_again(make_site: MakeSite, as_token: Ask) -> None:
    site = await make_site(secrets=Secrets(OLD))
    body = {"seconds": 60, "token": NEW}
    first, again = [await as_token(site, OLD, "POST", "/api/tokens/rotation", body) for _ in range(2)]
    assert (first[0], again[0]) == (201, 200)
    assert "token" not in first[1]
    assert first[1]["until"] == again[1]["until"]
    status, body = await as_token(site, OLD, "POST", "/api/tokens/rotation", {"seconds": 60})
    assert (status, body["code"]) == (409, "rotation_under_way")


async def test_an_abandoned_rotation_tells_who_is_locked_out(make_site: MakeSite, as_token: Ask) -> None:
    site = await make_site(secrets=Secrets(OLD))
    await as_token(site, OLD, "POST", "/api/tokens/rotation", {"seconds": 60, "token": NEW})
    await as_token(site, NEW, *beat("n1"))
    await as_token(site, NEW, "POST", "/api/jobs/pull", {"node_id": "n2"}, plane="data")
    status, body = await as_token(site, OLD, "DELETE", "/api/tokens/rotation")
    assert (status, body["next"], body["locked_out"]) == (200, None, ["n1", "n2"])
    assert (await as_token(site, NEW, "GET", "/api/hosts"))[1]["code"] == "invalid_token"
    assert (await as_token(site, OLD, "GET", "/api/hosts"))[0] == 200
    assert (await as_token(site, OLD, "DELETE", "/api/tokens/rotation"))[1]["code"] == "no_rotation"
    assert [line["reason"] for line in lines(site, "ADMIN_ACTION")] == ["rotation_abandoned"]


async def waiting_poll(site: Site, as_token: Ask, token: str) -> asyncio.Task[tuple[int, Any]]:
    body = {"node_id": "n1", "wait_seconds": 30}
    poll = asyncio.create_task(as_token(site, token, "POST", "/api/jobs/pull", body, plane="data"))
    while not site.app.hub.waiting.pulls:
        await asyncio.sleep(0)
    return poll


async def test_a_long_poll_with_the_old_token_ends_with_it_and_is_no_failure(
    make_site: MakeSite, clock: VirtualClock, as_token: Ask
) -> None:
    site = await make_site("memory", clock, Secrets(OLD))
    poll = await waiting_poll(site, as_token, OLD)
    await as_token(site, OLD, "POST", "/api/tokens/rotation", {"seconds": 5, "token": NEW})
    await clock.advance(5000)
    status, body = await poll
    assert (status, body["jobs"]) == (200, [])
    assert not lines(site, "AUTH_FAILURE", "TOKEN_RETIRED")
    assert clock.now() < VirtualClock().now() + 30_000


async def test_a_long_poll_with_the_next_token_ends_when_the_rotation_is_abandoned(
    make_site: MakeSite, as_token: Ask
) -> None:
    site = await make_site(secrets=Secrets(OLD))
    await as_token(site, OLD, "POST", "/api/tokens/rotation", {"seconds": 60, "token": NEW})
    poll = await waiting_poll(site, as_token, NEW)
    await as_token(site, OLD, "DELETE", "/api/tokens/rotation")
    await as_token(site, OLD, "POST", "/api/jobs", {"kind": "k"}, plane="data")
    status, body = await poll
    assert (status, body["code"]) == (403, "invalid_token")


async def test_values_that_are_shown_once_are_not_to_be_kept_by_caches(site: Site) -> None:
    for path, body in (("/api/tokens/rotation", {"seconds": 60}), ("/api/access", {"role": "viewer"})):
        status, _, headers = await site.ask("control", "POST", path, json=body)
        assert (status, headers["Cache-Control"]) == (201, "no-store")


async def test_a_scoped_token_cannot_become_the_shared_one(site: Site) -> None:
    _, made = await site.control("POST", "/api/access", {"role": "viewer"})
    body = {"seconds": 60, "token": made["token"]}
    assert (await site.control("POST", "/api/tokens/rotation", body))[0] == 422


async def test_a_hub_without_tokens_in_use_still_answers(make_site: MakeSite) -> None:
    site = await make_site(auth=AuthSettings(token_required=False))
    assert (await site.control("GET", "/api/tokens"))[0] == 200


# Metrics


async def test_the_metrics_count_tokens_by_slot_and_failures_by_reason(
    make_site: MakeSite, clock: VirtualClock, as_token: Ask
) -> None:
    site = await rotating(make_site, clock)
    for token in (OLD, NEW, NEW, "wrong"):
        await as_token(site, token, "GET", "/api/hosts")
    await clock.advance(MINUTE)
    await as_token(site, OLD, "GET", "/api/hosts")
    _, text = await site.control("GET", "/metrics")
    for line in (
        'sheratan_auth_accepted_total{slot="active"} 1.0',
        'sheratan_auth_accepted_total{slot="next"} 2.0',
        'sheratan_auth_failures_total{reason="old_token"} 1.0',
        'sheratan_auth_failures_total{reason="invalid_token"} 1.0',
    ):
        assert line in text.splitlines()


async def test_the_fleets_metrics_keys_tell_of_the_last_minute(
    make_site: MakeSite, clock: VirtualClock, as_token: Ask
) -> None:
    site = await rotating(make_site, clock, ms=1000)
    for token in (OLD, NEW, NEW, "wrong"):
        await as_token(site, token, "GET", "/api/hosts")
    await clock.advance(1000)
    await as_token(site, OLD, "GET", "/api/hosts")
    _, told = await site.control("GET", "/metrics?format=json")
    assert (told["auth_success_active_1m"], told["auth_success_next_1m"]) == (1, 2)
    assert told["auth_failure"] == {"old_token_1m": 1, "invalid_1m": 1}
    assert told["auth_fail_rate_1m"] == 2


# What is kept


@pytest.mark.parametrize("scheme", ["sqlite", "file"])
async def test_no_value_of_a_token_is_in_the_store_or_in_the_hub(
    make_site: MakeSite, clock: VirtualClock, as_token: Ask, scheme: str, tmp_path: Any
) -> None:
    site = await rotating(make_site, clock, scheme, ms=-1)
    _, begun = await as_token(site, NEW, "POST", "/api/tokens/rotation", {"seconds": 60})
    _, made = await as_token(site, NEW, "POST", "/api/access", {"role": "node", "node_id": "n1"})
    await as_token(site, made["token"], *beat("n1"))
    values = [OLD, NEW, begun["token"], made["token"]]
    assert site.app._secrets is None
    keyring = site.app.keyring
    known = repr((keyring._holders, keyring._ring, keyring._retired, keyring._access, keyring._salt))
    await stop(site)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert [value for value in values if value.encode() in content] == [], path
    assert [value for value in values if value in known] == []


async def test_equal_tokens_have_other_digests_in_other_stores(make_site: MakeSite) -> None:
    first = (await make_site(secrets=Secrets(OLD))).app.keyring.digest(OLD)
    assert first != (await make_site(secrets=Secrets(OLD))).app.keyring.digest(OLD)
