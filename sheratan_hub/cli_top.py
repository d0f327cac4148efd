"""`sheratan-hub top`: a hub at a glance, again and again. Drawn with rich on a terminal, as lines anywhere else."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import click

from sheratan_hub.cli_target import Target, run

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sheratan_hub.top import Sampler, Snapshot

WIDE = 100
"""From so many columns on nodes and alerts stand beside the numbers."""

NODES_SHOWN = 12
STYLES = {"ONLINE": "green", "STALE": "yellow", "DEAD": "red", "GREEN": "green", "YELLOW": "yellow", "RED": "red"}


@click.command()
@click.option("--every", type=click.FloatRange(0.2, 3600), default=2, show_default=True, help="Seconds between looks.")
@click.option("--once", is_flag=True, help="Two looks, for the rates between them, then end.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a look.")
@click.pass_obj
def top(target: Target, every: float, once: bool, as_json: bool) -> NoReturn:
    """Show nodes, queue, rates, the oldest waiting jobs and alerts of a hub, until Ctrl-C."""
    run(_top(target, every * 1000, once, as_json))


async def _top(target: Target, every_ms: float, once: bool, as_json: bool) -> int:
    import asyncio

    from sheratan_hub.clock import SystemClock
    from sheratan_hub.top import Sampler

    clock = SystemClock()
    async with target.client(clock=clock, patience_seconds=0, answer_seconds=5.0) as hub:
        sampler = Sampler(hub, clock)
        first = await sampler.sample()
        if once:
            await clock.sleep(every_ms)
            _print(await sampler.sample(), as_json)
            return 0
        looking = asyncio.ensure_future(_look(sampler, first, every_ms, as_json))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, looking.cancel)
        await asyncio.wait({looking})
        if not looking.cancelled() and (error := looking.exception()) is not None:
            raise error
        return 0


async def _look(sampler: Sampler, first: Snapshot, every_ms: float, as_json: bool) -> None:
    """Look again and again, until cancelled."""
    from sheratan_hub.clock import SystemClock

    clock = SystemClock()
    if as_json or not sys.stdout.isatty():
        shown = first
        while True:
            _print(shown, as_json)
            await clock.sleep(every_ms)
            shown = await _again(sampler, shown)
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        shown = first
        while True:
            live.update(draw(shown, console.width, every_ms / 1000), refresh=True)
            await clock.sleep(every_ms)
            shown = await _again(sampler, shown)


async def _again(sampler: Sampler, last: Snapshot) -> Snapshot:
    """The next snapshot; while the hub is away the last one, with why."""
    import msgspec

    from sheratan_hub.client import HubRefused, HubUnreachable

    try:
        return await sampler.sample()
    except (HubUnreachable, HubRefused) as error:
        return msgspec.structs.replace(last, away=str(error))


def _print(shown: Snapshot, as_json: bool) -> None:
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(shown))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.capture() as text:
        console.print(draw(shown, console.width, None))
    click.echo("\n".join(line.rstrip() for line in text.get().splitlines()))


def draw(shown: Snapshot, width: int, every_seconds: float | None) -> RenderableType:
    """The whole picture, for so many columns."""
    from rich.console import Group
    from rich.table import Table

    numbers = Group(_nodes_line(shown), _jobs_line(shown), "", _waiting(shown), "", _rates(shown), _hub_line(shown))
    lists = Group(_nodes(shown, width), "", _alerts(shown))
    if width < WIDE:
        return Group(_head(shown, every_seconds), "", numbers, "", lists)
    grid = Table.grid(padding=(0, 3))
    grid.add_row(numbers, lists)
    return Group(_head(shown, every_seconds), "", grid)


def _head(shown: Snapshot, every_seconds: float | None) -> Any:
    from rich.text import Text

    head = Text.assemble((f"Sheratan Hub {shown.version or ''} ".replace("  ", " "), "bold"), f"{shown.ts[:19]}Z")
    if every_seconds is not None:
        head.append(f"  every {every_seconds:g} s, Ctrl-C ends", "dim")
    for plane, verdict in shown.health.items():
        if verdict is not None:
            head.append(f"\n{plane} plane ").append(verdict, "green" if verdict == "ok" else "bold red")
    if shown.away is not None:
        head.append("\nAWAY, what follows is old: ", "bold red").append(clean(shown.away))
    return head


def _nodes_line(shown: Snapshot) -> Any:
    return _words("nodes", ((str(n), name, STYLES[name] if n else "") for name, n in shown.nodes.items()))


def _jobs_line(shown: Snapshot) -> Any:
    return _words("jobs", ((str(n), name, "red" if name == "failed" and n else "") for name, n in shown.jobs.items()))


def _rates(shown: Snapshot) -> Any:
    return _words("a second", ((_number(rate), name, "") for name, rate in shown.rates.items()))


def _hub_line(shown: Snapshot) -> Any:
    found = {
        "commands/s": shown.commands_per_second,
        "waiting": shown.commands_waiting,
        "connections": shown.connections,
        "long polls": shown.long_polls,
    }
    return _words("hub", ((_number(value), name, "") for name, value in found.items()))


def _words(title: str, parts: Iterable[tuple[str, str, str]]) -> Any:
    """Numbers, each with its name, in as many lines as they need."""
    from rich.columns import Columns
    from rich.table import Table
    from rich.text import Text

    pieces = [Text.assemble((number, style), f" {name}", no_wrap=True) for number, name, style in parts]
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=8, style="bold")
    grid.add_row(title, Columns(pieces, padding=(0, 2)))
    return grid


def _waiting(shown: Snapshot) -> Any:
    """How many jobs of each priority could run, and how long the oldest waits."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="not bold")
    table.add_column("waiting", style="bold", header_style="bold")
    for name in shown.oldest_seconds:
        table.add_column(name, justify="right")
    if any(n is not None for n in shown.ready.values()):
        table.add_row("ready", *(_number(n) for n in shown.ready.values()))
    table.add_row("oldest", *(_age(seconds) for seconds in shown.oldest_seconds.values()))
    return table


