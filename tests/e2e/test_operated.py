"""A hub is killed, filled, corrupted and starved: alerts fire, diagnose names the cause, the runbook knows both.

The cause comes first, asked of the hub that runs and, behind `hub-down`, of the files that a kill leaves. The shipped
rules are held against what the hub really told. A minute of calm passes in an instant: the same scrape counts again, as
long as nothing happens.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from sheratan_hub.clock import VirtualClock
from sheratan_hub.config import HubSettings
from sheratan_hub.rules.verdict import CODES
from tests.conftest import MakeSite
from tests.e2e.serving import Served
from tests.e2e.troubles import CALM, TROUBLES, Trouble, Watched, well
from tests.prometheus import Scrape, alerts, fires, scrape
from tests.world.test_runbook import ENTRIES

PROCESS = {"SheratanHubDown", "SheratanHubRestarting", "SheratanEventLoopStuck"}
"""Those that are proved with a hub in a process of its own."""

NOT_HERE = {"SheratanNotScraped", "SheratanCommandsWaiting", "SheratanAuditLinesLost"}
"""A target that Prometheus lacks, and two that take tens of thousands of requests: the cases of the rules must do."""


def knows(names: set[str]) -> None:
    """The runbook has an entry for each of these alerts, which names it and says what to do."""
    linked = {alert.name: alert.annotations["runbook_url"].partition("#")[2] for alert in alerts()}
    for name in names:
        text = ENTRIES[linked[name]]
        assert f"`{name}`" in text
        assert "**Do.**" in text


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda one: one.happens.__name__)
async def test_the_right_alerts_fire_and_none_before(
    trouble: Trouble,
    make_site: MakeSite,
    clock: VirtualClock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    hub_settings = HubSettings(data_dir=str(tmp_path), restart_grace_seconds=0)
    site = await make_site(trouble.store, clock, hub=hub_settings, **trouble.settings)
    hub = Watched(site, clock, monkeypatch)
    await well(hub)
    await trouble.happens(hub)
    if trouble.findings:
        if not hub.findings:
            await hub.diagnose()
        assert hub.findings == list(trouble.findings)
        assert hub.left == ["hub-down", *(trouble.findings if trouble.left else ())]
    monkeypatch.undo()
    fires(tmp_path, hub.minutes, nothing_at=CALM - 1, at_end=trouble.alerts)
    knows(set(trouble.alerts))


def test_every_alert_is_proved() -> None:
    proved = {name for trouble in TROUBLES for name in trouble.alerts}
    assert {alert.name for alert in alerts()} == proved | PROCESS | NOT_HERE
    assert not proved & NOT_HERE


def test_every_finding_is_proved() -> None:
    """Those of a hub that is down, or whose store is damaged, with a hub in a process of its own."""
    assert {code for trouble in TROUBLES for code in trouble.findings} | {"hub-down", "store-damaged"} == set(CODES)


def look(served: Served) -> Scrape:
    """A scrape of both planes of a hub that may be dead."""
    texts: dict[str, str | None] = {}
    for plane, port in (("control", served.control_port), ("data", served.data_port)):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                texts[plane] = answer.read().decode()
        except (OSError, urllib.error.URLError):
            texts[plane] = None
    return scrape(texts)


def diagnosed(served: Served) -> list[str]:
    """What `diagnose` finds wrong beside a hub that does not answer, the worst first."""
    ran = subprocess.run(
        [sys.executable, "-m", "sheratan_hub", "diagnose", "--explain", "--json"],
        cwd=served.directory,
        env=served.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    return [one["code"] for one in json.loads(ran.stdout)["findings"]]


def test_a_hub_that_is_starved_killed_and_whose_store_is_corrupted(tmp_path: Path) -> None:
    served = Served(tmp_path)
    try:
        served.start()
        assert served.process is not None
        calm = [look(served)] * CALM
        starved = []
        for _ in range(7):
            served.process.send_signal(signal.SIGSTOP)
            with pytest.raises(TimeoutError):
                urllib.request.urlopen(f"http://127.0.0.1:{served.data_port}/livez", timeout=0.85)
            served.process.send_signal(signal.SIGCONT)
            starved.append(look(served))
        fires(tmp_path, calm + starved, nothing_at=CALM - 1, at_end=["SheratanEventLoopStuck"])

        served.kill()
        dead = [look(served)] * 3
        fires(tmp_path, calm + dead, nothing_at=CALM - 1, at_end=["SheratanHubDown"])
        assert diagnosed(served) == ["hub-down"]

        restarts = []
        for _ in range(3):
            served.start()
            restarts.append(look(served))
            served.kill()
        fires(tmp_path, calm + restarts, nothing_at=CALM - 1, at_end=["SheratanHubRestarting"])

        path = tmp_path / "var/hub.db"
        path.write_bytes(b"not what it was" + path.read_bytes()[15:])
        status, said = served.fails()
        assert (status, "is not a SQLite database" in said) == (78, True)
        damaged = [look(served)] * 3
        fires(tmp_path, calm + damaged, nothing_at=CALM - 1, at_end=["SheratanHubDown"])
        assert "is not a SQLite database" in ENTRIES["store-damaged"]
        assert diagnosed(served)[:2] == ["hub-down", "store-damaged"]
        knows(PROCESS)
    finally:
        served.kill()
