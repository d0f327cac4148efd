"""One plane: finds the route, lets it pass the gates in order, runs its handler, turns a refusal into its answer.

The gates: Host header, leak guard (410), path (404) and method (405), token, body. Then the handler.

It is longer than 300 lines because every request walks through all of it.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import unquote

import msgspec

from sheratan_hub import log
from sheratan_hub.audit_check import AuditView
from sheratan_hub.clock import Clock
from sheratan_hub.config import Settings
from sheratan_hub.diagnosis_live import Inside
from sheratan_hub.hub import Hub
from sheratan_hub.items import Origin
from sheratan_hub.keyring import ANYBODY, Holder
from sheratan_hub.metrics import Metrics, Telling
from sheratan_hub.rules.access import Right
from sheratan_hub.rules.command import Code, Event, Refused
from sheratan_hub.rules.integrity import Demand
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.auth import HostCheck, Tokens, is_loopback
from sheratan_hub.web.body import check_json, decode, read_body
from sheratan_hub.web.callers import NO_PROXIES, Failures, Proxies
from sheratan_hub.web.errors import problem
from sheratan_hub.web.forms import EmptyForm
from sheratan_hub.web.gate import TOKEN_REFUSALS, authorize, hold
from sheratan_hub.web.request import Request
from sheratan_hub.web.room import Room

if TYPE_CHECKING:
    from sheratan_hub.web.manual import Manual

SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

Shape = type[Any] | UnionType | Mapping[str, Any] | None
"""What an answer may be: see `Route`."""

LARGE_BYTES = 65_536
"""A larger body is checked in a thread, so that others are answered meanwhile."""


@dataclass(frozen=True, slots=True)
class Route:
    """One line of the route table. `plane` is where it is served; elsewhere its path is answered 410.

    A body is decoded as `form`, or by `reader` (from its text, what is in it, and the settings) where that is not all;
    `batch` allows a large one.
    A GET that `acts` (the fleet pulls by it) has no HEAD.

    The rest is what clients are told: `answers` with 200 and `made` with 201 are a type, several (`A | B`), or types by
    media type; `codes` are the refusals of its own, beside those of the gates (see `codes`); `query` and `headers` what
    else it reads; `follow` the path that an id in its answer leads to; `fleet` marks what deployed fleets speak.
    """

    method: str
    path: str
    plane: Literal["control", "data", "both"]
    handler: Callable[[Call], Awaitable[Answer]]
    right: Right = "token"
    form: type[Any] | UnionType | None = None
    reader: Callable[[bytes, dict[str, Any], Settings], Any] | None = None
    body_optional: bool = False
    batch: bool = False
    acts: bool = False
    answers: Shape = None
    made: Shape = None
    codes: tuple[Code, ...] = ()
    query: type[msgspec.Struct] | None = None
    headers: tuple[str, ...] = ()
    follow: str = ""
    fleet: bool = False


@dataclass(slots=True)
class Services:
    """What handlers may use. A reload exchanges `settings`, `demand` and `manuals`; nobody else changes anything."""

    hub: Hub
    clock: Clock
    settings: Settings
    metrics: Metrics
    tokens: Tokens
    demand: Demand
    ports: dict[str, int]
    room: Room
    audit: AuditView
    failures: Failures
    telling: Telling
    inside: Inside
    manuals: dict[str, Manual]
    """What each plane tells of itself."""


class Call(msgspec.Struct, eq=False):
    """One request on its way through: what its handler needs to know."""

    request: Request
    plane: str
    services: Services
    params: Mapping[str, str]
    origin: Origin
    form: Any = None
    done: dict[str, Any] | None = None
    """What an admin route has done, for the audit log: numbers and names, never a payload."""
    holder: Holder = ANYBODY
    """Whose token it brought; nobody's where none is needed."""
    proxies: Proxies = NO_PROXIES

    @property
    def is_local(self) -> bool:
        """Whether it comes from this machine, and not through a proxy here that nobody trusts."""
        return is_loopback(self.origin.remote_addr) and not self.proxies.hides(self.request)

    @property
    def hub(self) -> Hub:
        """The engine."""
        return self.services.hub

    @property
    def settings(self) -> Settings:
        """The settings."""
        return self.services.settings

    def from_node(self, node_id: str | None) -> Origin:
        """The origin, once the node is known."""
        return msgspec.structs.replace(self.origin, node_id=node_id)

    def report(self, event: str, node_id: str | None = None, **meta: str) -> None:
        """Tell the observers of something that this request brought about, for metrics and audit."""
        origin = self.from_node(node_id) if node_id else self.origin
        self.hub.report(Event(self.services.clock.now(), event, "client", meta=meta), origin)

    def refused(self, no: Refused, node_id: str | None = None) -> None:
        """Tell the observers of a refusal, for metrics and audit."""
        meta = {"reason": no.reason, **no.detail} if no.reason else dict(no.detail)
        event = Event(self.services.clock.now(), f"refused.{no.code}", "client", meta=meta)
        self.hub.report(event, self.from_node(node_id) if node_id else self.origin)