def _nodes(shown: Snapshot, width: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    if shown.node_list is None:
        return Text("nodes: not for this token", "dim")
    if not shown.node_list:
        return Text("no nodes", "dim")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("node", "status", "health", "jobs") + (("zone", "last seen") if width >= WIDE else ()):
        table.add_column(name, overflow="ellipsis", no_wrap=True)
    for node in shown.node_list[:NODES_SHOWN]:
        status = "draining" if node.draining and node.status == "ONLINE" else node.status
        cells = [
            Text(clean(node.node_id)),
            Text(status, STYLES.get(status, "yellow")),
            Text(node.health or "-", STYLES.get(node.health or "", "")),
            Text("-" if node.current_jobs is None else str(node.current_jobs)),
        ]
        cells += [Text(clean(node.zone or "-")), Text((node.last_seen or "-")[11:19])] if width >= WIDE else []
        table.add_row(*cells)
    more = sum(shown.nodes.values()) - min(len(shown.node_list), NODES_SHOWN)
    if more > 0:
        table.add_row(Text(f"and {more} more", "dim"))
    return table


def _alerts(shown: Snapshot) -> Any:
    from rich.text import Text

    if shown.alerts is None:
        return Text("alerts: not for this token", "dim")
    if not shown.alerts:
        return Text("no alerts", "dim")
    text = Text("alerts", "bold")
    for one in reversed(shown.alerts):
        text.append(f"\n{clean(str(one.get('ts')))[:19]}Z ", "dim").append(clean(str(one.get("rule"))), "yellow")
        text.append(f" {clean(str(one.get('text')))}", "not bold")
    return text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _age(seconds: float | None) -> str:
    """A time in the largest unit that fits."""
    if not seconds:
        return "-"
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s"


def clean(text: str) -> str:
    """Without what could steer a terminal: names and sentences come from elsewhere."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)
