"""What the service manager is told, over a socket of the test's own; and what the watchdog lives by."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.hub import Hub
from sheratan_hub.notify import Notifier
from sheratan_hub.pulse import Pulse
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.rules.probe import Probe

MakeHub = Callable[..., Awaitable[Hub]]


class Manager:
    """A service manager's ear."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1))
        self.socket.setblocking(False)
        self.environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}

    def heard(self) -> list[str]:
        found: list[str] = []
        try:
            while True:
                found.append(self.socket.recv(4096).decode())
        except BlockingIOError:
            return found


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    one = Manager(str(tmp_path / "notify"))
    yield one
    one.socket.close()


def test_each_state_is_one_datagram_of_lines(manager: Manager) -> None:
    notifier = Notifier(manager.environ)
    notifier.status("opening\nthe store")
    notifier.ready("it serves")
    notifier.alive()
    notifier.stopping("it ends")
    assert manager.heard() == [
        "STATUS=opening the store",
        "READY=1\nSTATUS=it serves",
        "WATCHDOG=1",
        "STOPPING=1\nSTATUS=it ends",
    ]
    notifier.reloading()
    (text,) = manager.heard()
    lines = dict(line.split("=", 1) for line in text.splitlines())
    assert lines.keys() == {"RELOADING", "MONOTONIC_USEC", "STATUS"}
    assert int(lines["MONOTONIC_USEC"]) > 0


def test_an_abstract_socket_is_reached() -> None:
    one = Manager(f"@sheratan-hub-test-{os.getpid()}")
    Notifier(one.environ).alive()
    assert one.heard() == ["WATCHDOG=1"]
    one.socket.close()


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}, {"NOTIFY_SOCKET": "@"}])
def test_without_a_service_manager_nothing_is_sent(environ: dict[str, str]) -> None:
    notifier = Notifier({**environ, "WATCHDOG_USEC": "1000000"})
    notifier.ready("nobody hears")
    assert not notifier.listening
    assert notifier.beat_ms == 0


def test_a_service_manager_that_is_gone_is_noted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    notifier.ready("x")
    notifier.alive()
    assert [record.message for record in caplog.records] == [
        "the service manager cannot be told anything: No such file or directory"
    ]


@pytest.mark.parametrize(
    ("environ", "beat_ms"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 10_000),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 10_000),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, 0),
        ({"WATCHDOG_USEC": "0"}, 0),
        ({"WATCHDOG_USEC": "-5"}, 0),
        ({"WATCHDOG_USEC": "soon"}, 0),
        ({}, 0),
    ],
)
def test_the_watchdog_is_told_three_times_in_its_time_if_it_waits_for_this_process(
    environ: dict[str, str], beat_ms: int
) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/run/notify", **environ}).beat_ms == beat_ms


# The pulse


async def test_the_pulse_beats_while_an_idle_hub_answers(
    make_hub: MakeHub, manager: Manager, clock: VirtualClock
) -> None:
    pulse = Pulse(await make_hub(), Notifier(manager.environ))
    for _ in range(4):
        await pulse.step()
        await clock.advance(1000)
    assert manager.heard() == ["WATCHDOG=1"] * 4


async def test_the_pulse_stops_while_the_committer_is_stuck_and_says_so(
    make_hub: MakeHub, manager: Manager, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = await make_hub()
    pulse = Pulse(hub, Notifier(manager.environ))
    go_on = asyncio.Event()
    now = hub.store.now

    async def stuck() -> int:
        await go_on.wait()
        return await now()

    monkeypatch.setattr(hub.store, "now", stuck)
    await pulse.step()
    await clock.advance(1000)
    for _ in range(3):
        await pulse.step()
        await clock.advance(1000)
    assert manager.heard() == [
        "WATCHDOG=1",
        "STATUS=nothing has been committed for 1.0 s",
        "STATUS=nothing has been committed for 2.0 s",
        "STATUS=nothing has been committed for 3.0 s",
    ]
    go_on.set()
    await settle()
    await pulse.step()
    await settle()
    await pulse.step()
    assert manager.heard() == ["STATUS=the committer works again", "WATCHDOG=1", "WATCHDOG=1"]


async def test_the_pulse_beats_behind_a_long_queue_as_long_as_batches_end(
    make_hub: MakeHub, manager: Manager, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = await make_hub(max_batch=1)
    pulse = Pulse(hub, Notifier(manager.environ))
    one_more = asyncio.Semaphore(0)
    now = hub.store.now

    async def slow() -> int:
        await one_more.acquire()
        return await now()

    monkeypatch.setattr(hub.store, "now", slow)
    others = [asyncio.create_task(hub.execute(Probe())) for _ in range(5)]
    await settle()
    await pulse.step()
    for _ in range(3):
        one_more.release()
        await settle()
        await pulse.step()
    assert manager.heard() == ["WATCHDOG=1"] * 4
    await pulse.step()
    assert manager.heard() == ["STATUS=nothing has been committed for 1.0 s"]
    for _ in range(9):
        one_more.release()
    await asyncio.gather(*others)


async def test_a_hub_that_refuses_is_alive(make_hub: MakeHub, manager: Manager, clock: VirtualClock) -> None:
    hub = await make_hub()
    hub.committer.gate = lambda: Refused(Code.AUDIT_UNAVAILABLE, "the disk is full")
    pulse = Pulse(hub, Notifier(manager.environ))
    for _ in range(3):
        await pulse.step()
        await clock.advance(1000)
    assert manager.heard() == ["WATCHDOG=1"] * 3
