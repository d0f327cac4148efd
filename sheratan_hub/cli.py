"""The command line. Everything heavy is imported by the command that needs it, so that `--help` is quick.

Exit codes: 0 done, 1 failed, 2 wrong usage, 69 hub unreachable, 75 not finished in time, 77 refused (403), 78 bad
configuration.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import click

from sheratan_hub import __version__
from sheratan_hub.cli_access import access
from sheratan_hub.cli_audit import audit, watch
from sheratan_hub.cli_diagnose import diagnose
from sheratan_hub.cli_dlq import dlq
from sheratan_hub.cli_explain import jobs_explain
from sheratan_hub.cli_jobs import jobs
from sheratan_hub.cli_missions import missions
from sheratan_hub.cli_nodes import nodes
from sheratan_hub.cli_output import say, show_many
from sheratan_hub.cli_policies import policies
from sheratan_hub.cli_queue import limits, queue
from sheratan_hub.cli_ready import completion, ready
from sheratan_hub.cli_store import store
from sheratan_hub.cli_submit import submit
from sheratan_hub.cli_target import (
    EXIT_CONFIG,
    EXIT_FAILED,
    Target,
    give_up,
    output_option,
    run,
    traced,
    url,
    words,
)
from sheratan_hub.cli_tokens import tokens
from sheratan_hub.cli_top import top

config_option = click.option("--config", "path", type=click.Path(), help="Settings file instead of ./hub.toml.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sheratan-hub")
@click.option(
    "--control-url",
    envvar="HUB_CONTROL_URL",
    callback=url,
    help="[env HUB_CONTROL_URL; http://127.0.0.1:8787]",
)
@click.option(
    "--data-url",
    envvar="HUB_DATA_URL",
    callback=url,
    help="[env HUB_DATA_URL; http://127.0.0.1:8788]",
)
@click.option("--token-file", type=click.Path(exists=True, dir_okay=False), help="[else env SHERATAN_HUB_TOKEN]")
@click.option("--ca", envvar="HUB_CA", type=click.Path(), help="PEM file of the hub's authority. [env HUB_CA]")
@click.option("--cert", envvar="HUB_CERT", type=click.Path(), help="PEM file to show as a client. [env HUB_CERT]")
@click.option("--cert-key", envvar="HUB_CERT_KEY", type=click.Path(), help="Its private key. [env HUB_CERT_KEY]")
@click.pass_context
def main(
    context: click.Context,
    control_url: str | None,
    data_url: str | None,
    token_file: str | None,
    ca: str | None,
    cert: str | None,
    cert_key: str | None,
) -> None:
    """Sheratan Hub hands work out to a fleet of machines over plain HTTP."""
    context.obj = Target(control_url, data_url, token_file, ca, cert, cert_key)


main.add_command(submit)
main.add_command(jobs)
main.add_command(nodes)
main.add_command(audit)
main.add_command(watch)
main.add_command(tokens)
main.add_command(access)
main.add_command(policies)
jobs.add_command(jobs_explain)
main.add_command(diagnose)
main.add_command(dlq)
main.add_command(missions)
main.add_command(queue)
main.add_command(limits)
main.add_command(store)
main.add_command(ready)
main.add_command(completion)
main.add_command(top)


@main.command()
@config_option
@click.option("--control-host", "control__host", help="Address of the control plane.")
@click.option("--control-port", "control__port", type=int, help="Port of the control plane; 0: any free one.")
@click.option("--data-host", "data__host", help="Address of the data plane.")
@click.option("--data-port", "data__port", type=int, help="Port of the data plane; 0: any free one.")
@click.option("--data-dir", "hub__data_dir", type=click.Path(), help="Where state and logs are kept.")
@click.option("--token-file", "auth__token_file", type=click.Path(), help="File that holds the hub's token.")
@click.option("--store", "store__url", help="Store URL, such as sqlite://var/hub.db, file://var/hub or memory://.")
@click.option("--log-level", "log__level", type=click.Choice(["debug", "info", "warning", "error"]))
def serve(path: str | None, **flags: object) -> NoReturn:
    """Run a hub, both planes, until SIGTERM or Ctrl-C. SIGHUP reads the settings again and reopens the logs."""
    from sheratan_hub import config, serving

    try:
        sys.exit(serving.serve(path, os.environ, {name.replace("__", "."): value for name, value in flags.items()}))
    except config.BadConfig as bad:
        give_up(str(bad), EXIT_CONFIG)


@main.command()
@click.argument("module")
@click.option("--node-id", help="Name of this node. Default: host name and process id.")
@click.option("--concurrency", type=click.IntRange(1, 1000), help="Jobs at once. Default: the number of CPUs.")
@click.option("--capabilities", default="", help="What this node can do, comma-separated.")
@click.option("--zone", help="Where this node is.")
@click.option("--wait", type=click.FloatRange(0, 30), default=20, show_default=True, help="Long poll, seconds.")
@click.option("--grace", type=click.FloatRange(0), default=10, show_default=True, help="Seconds to finish on SIGTERM.")
@click.pass_obj
def worker(
    target: Target,
    module: str,
    node_id: str | None,
    concurrency: int | None,
    capabilities: str,
    zone: str | None,
    wait: float,
    grace: float,
) -> None:
    """Run jobs with the handlers of MODULE, a dotted name or the path of a .py file."""
    import platform

    from sheratan_hub.worker import Options

    options = Options(
        module=module,
        node_id=node_id or f"{platform.node()}-{os.getpid()}",
        concurrency=concurrency or len(os.sched_getaffinity(0)),
        capabilities=tuple(words(capabilities)),
        zone=zone,
        wait_seconds=wait,
        grace_seconds=grace,
    )
    run(_worker(target, options))


async def _worker(target: Target, options: Any) -> int:
    from sheratan_hub.handlers import load

    try:
        handlers = load(options.module)
    except (ImportError, ValueError, SyntaxError) as error:
        raise click.UsageError(str(error)) from error
    with traced("sheratan-worker") as tracing:
        return await _work(target, options, handlers, tracing)


async def _work(target: Target, options: Any, handlers: dict[str, Any], tracing: Any) -> int:
    from sheratan_hub.clock import SystemClock
    from sheratan_hub.runner import ProcessDied
    from sheratan_hub.worker import Worker, work

    clock = SystemClock()
    hub = target.client(
        clock=clock,
        patience_seconds=2.0,
        backoff_cap_ms=1000.0,
        answer_seconds=10.0,
        connections=16 + options.concurrency,
        hmac_key=os.environ.get("SHERATAN_RESULT_HMAC_KEY"),
    )
    async with hub:
        say(f"node {options.node_id} works on {', '.join(sorted(handlers))}, {options.concurrency} at once")
        try:
            await work(Worker(hub, handlers, options, clock, say, tracing), clock)
        except ProcessDied as died:
            say(f"sheratan-hub: {died}")
            return EXIT_FAILED
    return 0


@main.group("config")
def configuration() -> None:
    """Check and show the settings of a hub on this machine."""


@configuration.command("check")
@config_option
def config_check(path: str | None) -> None:
    """Check hub.toml and the environment; exit code 78 and the reason if a hub could not start with them."""
    from sheratan_hub import config
    from sheratan_hub.clock import SystemClock
    from sheratan_hub.storage import StoreRefused, open_store

    try:
        settings, _ = config.load(path, os.environ)
        open_store(config.store_url(settings), SystemClock())
    except (config.BadConfig, StoreRefused) as bad:
        give_up(str(bad), EXIT_CONFIG)
    click.echo("ok")


@configuration.command("show")
@config_option
@output_option
def config_show(path: str | None, output: str) -> None:
    """Show every setting in force and where it comes from; secrets are hidden."""
    from sheratan_hub import config

    try:
        rows = config.explain(path, os.environ)
    except config.BadConfig as bad:
        give_up(str(bad), EXIT_CONFIG)
    columns = ("key", "value", "from")
    show_many([dict(zip(columns, row, strict=True)) for row in rows], columns, output)


@main.command()
@click.pass_obj
def smoke(target: Target) -> NoReturn:
    """Go through the operators' checklist: on the hub that the URLs name, else on one started for it."""
    import asyncio

    from sheratan_hub.smoke import run as go_through

    try:
        sys.exit(asyncio.run(go_through(target.control_url, target.data_url, target.token, click.echo, target.tls())))
    except KeyboardInterrupt:
        give_up("stopped; what smoke had made is taken away", EXIT_FAILED)
