"""The Dockerfile and the compose file: read as Docker would, held against the project.

No Docker is needed, and none is run. `make torture` carries out the build, in container_build.py beside this.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from click.testing import CliRunner

from sheratan_hub import config
from sheratan_hub.cli import main
from tests.e2e.serving import TOKEN

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "tools/deploy/docker"


class Step(NamedTuple):
    """One instruction of a Dockerfile."""

    name: str
    text: str


def steps(text: str) -> Iterator[Step]:
    """The instructions, each with its continued lines as one."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        name, _, rest = line.partition(" ")
        yield Step(name, rest.strip())


def stages() -> list[list[Step]]:
    found: list[list[Step]] = []
    for step in steps((DOCKER / "Dockerfile").read_text()):
        if step.name == "FROM":
            found.append([])
        found[-1].append(step)
    return found


BUILD, IMAGE = stages()


def of(stage: list[Step], name: str) -> list[str]:
    return [step.text for step in stage if step.name == name]


def environment() -> dict[str, str]:
    """What the image sets."""
    return dict(word.split("=", 1) for text in of(IMAGE, "ENV") for word in shlex.split(text))


def test_every_instruction_is_one_that_docker_knows() -> None:
    known = {"FROM", "WORKDIR", "COPY", "ENV", "RUN", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL"}
    assert {step.name for step in (*BUILD, *IMAGE)} <= known | {"ENTRYPOINT", "CMD"}
    for step in IMAGE:
        if step.name in ("ENTRYPOINT", "CMD"):
            assert all(isinstance(word, str) for word in json.loads(step.text))


def test_the_image_is_small_and_its_program_no_root() -> None:
    bases = [step.text.split()[0] for stage in (BUILD, IMAGE) for step in stage if step.name == "FROM"]
    assert bases == ["python:3.12-slim", "python:3.12-slim"]
    (user,) = of(IMAGE, "USER")
    assert int(user) >= 1000
    (made,) = of(IMAGE, "RUN")
    assert f"--uid {user} " in made
    assert [text for text in of(IMAGE, "COPY") if not text.startswith("--from=build ")] == []
    names = [step.name for step in IMAGE]
    assert names.index("USER") > max(place for place, name in enumerate(names) if name in ("RUN", "COPY"))


def test_what_is_copied_exists_and_is_let_in() -> None:
    rules = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    assert rules[0] == "*"
    let_in = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = [source for text in of(BUILD, "COPY") for source in text.split()[:-1]]
    assert set(copied) == let_in
    for source in copied:
        assert (ROOT / source).exists(), source
    for lock in re.findall(r"-r (\S+)", " ".join(of(BUILD, "RUN"))):
        assert any(fnmatch(lock, f"{source}*") for source in copied)
        assert "--hash=sha256:" in (ROOT / lock).read_text()


def test_what_the_wheel_is_built_from_is_copied() -> None:
    copied = {source for text in of(BUILD, "COPY") for source in text.split()[:-1]}
    project = (ROOT / "pyproject.toml").read_text()
    assert 'readme = "README.md"' in project
    packages = re.search(r"^packages = (.*)$", project, re.MULTILINE)
    assert packages
    assert {path.split("/")[0] for path in json.loads(packages[1])} | {"README.md", "LICENSE"} <= copied


def test_the_image_listens_keeps_its_state_and_stops_as_the_hub_does() -> None:
    given = environment()
    settings, _ = config.load(
        None, {**{k: v for k, v in given.items() if k.startswith("SHERATAN_")}, "SHERATAN_HUB_TOKEN": TOKEN}
    )
    assert of(IMAGE, "EXPOSE") == [f"{settings.control.port} {settings.data.port}"]
    assert (settings.control.host, settings.data.host) == ("0.0.0.0", "0.0.0.0")
    assert of(IMAGE, "VOLUME") == [settings.hub.data_dir] == of(IMAGE, "WORKDIR")
    assert of(IMAGE, "STOPSIGNAL") == ["SIGTERM"]
    assert "SHERATAN_HUB_TOKEN" not in (DOCKER / "Dockerfile").read_text()


def test_the_commands_of_the_image_are_commands_of_the_hub() -> None:
    program, command = (json.loads(of(IMAGE, name)[0]) for name in ("ENTRYPOINT", "CMD"))
    (health,) = of(IMAGE, "HEALTHCHECK")
    asked = json.loads(health.partition("CMD ")[2])
    assert (program, asked[0]) == (["sheratan-hub"], "sheratan-hub")
    for words in (command, asked[1:]):
        assert CliRunner().invoke(main, [*words, "--help"]).exit_code == 0
    assert re.search(r"--timeout=(\d+)s", health)


# Compose


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return found


def test_the_compose_file_builds_this_image_and_confines_it() -> None:
    assert set(compose()) == {"services", "secrets", "volumes"}
    (hub,) = compose()["services"].values()
    assert (DOCKER / hub["build"]["context"]).resolve() == ROOT
    assert ROOT / hub["build"]["dockerfile"] == DOCKER / "Dockerfile"
    assert hub["read_only"] is True
    assert hub["cap_drop"] == ["ALL"]
    assert hub["security_opt"] == ["no-new-privileges:true"]


def test_the_compose_file_publishes_both_ports_to_this_machine_only() -> None:
    (hub,) = compose()["services"].values()
    assert hub["ports"] == [f"127.0.0.1:{port}:{port}" for port in of(IMAGE, "EXPOSE")[0].split()]


def test_the_token_of_the_compose_file_is_a_secret_where_the_image_looks_for_it() -> None:
    found = compose()
    (hub,) = found["services"].values()
    (name,) = hub["secrets"]
    assert json.loads(of(IMAGE, "CMD")[0])[-1] == f"/run/secrets/{name}"
    assert found["secrets"] == {name: {"file": "./token"}}
    assert str((DOCKER / "token").relative_to(ROOT)) in (ROOT / ".gitignore").read_text().split()
    assert "environment" not in hub


def test_the_state_of_the_compose_file_is_on_a_volume() -> None:
    found = compose()
    (hub,) = found["services"].values()
    assert hub["volumes"] == [f"{next(iter(found['volumes']))}:{of(IMAGE, 'VOLUME')[0]}"]
