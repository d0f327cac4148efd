"""What governing costs: `python -m tools.governance_bench [--store file] [--nodes 10000] [--seconds 20]`.

First the check of a token, the decision of a policy and the audit log's part, in CPU time, as a share of the CPU time
that a hub spends on one durable submit (64 connections). Then a fleet that sends heartbeats, each node every ten
seconds: the CPU time of the hub, a scrape, and whether anybody is wrongly STALE. CPU time, as other work on the machine
hardly moves it; the two cores are shared by hub and load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sheratan_hub.audit import Audit
from sheratan_hub.audit_lines import FILE_NAME
from sheratan_hub.clock import SystemClock
from sheratan_hub.hub import Hub
from sheratan_hub.items import Committed, Happened, Origin
from sheratan_hub.keyring import Keyring
from sheratan_hub.rules.command import Event
from sheratan_hub.rules.policies import submit_ask
from sheratan_hub.rules.policy import Judge, Policy, Rule
from sheratan_hub.storage import Changes, open_store
from sheratan_hub.web.auth import Tokens
from tools.ports import free_ports

CONNECTIONS = 64
BATCH = 64
RULES = 20
EVERY_SECONDS = 10
ROUNDS, TIMES = 5, 20_000
TICKS = os.sysconf("SC_CLK_TCK")


def microseconds(work: Callable[[], Any]) -> float:
    """CPU time of one call, the least of a few rounds."""
    rounds = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(TIMES):
            work()
        rounds.append((time.process_time() - began) / TIMES * 1e6)
    return min(rounds)


async def parts(folder: Path, token: str) -> dict[str, float]:
    """CPU microseconds a submit of each part."""
    clock = SystemClock()
    store = open_store("memory://", clock)
    await store.open()
    hub = Hub(store, clock)
    await hub.start()
    committing = asyncio.create_task(hub.committer.run())
    keyring = Keyring(clock)
    await keyring.open(hub, token)
    hub.committer.close()
    await committing
    tokens, headers = Tokens(keyring, clock), {"Authorization": f"Bearer {token}"}
    judge = Judge(policy(), 1)
    ask = submit_ask("work", "", ())
    audit = Audit(folder / FILE_NAME, clock)
    events = [Event(1, "job.submitted", "client", f"j{n}", meta={"kind": "work"}) for n in range(BATCH)]
    origin = Origin("data", "127.0.0.1", "/api/jobs", None, "/api/jobs")
    batch = Committed([Happened([event], origin) for event in events], Changes(), BATCH)

    def tell() -> None:
        audit.refusal()
        audit.committed(batch)

    try:
        return {
            "token check": microseconds(lambda: tokens.check(headers, "submit")),
            f"policy decision, {RULES} rules": microseconds(lambda: judge.decide(ask)),
            f"audit log, a batch of {BATCH}": microseconds(tell) / BATCH,
        }
    finally:
        audit.close()


def policy() -> Policy:
    """So many rules that do not match a submit of `work`, and one that does."""
    rules = tuple(Rule("deny", actions=("submit",), kinds=(f"other.{n}.*",)) for n in range(RULES - 1))
    return Policy(rules=(*rules, Rule("allow", kinds=("work",))), title="bench")


class Served:
    """A hub in a process of its own."""

    def __init__(self, folder: Path, scheme: str, token: str) -> None:
        self.control, self.data = free_ports(2)
        self.token = token
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("SHERATAN_", "HUB_"))}
        environ |= {
            "SHERATAN_HUB_TOKEN": token,
            "SHERATAN_CONTROL_PORT": str(self.control),
            "SHERATAN_DATA_PORT": str(self.data),
            "SHERATAN_DATA_DIR": str(folder),
            "SHERATAN_STORE_URL": f"{scheme}://{folder / 'store'}",
            "SHERATAN_MAX_QUEUE_DEPTH": "100000000",
        }
        command = [sys.executable, "-m", "sheratan_hub", "serve"]
        self.process = subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("store"):
                return
        raise SystemExit("the hub did not start")

    def cpu_seconds(self) -> float:
        """What the process has used, in all its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def ask(self, path: str, body: Any = None, **headers: str) -> Any:
        """The JSON answer of the control plane."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.control}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Bearer {self.token}", **headers},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@contextmanager
def served(scheme: str) -> Iterator[Served]:
    """A hub, ended at the end."""
    with tempfile.TemporaryDirectory(prefix="sheratan-governance-") as folder:
        hub = Served(Path(folder), scheme, secrets.token_hex(16))
        try:
            yield hub
        finally:
            hub.process.terminate()
            hub.process.communicate(timeout=60)


def request(token: str, path: str, body: dict[str, Any]) -> bytes:
    """A whole request."""
    text = json.dumps(body, separators=(",", ":")).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(text)}"
    return head.encode() + b"\r\n\r\n" + text


class Wire:
    """One connection, one request after the other."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def open(self) -> Wire:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def ask(self, data: bytes) -> bytes:
        """The answer's head; raises RuntimeError unless it is a 2xx."""
        self.writer.write(data)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r")[0])
        body = await self.reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 2"):
            raise RuntimeError((head + body).decode())
        return body


