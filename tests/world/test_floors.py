"""The floor check itself: it must see what it is there to forbid."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools.floors import complaints, registries

ROOT = Path(__file__).resolve().parents[2]


def tree(root: Path, **files: str) -> list[str]:
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(complaints(root))


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("sheratan_hub__rules__jobs", "from sheratan_hub.hub import Hub"),
        ("sheratan_hub__rules__jobs", "def f():\n    import sheratan_hub.commit"),
        ("sheratan_hub__storage", "from sheratan_hub import hub"),
        ("sheratan_hub__hub", "from sheratan_hub.web.plane import Plane"),
        ("sheratan_hub__client", "from sheratan_hub.rules.jobs import Job"),
        ("sheratan_hub__hub", "from sheratan_hub.client import HubClient"),
        ("sheratan_hub__app", "from sheratan_stores.sqlite import SqliteStore"),
        ("stores__sheratan_stores__x", "from sheratan_hub.rules.jobs import Job"),
        ("sheratan_hub__rules__jobs", "from ..hub import Hub"),
        ("sheratan_hub__mystery", "x = 1"),
        ("sheratan_hub__hub", "x = 1\n" * 301),
        ("sheratan_hub__hub", "def f():\n" + "    x = 1\n" * 61),
    ],
)
def test_what_climbs_or_sprawls_is_named(tmp_path: Path, where: str, text: str) -> None:
    assert len(tree(tmp_path, **{where: text})) == 1


def test_what_goes_downwards_is_fine(tmp_path: Path) -> None:
    files = {
        "sheratan_hub__web__data": "from sheratan_hub.hub import Hub\nfrom sheratan_hub.rules import jobs",
        "sheratan_hub__worker": "from sheratan_hub.client import HubClient\nfrom sheratan_hub.clock import Clock",
        "sheratan_hub__cli": "from sheratan_hub import worker, __version__",
        "stores__sheratan_stores__x": "from sheratan_hub.storage import Row\nfrom sheratan_stores import lock",
        "sheratan_hub__config": '"""Longer than 300 lines because it must."""\n' + "x = 1\n" * 400,
    }
    assert tree(tmp_path, **files) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tools/lock/run.txt", "--extra-index-url https://mirror.example/simple\n"),
        ("tools/lock/run.txt", "click @ https://mirror.example/click.whl\n"),
        ("tools/lock/run.txt", "--find-links wheels\n"),
        ("README.md", "see https://" + "pypi.org/project/click\n"),
    ],
)
def test_an_address_of_a_registry_is_named(tmp_path: Path, name: str, text: str) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert list(registries(tmp_path)) == []
    subprocess.run(["git", "add", name], cwd=tmp_path, check=True)
    assert list(registries(tmp_path)) == [f"{name}: names a registry's address"]


def test_this_project_stands_on_its_floors_and_names_no_registry() -> None:
    assert list(complaints(ROOT)) == []
    assert list(registries(ROOT)) == []
