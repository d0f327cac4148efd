"""`sheratan-hub store`: what each command prints and ends with, for people and for programs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sheratan_hub.cli import main
from sheratan_hub.storage import Changes, Key
from tests.hub.test_store_tools import at, filled, hashes, spoil
from tests.rules.whole import KEYED


def command(*arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr)"""
    done = CliRunner().invoke(main, ["store", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def told(*arguments: object, status: int = 0) -> Any:
    code, out, err = command(*arguments, "--json")
    assert code == status, err
    return json.loads(out)


@pytest.fixture(autouse=True)
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHERATAN_STORE_URL", f"sqlite://{tmp_path}/a.db")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    asyncio.run(filled("sqlite", tmp_path / "a.db"))
    return tmp_path / "a.db"


def test_every_command_on_a_store_that_is_well(store: Path, tmp_path: Path) -> None:
    info = told("info")
    assert (info["place"], info["held_by"], info["jobs"]["pending"]) == (str(store), "", 5)
    assert told("check")["ok"]
    made = told("backup", "saved")
    assert made["holds"]["rows"]["job"] == 8
    assert told("check", "saved")["ok"]
    assert told("restore", "saved", "--to", "file://b")["sha256"] == made["holds"]["sha256"]
    assert told("copy", "file://b", "sqlite://c.db")["sha256"] == made["holds"]["sha256"]
    assert told("copy", "saved", "sqlite://d.db")["sha256"] == made["holds"]["sha256"]
    assert told("backup", "saved2", "--from", "file://b")["scheme"] == "file"
    assert told("compact", "sqlite://c.db")["bytes_after"] > 0
    repaired = told("repair", "file://b", "sqlite://e.db")
    assert (repaired["ok"], repaired["lost"], repaired["mended"], repaired["lost_events"]) == (True, [], [], 0)
    assert told("info", "sqlite://e.db")["next_event"] == made["holds"]["next_event"]


def test_people_are_told_in_a_line(store: Path) -> None:
    code, out, _ = command("check")
    assert (code, out.splitlines()[-1].startswith("ok: ")) == (0, True)
    assert str(store) in out, "which store it was, as the configured one may be another than the hub's"
    code, out, err = command("backup", "saved")
    assert (code, "sha256" in out, "8 job" in err) == (0, True, True)
    assert f"sqlite://{store} backed up into " in out
    assert "nobody" in command("info")[1]
    assert command("compact")[1].startswith("ok: ")


def test_what_is_wrong_is_named_and_the_status_is_1(store: Path, tmp_path: Path) -> None:
    async def spoil_rows() -> None:
        found = at("sqlite", store)
        await found.open()
        async with found.begin() as tx:
            await tx.save(Changes(gone=[Key("job", KEYED)]))
        await found.close()

    asyncio.run(spoil_rows())
    code, out, _ = command("check")
    assert code == 1
    assert "key_without_job: key " in out
    assert out.splitlines()[-1].startswith("PROBLEMS")
    report = told("check", status=1)
    assert not report["ok"]
    assert {"code", "place", "text"} == set(report["problems"][0])
    mended = told("repair", f"sqlite://{store}", "file://new", status=1)
    assert mended["ok"]
    assert mended["mended"]
    assert told("check", "file://new")["ok"]


def test_a_damaged_store_is_one_sentence_and_78(store: Path) -> None:
    spoil(store, b"x" * 1000)
    before = hashes(store.parent)
    for arguments in (("copy", f"sqlite://{store}", "file://b"), ("backup", "saved")):
        code, out, err = command(*arguments)
        assert (code, out, err.count("\n")) == (78, "", 1), err
        assert "damaged" in err
    assert hashes(store.parent) == before
    code, out, _ = command("repair", f"sqlite://{store}", "sqlite://new.db")
    assert code == 1
    assert "lost: " in out
    assert "was not changed" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("info", "sqlite://none.db"), "there is no store at"),
        (("check", "file://none"), "there is no store in"),
        (("check", "sqlite://hub.toml"), "is not a SQLite database"),
        (("check", "nonsense"), "is no store that is installed here"),
        (("copy", "memory://", "file://b"), "MemoryStore does not offer this"),
        (("copy", "file://none", "memory://"), "MemoryStore does not offer this"),
        (("restore", "."), "is no backup"),
        (("compact", "sqlite://none.db"), "there is no store at"),
        (("repair", "file://none", "sqlite://b.db"), "none cannot be read"),
        (("backup", "hub.toml/x"), "cannot be written"),
        (("backup", "hub.toml"), "nothing is overwritten"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_78(arguments: tuple[str, ...], text: str, tmp_path: Path) -> None:
    asyncio.run(filled("sqlite", tmp_path / "a.db"))
    (tmp_path / "hub.toml").write_text("# nothing is set here\n")
    before = hashes(tmp_path)
    code, out, err = command(*arguments)
    assert (code, out, err.count("\n")) == (78, "", 1), err
    assert text in err
    assert hashes(tmp_path) == before