ANY = None
"""In the tree of paths: a `{}` place. It is no text, as any text may stand in a path."""


class Table:
    """The routes of one plane, found by path: the literal ones at once, the others segment by segment."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._literal: dict[str, dict[str, Route]] = {}
        self._tree: dict[str | None, Any] = {}
        for route in routes:
            if "{" not in route.path:
                self._literal.setdefault(route.path, {})[route.method] = route
            else:
                self._grow(route)

    def _grow(self, route: Route) -> None:
        node = self._tree
        for part in route.path.split("/")[1:]:
            node = node.setdefault(ANY if part.startswith("{") else part, {})
        node.setdefault("", {})[route.method] = route

    def find(self, path: str) -> tuple[dict[str, Route], tuple[str, ...]]:
        """The routes of this raw path by method, and what stands in its `{}` places; empty if there are none."""
        methods = self._literal.get(path)
        if methods is not None:
            return methods, ()
        parts = path.split("/")[1:]
        if "%" in path:
            parts = [unquote(part, errors="replace") for part in parts]
            methods = self._literal.get("/" + "/".join(part.replace("/", "%2F") for part in parts))
            if methods is not None:
                return methods, ()
        node, values = self._tree, []
        for part in parts:
            if part in node and part:
                node = node[part]
            elif ANY in node and part:
                node = node[ANY]
                values.append(part)
            else:
                return {}, ()
        return node.get("", {}), tuple(values)


@lru_cache(256)
def places(path: str) -> tuple[str, ...]:
    """The names of a route's `{}` places."""
    return tuple(part[1:-1] for part in path.split("/") if part.startswith("{"))