async def submits(hub: Served, seconds: float) -> tuple[int, float]:
    """(submits, the hub's CPU seconds for them)"""
    data = request(hub.token, "/api/jobs", {"kind": "work", "params": {"text": "x" * 180}})
    wires = [await Wire(hub.data).open() for _ in range(CONNECTIONS)]
    count = 0

    async def go(wire: Wire, until: float) -> None:
        nonlocal count
        while time.monotonic() < until:
            await wire.ask(data)
            count += 1

    await asyncio.gather(*(go(wire, time.monotonic() + 1) for wire in wires))
    count, before = 0, hub.cpu_seconds()
    await asyncio.gather(*(go(wire, time.monotonic() + seconds) for wire in wires))
    return count, hub.cpu_seconds() - before


async def heartbeats(hub: Served, nodes: int, seconds: float) -> dict[str, float]:
    """Each node sends a heartbeat every ten seconds, over connections that are kept."""
    wires = [await Wire(hub.control).open() for _ in range(min(nodes, 200))]
    beats = [
        request(hub.token, "/api/hosts/heartbeat", {"node_id": f"node-{n:05}", "capabilities": ["cpu"], "boot_id": "b"})
        for n in range(nodes)
    ]
    late: list[float] = []

    async def go(place: int, began: float, until: float) -> int:
        sent, mine = 0, range(place, nodes, len(wires))
        while True:
            for at, n in enumerate(mine):
                due = began + EVERY_SECONDS * (sent // len(mine) + (at + place / len(wires)) / len(mine))
                if due >= until:
                    return sent
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                await wires[place].ask(beats[n])
                late.append(time.monotonic() - due)
                sent += 1

    async def run(seconds: float) -> int:
        began = time.monotonic()
        return sum(await asyncio.gather(*(go(place, began, began + seconds) for place in range(len(wires)))))

    await run(EVERY_SECONDS)  # every node is made
    late.clear()
    before, began = hub.cpu_seconds(), time.monotonic()
    sent = await run(seconds)
    took, cpu = time.monotonic() - began, hub.cpu_seconds() - before
    before, began = hub.cpu_seconds(), time.monotonic()
    found = await asyncio.to_thread(hub.ask, "/metrics?format=json")
    scrape = time.monotonic() - began
    late.sort()
    return {
        "heartbeats a second": sent / took,
        "hub, % of a core": 100 * cpu / took,
        "CPU microseconds a heartbeat": cpu / sent * 1e6,
        "p99 ms since it was due": late[int(len(late) * 0.99)] * 1000,
        "scrape ms": scrape * 1000,
        "nodes ONLINE": found["nodes_online"],
        "nodes STALE or DEAD": found["nodes_stale"] + found["nodes_dead"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", choices=["sqlite", "file", "memory"], default="sqlite")
    parser.add_argument("--nodes", type=int, default=10_000, help="0: no fleet")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        costs = asyncio.run(parts(Path(folder), secrets.token_hex(16)))
    with served(given.store) as hub:
        made = hub.ask("/api/policies", {"policy": json.loads(rules_json())})["version"]
        hub.ask(f"/api/policies/{made}/activate", {}, **{"If-Match": '"0"'})
        count, cpu = asyncio.run(submits(hub, given.seconds))
    whole = cpu / count * 1e6
    print(f"a durable submit on {given.store}: {whole:.1f} CPU µs of the hub ({count} of them)")
    for name, cost in costs.items():
        print(f"  {name:30} {cost:6.2f} µs  {100 * cost / whole:5.1f} %")
    total = sum(costs.values())
    print(f"  {'together, at most 10 % wanted':30} {total:6.2f} µs  {100 * total / whole:5.1f} %")
    if given.nodes:
        with served(given.store) as hub:
            print(f"{given.nodes} nodes, a heartbeat every {EVERY_SECONDS} s, on {given.store}")
            for name, value in asyncio.run(heartbeats(hub, given.nodes, given.seconds)).items():
                print(f"  {name:30} {value:8.1f}")


def rules_json() -> str:
    """The policy as a client sends it."""
    import msgspec

    return msgspec.json.encode(policy()).decode()


if __name__ == "__main__":
    main()
