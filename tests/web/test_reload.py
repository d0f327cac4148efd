"""SIGHUP without the signal: what a running hub takes over from changed settings, what it leaves, what it refuses."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import hdrs

from sheratan_hub import config
from sheratan_hub.clock import VirtualClock
from sheratan_hub.config import BadConfig, Secrets, Settings
from sheratan_hub.log import setup
from sheratan_hub.reload import Outcome, Reload, is_reloaded, with_keys
from sheratan_hub.web.openapi import openapi
from sheratan_hub.web.routes import ROUTES
from tests.conftest import TOKEN, MakeSite, Site
from tests.web.test_tls import Files, files
from tools import canaries

__all__ = ["files"]

POLICY = {"title": "none", "rules": [{"effect": "deny", "actions": ["submit"]}]}


SECRETS = Secrets(token=TOKEN, hmac_key=canaries.HMAC)


class Changing:
    """Settings that a test changes under a running hub."""

    def __init__(self, site: Site, secrets: Secrets | None = None) -> None:
        self.site, self.settings, self.secrets = (
            site,
            site.app.settings,
            secrets or Secrets(token=TOKEN, hmac_key=canaries.HMAC),
        )
        self.reload = Reload(site.app, lambda: (self.settings, self.secrets))

    async def to(self, **tables: dict[str, Any]) -> Outcome:
        """Change some keys of some tables, and reload."""
        for table, values in tables.items():
            changed: Any = msgspec.structs.replace(getattr(self.settings, table), **values)
            self.settings = msgspec.structs.replace(self.settings, **{table: changed})
        return await self.reload.run()


@pytest.fixture
async def site(make_site: MakeSite) -> Site:
    return await make_site()


async def test_limits_count_for_what_is_decided_next(site: Site) -> None:
    await site.submit()
    outcome = await Changing(site).to(queue={"max_depth": 1, "backpressure_mode": 503})
    assert outcome == Outcome({"queue.max_depth": "1000 -> 1", "queue.backpressure_mode": "429 -> 503"})
    status, body = await site.data("POST", "/api/jobs", {"kind": "k"})
    assert (status, body["code"]) == (503, "queue_full")


async def test_a_waiting_pull_looks_again_when_there_may_be_more_leases(make_site: MakeSite) -> None:
    site = await make_site(queue=config.QueueSettings(max_inflight=1))
    await site.submit()
    await site.submit()
    await site.lease()
    pull = asyncio.create_task(site.data("POST", "/api/jobs/pull", {"node_id": "n2", "wait_seconds": 20}))
    while not site.app.hub.waiting.pulls:
        await asyncio.sleep(0)
    await Changing(site).to(queue={"max_inflight": 2})
    async with asyncio.timeout(10):
        assert len((await pull)[1]["jobs"]) == 1


async def test_what_a_request_may_ask_changes_with_the_next_request(site: Site) -> None:
    change = Changing(site)
    body = {"kind": "k", "params": {"text": "x" * 500}}
    assert (await site.data("POST", "/api/jobs", body))[0] == 201
    await change.to(limits={"body_bytes": 100})
    assert (await site.data("POST", "/api/jobs", body))[0] == 413
    await change.to(metrics={"require_token": True})
    assert (await site.ask("control", "GET", "/metrics", headers={"Authorization": ""}))[0] == 403
    await change.to(control={"hosts": ("hub.example",)})
    headers = {"Host": "hub.example"}
    assert (await site.ask("control", "GET", "/livez", headers=headers))[0] == 200
    assert (await site.ask("data", "GET", "/livez", headers=headers))[0] == 403


async def test_the_documents_tell_what_is_in_force_now(site: Site) -> None:
    before = [(await site.ask("data", "GET", path))[2][hdrs.ETAG] for path in ("/openapi.json", "/docs")]
    change = Changing(site)
    await change.to(queue={"backpressure_mode": 503}, metrics={"require_token": True}, limits={"batch_jobs": 7})
    told, page = [await site.ask("data", "GET", path) for path in ("/openapi.json", "/docs")]
    assert told[1] == json.loads(json.dumps(openapi("data", ROUTES, change.settings)))
    assert {} not in told[1]["paths"]["/metrics"]["get"]["security"]
    assert told[1]["components"]["schemas"]["BatchForm"]["properties"]["jobs"]["maxItems"] == 7
    assert not {one[2][hdrs.ETAG] for one in (told, page)} & set(before)


async def test_shorter_ages_and_bounds_of_dead_letters_count_at_once(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    for _ in range(2):
        job_id = await site.submit(max_retries=0)
        await site.finish(await site.lease(), ok=False)
    change = Changing(site)

    async def seen(true: Callable[[], bool]) -> bool:
        """Whether it is so within three seconds of the clock, far less than the hub rests."""
        for _ in range(3):
            await clock.advance(1000)
        return true()

    keeping = site.app.hub.keeping
    await change.to(dlq={"max_items": 2})
    assert await seen(lambda: not keeping.over)
    await site.submit(max_retries=0)
    await site.finish(await site.lease(), ok=False)
    assert await seen(lambda: keeping.over)
    await change.to(dlq={"max_items": 3})
    assert await seen(lambda: not keeping.over)
    await change.to(dlq={"max_items": 1})
    assert await seen(lambda: keeping.over)
    await change.to(dlq={"enabled": False})
    assert await seen(lambda: not keeping.over)
    await change.to(retention={"completed_seconds": 1})
    await seen(lambda: True)
    assert (await site.data("GET", f"/api/jobs/{job_id}"))[0] == 404


async def test_the_bounds_of_connections_change(site: Site) -> None:
    await Changing(site).to(limits={"idle_seconds": 3, "connections_per_address": 7})
    for listener in site.app.listeners.values():
        assert (listener.connections.bounds.idle_ms, listener.connections.bounds.per_address) == (3000, 7)


async def test_how_results_are_checked_changes(site: Site) -> None:
    await site.submit()
    lease = await site.lease()
    await Changing(site).to(integrity={"required": True})
    assert (await site.finish(lease))[0] == 422


async def test_rate_limits_of_the_settings_change_and_throttled_sources_are_let_go(site: Site) -> None:
    change = Changing(site)
    change.settings = msgspec.structs.replace(
        change.settings, rate_limits={"s": config.RateLimitSettings(0, 1), "t": config.RateLimitSettings(1, 0)}
    )
    assert (await change.to()).changed == {"rate_limits": "s, t"}
    for _ in range(3):
        await site.submit(source="s")
    await site.lease()
    assert (await site.data("POST", "/api/jobs/pull", {"node_id": "n2"}))[1]["jobs"] == []
    change.settings = msgspec.structs.replace(change.settings, rate_limits={})
    assert (await change.to()).changed == {"rate_limits": "s, t"}
    assert len((await site.data("POST", "/api/jobs/pull", {"node_id": "n2"}))[1]["jobs"]) == 1


async def test_what_waits_for_a_restart_is_named_and_stays(site: Site) -> None:
    change = Changing(site)
    old = site.app.settings
    outcome = await change.to(data={"port": 1}, hub={"data_dir": "other"}, queue={"age_seconds": 5, "lease_seconds": 7})
    assert outcome.changed.keys() == {"queue.lease_seconds"}
    assert outcome.waiting == ("data.port", "hub.data_dir", "queue.age_seconds")
    assert outcome.text == (
        "settings reloaded: queue.lease_seconds; only a restart changes data.port, hub.data_dir, queue.age_seconds"
    )
    assert site.app.settings == with_keys(old, change.settings, ["queue.lease_seconds"])
    await site.submit()
    assert (await site.lease())["lease_seconds"] == 7
    assert (await change.to()).waiting == outcome.waiting


async def test_a_reload_that_changes_nothing_says_so(site: Site) -> None:
    assert (await Changing(site).to()).text == "settings reloaded: nothing changed"


async def test_bad_settings_are_refused_in_one_line_and_change_nothing(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> tuple[Settings, Secrets]:
        raise BadConfig("queue.max_depht in hub.toml is not a setting; did you mean queue.max_depth?")

    monkeypatch.setattr(logging.getLogger("sheratan"), "propagate", True)
    before = site.app.settings
    outcome = await Reload(site.app, load).run()
    assert site.app.settings is before
    lines = [record for record in caplog.records if record.name == "sheratan.reload"]
    assert [line.message for line in lines] == [outcome.text]
    assert outcome.text.startswith("the settings were not taken over, the old ones stay: queue.max_depht in hub.toml")


async def test_what_would_be_wrong_together_with_what_stays_is_refused(site: Site) -> None:
    change = Changing(site, Secrets())  # the default token, which is allowed on loopback only
    site.app.settings = msgspec.structs.replace(
        site.app.settings, control=msgspec.structs.replace(site.app.settings.control, host="0.0.0.0")
    )
    outcome = await change.to(queue={"max_depth": 1})
    assert "The default token is for 127.0.0.1 only" in outcome.refused
    assert site.app.settings.queue.max_depth == 1000


async def test_each_reload_is_audited_without_a_secret(site: Site) -> None:
    change = Changing(site)
    await change.to(queue={"max_depth": 1}, data={"port": 1})
    change.reload = Reload(site.app, lambda: (change.settings, Secrets(token="x\n")))
    await change.to()
    told = [line for line in site.audit() if line["event"] == "ADMIN_ACTION"]
    assert [line["plane"] for line in told] == ["hub", "hub"]
    assert told[0]["detail"] == {"route": "SIGHUP", "changed": ["queue.max_depth"], "waiting": ["data.port"]}
    assert told[1]["detail"]["refused"].startswith("The token must be printable ASCII")


# Tokens


async def test_a_new_token_counts_at_once(site: Site) -> None:
    change = Changing(site, msgspec.structs.replace(SECRETS, token="another-token"))
    outcome = await change.to()
    ring = site.app.keyring.ring
    assert ring is not None
    assert outcome.changed == {"the token": ring.active.id}
    assert "another-token" not in json.dumps(site.audit())
    assert (await site.control("GET", "/api/registry"))[0] == 403
    headers = {"Authorization": "Bearer another-token"}
    assert (await site.control("GET", "/api/registry", headers=headers))[0] == 200


async def test_a_next_token_begins_a_rotation(site: Site) -> None:
    change = Changing(site, Secrets(token=TOKEN, token_next="next-token"))
    await change.to(auth={"rotation_until": "2099-01-01T00:00:00Z"})
    for token in (TOKEN, "next-token"):
        headers = {"Authorization": f"Bearer {token}"}
        assert (await site.control("GET", "/api/registry", headers=headers))[0] == 200
    assert (await site.control("GET", "/api/tokens"))[1]["next"] is not None


async def test_settings_that_name_a_retired_token_alone_are_refused_whole(site: Site) -> None:
    change = Changing(site, Secrets(token="second", token_next=""))
    change.secrets = Secrets(token=TOKEN, token_next="second")
    await change.to()
    change.secrets = Secrets(token="second")
    await change.to()
    change.secrets = Secrets(token=TOKEN)
    outcome = await change.to(queue={"max_depth": 1})
    assert "retired" in outcome.refused
    assert site.app.settings.queue.max_depth == 1000
    assert (await site.control("GET", "/api/registry", headers={"Authorization": "Bearer second"}))[0] == 200


# Policies, logs, audit, alerts


async def test_new_policies_are_kept_and_an_edited_one_refuses_the_reload(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "policies"
    folder.mkdir()
    (folder / "one.json").write_text(json.dumps(POLICY))
    change = Changing(site)
    outcome = await change.to(policies={"dir": str(folder)})
    assert outcome.changed["policy version 1"] == "loaded from one.json"
    (folder / "one.json").write_text(json.dumps({**POLICY, "title": "edited"}))
    (folder / "two.json").write_text(json.dumps(POLICY))
    assert "was edited since" in (await change.to(queue={"max_depth": 1})).refused
    assert site.app.settings.queue.max_depth == 1000
    assert len((await site.control("GET", "/api/policies"))[1]["policies"]) == 1
    assert (await site.data("POST", "/api/jobs", {"kind": "k"}))[0] == 201


async def test_a_policy_whose_file_has_no_name_in_utf_8_refuses_the_reload(site: Site, tmp_path: Path) -> None:
    (tmp_path / "\udcff.json").write_text(json.dumps(POLICY))
    assert "must have a name in UTF-8" in (await Changing(site).to(policies={"dir": str(tmp_path)})).refused


async def test_the_logs_are_opened_anew_with_their_new_level(site: Site, tmp_path: Path) -> None:
    change = Changing(site)
    end = setup(change.settings, tmp_path)
    file, moved = (tmp_path / "logs" / name for name in ("hub_data.jsonl", "moved"))
    try:
        change.reload = Reload(site.app, lambda: (change.settings, change.secrets), with_logs=True)
        logging.getLogger("sheratan.data").debug("not yet")
        file.rename(moved)
        await change.to(log={"level": "debug"})
        logging.getLogger("sheratan.data").debug("now")
    finally:
        end()
    assert "not yet" not in moved.read_text()
    assert json.loads(file.read_text().splitlines()[-1])["event"] == "now"


async def test_a_refused_reload_leaves_the_logs_as_they_were(site: Site, tmp_path: Path) -> None:
    end = setup(site.app.settings, tmp_path)
    try:
        change = Changing(site, Secrets(token=TOKEN))
        change.reload = Reload(site.app, lambda: (change.settings, change.secrets), with_logs=True)
        site.app.hub.committer.gate = site.app.audit.refusal
        shutil.rmtree(tmp_path / "logs")
        (tmp_path / "logs").write_text("no folder")
        assert (await change.to(log={"level": "debug"})).refused.startswith("hub.data_dir: logs cannot be written")
        assert site.app.settings.log.level == "info"
        assert logging.getLogger("sheratan").level == logging.INFO
    finally:
        end()


async def test_the_audit_log_goes_by_its_new_settings(site: Site) -> None:
    change = Changing(site)
    await change.to(audit={"max_bytes": 500, "keep_files": 1})
    for _ in range(4):
        await change.to(queue={"max_depth": change.settings.queue.max_depth + 1})
    site.app.audit.file.tidy()
    assert len(list(site.app.audit.path.parent.glob("hub_security_audit*"))) == 2


async def test_the_hubs_own_watcher_goes_by_new_rules_and_keeps_what_it_counted(make_site: MakeSite) -> None:
    site = await make_site(alerts=config.AlertSettings(in_process=True))
    watch = site.app.watch
    assert watch is not None
    rule = config.AlertRule("ADMIN_ACTION", more_than=0, name="touched")
    outcome = await Changing(site).to(alerts={"rules": (rule,), "max_bytes": 1000})
    assert outcome.changed.keys() == {"alerts.rules", "alerts.max_bytes"}
    alerts: list[Any] = []
    async with asyncio.timeout(10):
        while not alerts:
            alerts = (await site.control("GET", "/api/alerts"))[1]["alerts"]
    assert alerts[0]["rule"] == "touched"


async def test_a_webhook_that_cannot_be_used_refuses_the_reload(make_site: MakeSite, tmp_path: Path) -> None:
    site = await make_site(alerts=config.AlertSettings(in_process=True))
    outcome = await Changing(site).to(alerts={"webhook_file": str(tmp_path / "none")}, queue={"max_depth": 1})
    assert outcome.refused.startswith("alerts.webhook_file")
    assert site.app.settings.queue.max_depth == 1000


# TLS


async def shown(site: Site, client: ssl.SSLContext) -> str:
    """The name in the certificate that a new connection is shown."""
    _reader, writer = await asyncio.open_connection("127.0.0.1", site.app.ports["data"], ssl=client)
    subject = writer.get_extra_info("peercert")["subject"]
    writer.close()
    return str(subject[0][0][1])


async def test_new_connections_are_shown_the_renewed_certificate_and_open_ones_stay(
    make_site: MakeSite, files: Files, tmp_path: Path
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    shutil.copy(files.hub_pem, cert)
    shutil.copy(files.key_pem, key)
    site = await make_site(tls=config.TlsSettings(cert=str(cert), key=str(key)))
    client = ssl.create_default_context(cafile=files.ca_pem)
    change = Changing(site)
    assert await shown(site, client) == "hub"
    reader, writer = await asyncio.open_connection("127.0.0.1", site.app.ports["data"], ssl=client)
    shutil.copy(files.node_pem, cert)
    assert (await change.to()).changed == {"the certificate": "read again"}
    assert await shown(site, client) == "node"
    writer.write(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    async with asyncio.timeout(10):
        assert b"200" in await reader.readline()
    writer.close()
    cert.write_text("no certificate")
    assert "tls.cert and tls.key" in (await change.to()).refused
    assert await shown(site, client) == "node"


async def test_clients_still_have_to_show_a_certificate_after_a_reload(
    make_site: MakeSite, files: Files, tmp_path: Path
) -> None:
    ca = tmp_path / "ca.pem"
    shutil.copy(files.ca_pem, ca)
    tls = config.TlsSettings(cert=files.hub_pem, key=files.key_pem, client_ca=str(ca))
    site = await make_site(tls=tls)
    change = Changing(site)
    plain, known, stranger = (ssl.create_default_context(cafile=files.ca_pem) for _ in range(3))
    known.load_cert_chain(files.node_pem, files.key_pem)
    stranger.load_cert_chain(files.stranger_pem, files.key_pem)
    ca.write_bytes(ca.read_bytes() + b"\n")
    assert (await change.to()).changed == {"the certificate": "read again"}
    assert await answers(site, known)
    assert not await answers(site, plain)
    assert not await answers(site, stranger)
    assert (await change.to(tls={"client_ca": ""})).waiting == ("tls.client_ca",)
    assert not await answers(site, plain)


async def test_a_session_from_before_does_not_replace_a_certificate(
    make_site: MakeSite, files: Files, tmp_path: Path
) -> None:
    """A client whose authority is no longer one gets in by no ticket of an earlier connection."""
    ca = tmp_path / "ca.pem"
    shutil.copy(files.ca_pem, ca)
    site = await make_site(tls=config.TlsSettings(cert=files.hub_pem, key=files.key_pem, client_ca=str(ca)))
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        shutil.copy(files.ca_pem, ca)
        change = Changing(site)
        await change.to()
        known = ssl.create_default_context(cafile=files.ca_pem)
        known.load_cert_chain(files.node_pem, files.key_pem)
        known.maximum_version = version
        first, session = await asyncio.to_thread(by_session, site, known, None)
        assert first
        shutil.copy(files.stranger_pem, ca)
        assert (await change.to()).changed == {"the certificate": "read again"}
        assert not await answers(site, known)
        assert not (await asyncio.to_thread(by_session, site, known, session))[0], version


def by_session(
    site: Site, client: ssl.SSLContext, session: ssl.SSLSession | None
) -> tuple[bool, ssl.SSLSession | None]:
    """(whether a client with this session is let in, the session that it has then)"""
    try:
        with (
            socket.create_connection(("127.0.0.1", site.app.ports["data"]), timeout=10) as plain,
            client.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as wrapped,
        ):
            wrapped.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            return b"200" in wrapped.recv(4096), wrapped.session
    except OSError:
        return False, None


async def answers(site: Site, client: ssl.SSLContext) -> bool:
    """Whether a client is let in."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.app.ports["data"], ssl=client)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        async with asyncio.timeout(10):
            line = await reader.readline()
        writer.close()
    except OSError:
        return False
    return b"200" in line


async def test_tls_is_not_switched_on_by_a_reload(site: Site, files: Files) -> None:
    outcome = await Changing(site).to(tls={"cert": files.hub_pem, "key": files.key_pem})
    assert outcome.waiting == ("tls.cert", "tls.key")
    assert (await site.data("GET", "/livez"))[0] == 200


def test_a_setting_that_nobody_has_thought_of_waits_for_a_restart() -> None:
    assert not is_reloaded("metrics.more")
    assert not is_reloaded("later.anything")
    assert is_reloaded("rate_limits")