class Plane:
    """The request handler of one port. Broad `except`, one of the four: a bug becomes 500 and one log entry."""

    def __init__(
        self, name: str, routes: Iterable[Route], services: Services, hosts: HostCheck, proxies: Proxies = NO_PROXIES
    ) -> None:
        routes = list(routes)
        self._proxies = proxies
        self._ids, self._id_start = count(1), services.clock.secret()[:12]
        self.name, self._services, self._hosts = name, services, hosts
        self._mine = Table(route for route in routes if route.plane in (name, "both"))
        self._theirs = Table(route for route in routes if route.plane not in (name, "both"))
        self._log = logging.getLogger(f"sheratan.{name}")

    def adopt(self, hosts: HostCheck, proxies: Proxies) -> None:
        """Take other Host headers, believe other proxies, from the next request on."""
        self._hosts, self._proxies = hosts, proxies

    async def __call__(self, request: Request) -> Answer:
        """Answer one request."""
        origin = Origin(self.name, self._proxies.client(request))
        call = Call(request, self.name, self._services, {}, origin, proxies=self._proxies)
        template = "unmatched"
        route: Route | None = None
        request.id = self.request_id(request)
        log.request_id.set(request.id)
        try:
            route = self._admit(call)
            template = route.path
            if route.form is not None:
                call.form = await self._read(request, route)
            if call.holder.slot != "active":
                await hold(call)
            response = await route.handler(call)
        except Refused as no:
            response = self._refused(call, no)
            no.__traceback__ = None  # its frames hold it in turn: only the collector of cycles would find them
            if route is not None and route.right == "admin":
                call.done = {**(call.done or {}), "refused": no.code}
            if no.code in TOKEN_REFUSALS and not await self._services.failures.refused(call.origin.remote_addr):
                response.force_close()
        except (asyncio.CancelledError, ConnectionError):
            if route is not None and route.right == "admin":
                self._administered(call, route)
            raise
        except Exception:
            response = self._bug(request, template)
        if route is not None and route.right == "admin":
            self._administered(call, route)
        self._services.metrics.answered(self.name, template, response.status)
        return response

    def request_id(self, request: Request) -> str:
        """The client's own id for the request if it has a sane one, else a new one."""
        given = request.headers.get("X-Request-ID")
        if given is not None and SANE_ID.fullmatch(given):
            return given
        return f"{self._id_start}-{next(self._ids):x}"

    def _admit(self, call: Call) -> Route:
        """All gates but the body."""
        request = call.request
        self._hosts.check(request.headers)
        if not request.raw_path.startswith("/"):
            raise Refused(Code.BAD_REQUEST, "the request target must be a path")
        path = request.raw_path.partition("?")[0]
        methods, values = self._mine.find(path)
        known = methods or self._theirs.find(path)[0]
        route_path = next(iter(known.values())).path if known else None
        call.origin = Origin(self.name, call.origin.remote_addr, path[:200], route=route_path)
        if not methods:
            raise self._lost(path, theirs=bool(known))
        route = methods.get("GET" if request.method == "HEAD" else request.method)
        if route is None or (route.acts and request.method == "HEAD"):
            raise NotAllowed(sorted(methods))
        if values:
            call.params = dict(zip(places(route.path), values, strict=True))
        try:
            authorize(call, route.right)
        except Refused as no:
            if route.right == "admin" and no.code is Code.LOOPBACK_ONLY:  # a valid token from elsewhere is on record
                call.done = {"refused": no.code}
                self._administered(call, route)
            raise
        return route

    def _lost(self, path: str, *, theirs: bool) -> Refused:
        """Leak guard: a path of the other plane is told the right port, before any token is looked at."""
        if theirs:
            other = "data" if self.name == "control" else "control"
            text = f"{path[:200]} belongs to the {other} plane on port {self._services.ports[other]}"
            return Refused(Code.PORT_MISMATCH, text, reason=f"{other}_path_on_{self.name}_port")
        return Refused(Code.UNKNOWN_PATH, f"there is no {path[:200]} here")

    def _administered(self, call: Call, route: Route) -> None:
        meta = {"route": f"{route.method} {route.path}", **(call.done or {})}
        call.hub.report(Event(self._services.clock.now(), "admin.action", "operator", meta=meta), call.origin)

    async def _read(self, request: Request, route: Route) -> Any:
        limits = self._services.settings.limits
        body = await read_body(request, limits.batch_bytes if route.batch else limits.body_bytes, limits.body_seconds)
        if not body and route.body_optional:
            body = b"{}"
        if len(body) > LARGE_BYTES:
            doc = await asyncio.to_thread(check_json, body, limits.json_depth)
        else:
            doc = check_json(body, limits.json_depth)
        if route.reader is not None:
            return route.reader(body, doc, self._services.settings)
        return decode(body, cast("type[Any]", route.form or EmptyForm))

    def _refused(self, call: Call, no: Refused) -> Answer:
        node_id = getattr(call.form, "node_id", None)
        call.refused(no, node_id if isinstance(node_id, str) else None)
        response = problem(no, self._services.settings.queue.backpressure_mode)
        if isinstance(no, NotAllowed):
            response.more["Allow"] = ", ".join(no.methods)
        if no.code in (Code.BODY_TOO_LARGE, Code.UNSUPPORTED_MEDIA_TYPE, Code.BAD_REQUEST):
            response.force_close()
        return response

    def _bug(self, request: Request, template: str) -> Answer:
        request_id = request.id
        self._log.exception("request %s to %s %s failed", request_id, request.method, template)
        no = Refused(Code.INTERNAL, "the hub has a bug here; its log tells more under this request id")
        return problem(no, request_id=request_id)


class NotAllowed(Refused):
    """405, with the methods that the path has."""

    def __init__(self, methods: list[str]) -> None:
        super().__init__(Code.METHOD_NOT_ALLOWED, f"this path takes {', '.join(methods)}")
        self.methods = methods
