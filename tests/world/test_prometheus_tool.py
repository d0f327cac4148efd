"""How the tests come by Prometheus: fetched once, unpacked, found again; and a clear word when it cannot be had."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools import prometheus

DOWNLOAD = 'touch "$PWD/prometheus_1_all.deb"'
"""What apt-get does here when it is asked for the package."""

NO_LISTS = f"""
case "$*" in
  *update*) touch "$0.lists" ;;
  *download*)
    [ -e "$0.lists" ] || {{ echo "E: Unable to locate package prometheus" >&2; exit 100; }}
    {DOWNLOAD} ;;
esac
"""
OFFLINE = 'echo "E: Failed to fetch it: no route to host" >&2; exit 100'
UNPACK = """
mkdir -p "$3/usr/bin"
for name in prometheus promtool; do printf '#!/bin/sh\\n' > "$3/usr/bin/$name"; chmod +x "$3/usr/bin/$name"; done
"""
BROKEN = """
mkdir -p "$3/usr/bin"
for name in prometheus promtool; do printf '#!/bin/sh\\necho wrong libc >&2; exit 1' > "$3/usr/bin/$name"; done
chmod +x "$3"/usr/bin/*
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first folder of PATH, where the test puts its own apt-get and dpkg-deb; what it calls is noted in `calls`."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("touch", "mkdir", "chmod", "sh"):
        (folder / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(prometheus, "HOME", tmp_path / "home" / "prometheus")
    return folder


def put(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "$0 $*" >> "{folder}/calls"\n{text}\n')
    path.chmod(0o755)


def calls(folder: Path) -> list[str]:
    return [os.path.basename(line) for line in (folder / "calls").read_text().splitlines()]


def test_it_is_fetched_once_and_found_again(programs: Path) -> None:
    put(programs, "apt-get", DOWNLOAD)
    put(programs, "dpkg-deb", UNPACK)
    prometheus.install()
    found = prometheus.program("promtool")
    assert found == str(prometheus.HOME / "usr/bin/promtool")
    before = calls(programs)
    prometheus.install()
    assert calls(programs) == before
    assert [path.name for path in prometheus.HOME.parent.iterdir()] == ["prometheus"], "no left-overs"


def test_one_that_is_on_the_machine_is_used(programs: Path) -> None:
    put(programs, "apt-get", OFFLINE)
    for name in prometheus.PROGRAMS:
        put(programs, name, "")
    prometheus.install()
    assert prometheus.program("prometheus") == str(programs / "prometheus")
    assert not (programs / "calls").exists()


def test_half_of_it_is_not_enough(programs: Path) -> None:
    put(programs, "promtool", "")
    assert prometheus.program("promtool") is None


def test_package_lists_are_fetched_if_there_are_none(programs: Path) -> None:
    put(programs, "apt-get", NO_LISTS)
    put(programs, "sudo", 'shift; exec "$@"')
    put(programs, "dpkg-deb", UNPACK)
    prometheus.install()
    assert prometheus.program("prometheus")


@pytest.mark.parametrize(
    ("apt", "dpkg", "why"),
    [
        (OFFLINE, UNPACK, "no route to host"),
        (DOWNLOAD, BROKEN, "wrong libc"),
        (DOWNLOAD, "echo not a package >&2; exit 2", "not a package"),
        ("", UNPACK, "left no package"),
    ],
)
def test_what_went_wrong_is_told_with_what_to_install(programs: Path, apt: str, dpkg: str, why: str) -> None:
    put(programs, "apt-get", apt)
    put(programs, "dpkg-deb", dpkg)
    with pytest.raises(prometheus.Lacking, match=why) as told:
        prometheus.install()
    assert "apt-get install --no-install-recommends prometheus" in str(told.value)
    assert prometheus.program("prometheus") is None
    assert not list(prometheus.HOME.parent.iterdir()), "no left-overs"


def test_a_machine_without_apt_is_told_what_to_do(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prometheus.main() == 1
    assert "put prometheus and promtool on PATH" in capsys.readouterr().err
