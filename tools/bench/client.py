"""Our own load client, a process of its own: epoll, keep-alive, prepared bytes, as little parsing as can be.

It reads its order as JSON from the first argument and prints what came of it as one line of JSON.
"""

from __future__ import annotations

import gc
import select
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from tools.bench.chains import CHAINS, FOREVER, Chain, Dry, Tally, Wrong
from tools.bench.requests import Wire

GRACE_SECONDS = 10
READ_BYTES = 1 << 18


class Order(msgspec.Struct):
    """What to do: for so many seconds, or until so many jobs are done, if that is not 0."""

    port: int
    token: str
    chain: str
    connections: int
    seconds: float
    jobs: int = 0


class Report(msgspec.Struct):
    """What came of it: `busy` is the share of a core it took, `error` why it cannot be counted, `dry` that a pull found
    nothing left, which ended it."""

    jobs: int
    requests: int
    seconds: float
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    busy: float = 0.0
    error: str = ""
    dry: bool = False


class Connection:
    """One keep-alive connection and its chain; at most one request is under way."""

    def __init__(self, port: int, chain: Chain) -> None:
        self.chain = chain
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.sock.setblocking(False)
        self.got = b""
        self.sent_at = 0.0

    def send(self, request: bytes) -> None:
        self.sent_at = time.perf_counter()
        try:
            sent = self.sock.send(request)
        except BlockingIOError:
            sent = 0
        if sent < len(request):  # a large one: the server reads it whatever else it does
            self.sock.settimeout(GRACE_SECONDS)
            self.sock.sendall(request[sent:])
            self.sock.setblocking(False)

    def read(self) -> bytes | None:
        """The body of the answer once it is whole. Raises `Wrong` when its status is not 2xx."""
        piece = self.sock.recv(READ_BYTES)
        if not piece:
            raise Wrong("the server closed a connection")
        got = self.got = self.got + piece if self.got else piece
        end = got.find(b"\r\n\r\n")
        if end < 0:
            return None
        body = end + 4
        at = got.find(b"Content-Length: ", 0, end)
        if at < 0:
            raise Wrong(f"an answer without Content-Length: {got[:300]!r}")
        if len(got) < body + int(got[at + 16 : got.index(b"\r", at)]):
            return None
        if got[9:10] != b"2":
            raise Wrong(f"status {got[9:12].decode()}: {got[body : body + 300].decode(errors='replace')}")
        self.got = b""
        return got[body:]


class Client:
    """Runs the chains of all connections in one loop."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.tally = Tally(Wire(order.port, order.token), order.jobs)
        self.seconds: list[float] = []
        make = CHAINS[order.chain]
        self.connections = [Connection(order.port, make(self.tally, n)) for n in range(order.connections)]
        self.beside = [Connection(order.port, FOREVER[order.chain](self.tally, 0))] if order.chain in FOREVER else []

    def run(self) -> Report:
        poll = select.epoll()
        by_fd = {one.sock.fileno(): one for one in (*self.beside, *self.connections)}
        for fd in by_fd:
            poll.register(fd, select.EPOLLIN)
        began, spent = time.perf_counter(), time.process_time()
        error, dry = "", False
        try:
            counted, ended = self.loop(poll, by_fd, began)
        except Dry:
            counted, ended, dry = self.tally.done, time.perf_counter(), True
        except (Wrong, OSError, ValueError, KeyError) as wrong:
            counted, ended, error = self.tally.done, time.perf_counter(), f"{type(wrong).__name__}: {wrong}"
        busy = (time.process_time() - spent) / (time.perf_counter() - began)
        for one in by_fd.values():
            one.sock.close()
        times = sorted(self.tally.seconds if self.tally.seconds is not None else self.seconds)
        return Report(
            counted, len(self.seconds), ended - began, quantile(times, 0.5), quantile(times, 0.99), busy, error, dry
        )

    def loop(self, poll: select.epoll, by_fd: dict[int, Connection], began: float) -> tuple[int, float]:
        """(jobs done when time was up or there was nothing left to do, when that was). Chains end what they began."""
        running = {id(one) for one in self.connections}
        beside = {id(one) for one in self.beside}
        for one in by_fd.values():
            self.step(one, None, running)
        until = began + self.order.seconds
        counted = -1
        ended = 0.0
        clock, seconds = time.perf_counter, self.seconds
        while running:
            now = clock()
            if now >= until and counted < 0:
                self.tally.over = True
                counted, ended = self.tally.done, now
            if now > until + GRACE_SECONDS:
                raise Wrong(f"{len(running)} connections got no answer in {GRACE_SECONDS} s")
            for fd, _ in poll.poll(max(0.0, until - now) if counted < 0 else 0.1):
                one = by_fd[fd]
                body = one.read()
                if body is not None:
                    if id(one) not in beside:
                        seconds.append(clock() - one.sent_at)
                    self.step(one, body, running)
        return (counted, ended) if counted >= 0 else (self.tally.done, clock())

    def step(self, one: Connection, body: bytes | None, running: set[int]) -> None:
        """Hand the chain its answer and send what it wants next."""
        try:
            request = next(one.chain) if body is None else one.chain.send(body)
        except StopIteration:
            running.discard(id(one))
            return
        one.send(request)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Milliseconds below which that share of the sorted seconds lies; 0 when there are none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000 if ordered else 0.0


def main(arguments: list[str]) -> int:
    order = msgspec.json.decode(arguments[0], type=Order)
    gc.disable()
    try:
        report: Any = Client(order).run()
    except OSError as error:
        report = Report(0, 0, 0.0, error=f"{type(error).__name__}: {error}")
    print(orjson.dumps(msgspec.to_builtins(report)).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
