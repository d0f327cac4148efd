"""Builds what the image holds without Docker and starts it; `make torture` calls it, as it installs everything anew."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tests.e2e.serving import TOKEN, Served
from tests.world.test_container import BUILD, IMAGE, ROOT, of


def test_the_commands_of_the_build_make_a_program_that_serves(tmp_path: Path) -> None:
    """The build stage in a folder: its copies, its commands word for word but for where /opt and /src are."""
    source, opt = tmp_path / "src", tmp_path / "opt"
    for text in of(BUILD, "COPY"):
        *names, target = text.split()
        for name in names:
            place = source / (name if target == "./" else target)
            place.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, place)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(Path(sys.base_prefix) / "bin/python3")
    set_by_env = dict(word.split("=", 1) for text in of(BUILD, "ENV") for word in shlex.split(text))
    environ = {**os.environ, **set_by_env, "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    for text in of(BUILD, "RUN"):
        subprocess.run(
            ["sh", "-ec", text.replace("/opt/", f"{opt}/")], cwd=source, env=environ, check=True, timeout=300
        )
    program = opt / "sheratan-hub/bin/sheratan-hub"
    served = Served(tmp_path)
    (tmp_path / "token").write_text(TOKEN)
    del served.environ["SHERATAN_HUB_TOKEN"]
    served.environ["HUB_CONTROL_URL"] = f"http://127.0.0.1:{served.control_port}"
    served.environ["HUB_DATA_URL"] = f"http://127.0.0.1:{served.data_port}"
    words = [word.replace("/run/secrets/sheratan_hub_token", "token") for word in json.loads(of(IMAGE, "CMD")[0])]
    asked = json.loads(of(IMAGE, "HEALTHCHECK")[0].partition("CMD ")[2])[1:]
    with subprocess.Popen([program, *words], cwd=tmp_path, env=served.environ, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            done = subprocess.run([program, *asked], env=served.environ, capture_output=True, timeout=60, check=False)
            assert (done.returncode, done.stdout) == (0, b"ready\n")
            assert served.ask("POST", "/api/jobs", {"kind": "k"})["ok"]
        finally:
            process.kill()
