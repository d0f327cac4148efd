"""Two small commands about the program itself: is the hub ready, and completion for the shell."""

from __future__ import annotations

import click

from sheratan_hub.cli_output import say
from sheratan_hub.cli_target import EXIT_FAILED, Target, run

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.option("--plane", type=click.Choice(["control", "data", "both"]), default="both", show_default=True)
@click.pass_obj
def ready(target: Target, plane: str) -> None:
    """Ask both planes whether they are ready; exit code 1 or 69 and the reason if not. Needs no token.

    The data plane tells its own machine only.
    """
    run(_ready(target, ("control", "data") if plane == "both" else (plane,)))


async def _ready(target: Target, planes: tuple[str, ...]) -> int:
    from sheratan_hub.client import HubRefused

    async with target.client(patience_seconds=0, answer_seconds=5.0) as hub:
        for plane in planes:
            try:
                await hub.call(plane, "GET", "/readyz")  # type: ignore[arg-type]
            except HubRefused as no:
                if no.status == 403:
                    raise
                say(f"sheratan-hub: the {plane} plane is not ready: {no}")
                return EXIT_FAILED
    click.echo("ready")
    return 0


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script that completes commands and options: eval "$(sheratan-hub completion bash)"."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:  # pragma: no cover - click knows all three
        raise click.UsageError(f"click completes nothing in {shell}")
    click.echo(found(context.find_root().command, {}, "sheratan-hub", "_SHERATAN_HUB_COMPLETE").source())
