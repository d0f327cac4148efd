"""The bundle as a file: the same members make the same bytes, each within its bounds; nothing else is overwritten."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest

from sheratan_hub.bundle import MANIFEST, MEMBER_BYTES, Member, Members, canonical, put, read_member, stamp, zipped
from sheratan_hub.redact import Redactor


def members(*names: str) -> list[Member]:
    made = Members(Redactor())
    for name in names:
        made.json(f"{name}.json", {"b": 1, "a": [name, 1.5, None], "ä": "ß"})
    return made.sealed({"as_of": "then"})


def manifest(of: list[Member]) -> dict[str, object]:
    told: dict[str, object] = json.loads(next(one for one in of if one.name == MANIFEST).data)
    return told


def test_the_order_in_which_members_are_made_does_not_matter() -> None:
    data = zipped(members("x", "a", "m"))
    assert data == zipped(members("m", "x", "a"))
    with zipfile.ZipFile(io.BytesIO(data)) as bundle:
        assert bundle.namelist() == ["a.json", "m.json", MANIFEST, "x.json"]
        assert {info.date_time for info in bundle.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert bundle.read("a.json") == '{"a":["a",1.5,null],"b":1,"ä":"ß"}'.encode()


def test_the_manifest_proves_every_other_member() -> None:
    made = members("a", "b")
    listed = manifest(made)["members"]
    assert listed == [
        {
            "name": one.name,
            "bytes": len(one.data),
            "sha256": hashlib.sha256(one.data).hexdigest(),
            "cut": False,
            "error": False,
        }
        for one in made
        if one.name != MANIFEST
    ]


def test_what_is_too_large_is_cut_and_this_is_told() -> None:
    made = Members(Redactor())
    made.json("large.json", ["x" * 1000] * 2000)
    made.lines("log.jsonl", [{"n": n, "text": "x" * 10_000} for n in range(200)])
    made.text("metrics.txt", "sheratan_x 1\n" * 100_000)
    made.json("small.json", {})
    sealed = {one.name: one for one in made.sealed({})}
    assert {name for name, one in sealed.items() if one.cut} == {"large.json", "log.jsonl", "metrics.txt"}
    assert all(len(one.data) <= MEMBER_BYTES for one in sealed.values())
    assert json.loads(sealed["large.json"].data)["cut"]
    lines = [json.loads(line) for line in sealed["log.jsonl"].data.splitlines()]
    assert (lines[-1]["n"], lines[0]["n"]) == (199, 200 - len(lines)), "the newest stay"
    assert sealed["metrics.txt"].data.endswith(b"sheratan_x 1\n")


def test_the_last_look_finds_what_slipped_through() -> None:
    made = Members(Redactor(["a-known-secret"]))
    made.json("x.json", {"a-known-secret": ["a-known-secret"]})
    assert b"a-known-secret" not in zipped(made.sealed({}))
    assert json.loads(made.sealed({})[1].data) == {"***": ["***"]}


def test_what_is_no_unicode_can_be_told() -> None:
    assert canonical({"a": "\ud800"}) == b'{"a":"\\ud800"}'


def test_a_bundle_replaces_only_a_bundle(tmp_path: Path) -> None:
    data, target = zipped(members("a")), tmp_path / "b.zip"
    assert put(data, str(target), "now") == target
    assert put(zipped(members("b")), str(target), "now") == target
    assert read_member(target.read_bytes(), "b.json")["b"] == 1
    for name, text in (("mine.txt", b"mine"), ("hub.db", b"SQLite format 3\0")):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(FileExistsError):
            put(data, str(tmp_path / name), "now")
        assert (tmp_path / name).read_bytes() == text
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("x", "y")
    with pytest.raises(FileExistsError):
        put(data, str(tmp_path / "other.zip"), "now")
    (tmp_path / "empty").touch()
    assert put(data, str(tmp_path / "empty"), "now").stat().st_size == len(data)


def test_in_a_directory_each_has_a_name_of_its_own(tmp_path: Path) -> None:
    when = stamp(1_795_257_067_412)
    names = [put(b"x", str(tmp_path), when).name for _ in range(3)]
    assert names == [f"diag_bundle_20261121T103107Z{end}.zip" for end in ("", "_2", "_3")]


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        put(b"x", str(tmp_path), "now")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle_is_not_read_as_one() -> None:
    for data in (b"", b"not a zip", zipped([Member("x", b"{}")])):
        with pytest.raises(ValueError, match="no bundle"):
            read_member(data, MANIFEST)
