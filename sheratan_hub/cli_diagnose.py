"""The command that tells what looks wrong with the hub on this machine, and packs what is needed to find out more."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click

from sheratan_hub.cli_output import say
from sheratan_hub.cli_target import EXIT_CONFIG, EXIT_FAILED, EXIT_REFUSED, EXIT_UNREACHABLE, Target, give_up

if TYPE_CHECKING:
    from sheratan_hub.asking import Planes
    from sheratan_hub.config import Secrets, Settings


class Made(NamedTuple):
    """A bundle's bytes, and what stands in its verdict and its manifest."""

    data: bytes
    findings: list[dict[str, Any]]
    source: str
    as_of: str


@click.command()
@click.option("--output", default=".", help="Directory or file to write the bundle to. Default: here.")
@click.option("--explain", is_flag=True, help="Tell first what looks wrong, and what to do.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for programs.")
@click.option("--config", "config_file", type=click.Path(), help="Settings file instead of ./hub.toml.")
@click.option("--data-dir", type=click.Path(), help="The hub's data directory.")
@click.option("--store", help="The hub's store, if another than the configured one.")
@click.pass_obj
def diagnose(
    target: Target,
    output: str,
    explain: bool,
    as_json: bool,
    config_file: str | None,
    data_dir: str | None,
    store: str | None,
) -> NoReturn:
    """Write diag_bundle_TIME.zip with all that helps to find a fault, without secrets or payloads.

    The hub is asked for it; if it is down, or says no, its files are read. Exit code 0: nothing looks wrong, 1:
    something does, 78: it cannot be done.
    """
    from sheratan_hub.bundle import put, stamp
    from sheratan_hub.clock import SystemClock

    made = _made(target, config_file, {"hub.data_dir": data_dir, "store.url": store})
    if explain and not as_json:
        click.echo(verdict_text(made))
    try:
        path = put(made.data, output, stamp(SystemClock().now()))
    except OSError as error:
        give_up(f"the bundle cannot be written to {error.filename or output}: {error.strerror}", EXIT_CONFIG)
    wrong = any(one["severity"] != "note" for one in made.findings)
    if as_json:
        _print_json(made, str(path), wrong)
    else:
        click.echo(str(path))
        if not explain:
            say(summary(made.findings) + (" --explain tells more" if made.findings else ""))
    sys.exit(EXIT_FAILED if wrong else 0)


def _made(target: Target, config_file: str | None, flags: dict[str, object]) -> Made:
    """The bundle, by the hub or of its files."""
    from sheratan_hub import config

    try:
        settings, secrets = config.load(config_file, os.environ, flags)
        where = {
            key: origin for key, _, origin in config.explain(config_file, os.environ, flags) if origin != "default"
        }
    except config.BadConfig as bad:
        give_up(str(bad), EXIT_CONFIG)
    planes = _planes(target, settings, secrets)
    probes = tuple(planes.probe(plane) for plane in ("control", "data"))
    if all(one.answers for one in probes):
        made = _by_hub(planes)
        if made is not None:
            return made
    if target.control_url is not None and not _is_here(planes.control):
        give_up(f"no answer from {planes.control}, and a hub elsewhere cannot be diagnosed from here", EXIT_UNREACHABLE)
    return _of_files(settings, where, planes, probes)


def _planes(target: Target, settings: Settings, secrets: Secrets) -> Planes:
    import ssl

    from sheratan_hub.asking import Planes, url_of

    try:
        tls = target.tls()
        if tls is None and settings.tls.cert:
            tls = ssl.create_default_context(cafile=settings.tls.cert)
            tls.check_hostname = False
            tls.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None
    token = target.token if target.token is not None else secrets.token
    control, data = target.control_url or url_of(settings, "control"), target.data_url or url_of(settings, "data")
    return Planes(control, data, token, tls)


def _is_here(url: str) -> bool:
    from sheratan_hub.asking import is_here

    return is_here(url)


def _by_hub(planes: Planes) -> Made | None:
    """What the hub makes; None if it cannot, so that its files have to be read."""
    from sheratan_hub.asking import BUNDLE_SECONDS, Refusal, Silence
    from sheratan_hub.bundle import MANIFEST, read_member

    try:
        data = planes.ask("control", "/api/bundle", BUNDLE_SECONDS)
        manifest = read_member(data, MANIFEST)
        return Made(data, read_member(data, "verdict.json")["findings"], "hub", manifest["as_of"])
    except Refusal as no:
        if no.code == "loopback_only" or not _is_here(planes.control):
            give_up(no.text, EXIT_REFUSED)
        say(f"the hub answers, but makes no bundle: {no.text}. Its files are read beside it.")
    except (Silence, ValueError) as error:
        say(f"the hub makes no bundle: {error}. Its files are read beside it.")
    return None


def _of_files(settings: Settings, where: dict[str, str], planes: Planes, probes: tuple[Any, ...]) -> Made:
    import asyncio

    from sheratan_hub.bundle import zipped
    from sheratan_hub.clock import rfc3339
    from sheratan_hub.diagnosis_files import secrets_of
    from sheratan_hub.diagnosis_offline import Given, of_files
    from sheratan_hub.storage import StoreRefused

    redactor = secrets_of(settings, os.environ, (planes.token,))
    try:
        found = asyncio.run(of_files(Given(settings, dict(os.environ), where, redactor, probes, planes)))
    except StoreRefused as no:
        give_up(redactor.name(str(no)), EXIT_CONFIG)
    import msgspec

    return Made(zipped(found.members), msgspec.to_builtins(found.findings), "files", rfc3339(found.now))


def verdict_text(made: Made) -> str:
    """The verdict for people: the worst first."""
    if not made.findings:
        return summary(made.findings)
    lines = [summary(made.findings)]
    for one in made.findings:
        lines += ["", f"{one['severity'].upper()} {one['code']}: {one['text']}"]
        lines += [f"  - {step}" for step in one["do"]]
        lines.append(f"  more: {one['runbook']}")
    return "\n".join([*lines, ""])


def summary(findings: list[dict[str, Any]]) -> str:
    """How many findings are more than notes."""
    wrong = sum(one["severity"] != "note" for one in findings)
    return f"{wrong} thing{'s' * (wrong != 1)} look{'s' * (wrong == 1)} wrong." if wrong else "Nothing looks wrong."


def _print_json(made: Made, path: str, wrong: bool) -> None:
    import hashlib
    import json

    told = {"ok": not wrong, "path": path, "bytes": len(made.data), "sha256": hashlib.sha256(made.data).hexdigest()}
    click.echo(json.dumps({**told, "source": made.source, "as_of": made.as_of, "findings": made.findings}))
