"""What only the file store has around its files: the folder, its lock, its format, `nodes_registry.json`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sheratan_hub.clock import VirtualClock
from sheratan_hub.storage import Changes, Key, Row, StoreRefused
from sheratan_stores.file import FileStore
from sheratan_stores.file_records import frame, read_all
from tests.conftest import lacking
from tests.stores.faults import add, failing, whole
from tests.stores.history import file_store, opened, quiet, save

pytestmark = pytest.mark.usefixtures("unsynced")

CHILD = Path(__file__).with_name("child.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture(autouse=True)
def import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


async def fill(folder: Path, *ids: str) -> None:
    store = file_store(folder)
    await store.open()
    for id in ids:
        await add(store, id, 300)
        await quiet(store)
    await store.close()


def everything(folder: Path) -> dict[str, Any]:
    """All that is there but the lock, which says who came last: contents, or where a link leads to."""
    return {
        str(path.relative_to(folder.parent)): path.read_bytes() if path.is_file() else path.is_dir()
        for path in sorted(folder.parent.rglob("*"))
        if path.name != "lock"
    }


async def refusal(folder: Path, place: Path | None = None) -> str:
    """The refusal's text: one sentence that names the place, and nothing has changed."""
    before = everything(folder)
    with pytest.raises(StoreRefused) as caught:
        await file_store(folder).open()
    assert str(place or folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert everything(folder) == before
    return str(caught.value)


@contextmanager
def child(mode: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has opened the store; killed at the end."""
    command = [sys.executable, str(CHILD), mode, f"file://{folder}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert heard(process) == "open"
            yield process
        finally:
            process.kill()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


async def until(clock: VirtualClock, condition: Callable[[], bool]) -> None:
    """Let time pass until this is so; no test waits for ever."""
    async with asyncio.timeout(30):
        while not condition():
            await clock.advance(1000)


# Lock


async def test_a_second_store_is_refused_naming_the_holder(folder: Path) -> None:
    clock = VirtualClock()
    store = file_store(folder, clock)
    await store.open()
    await until(clock, (folder / "nodes_registry.json").exists)
    await add(store, "a")
    text = await refusal(folder, folder / "lock")
    assert f"process {os.getpid()} on {os.uname().nodename} since 2023-11-14T" in text
    await whole(store, "a")
    await store.close()


async def test_the_lock_dies_with_its_process(folder: Path) -> None:
    with child("hold", folder) as process:
        with pytest.raises(StoreRefused, match=f"process {process.pid} "):
            await file_store(folder).open()
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        await fill(folder, "a")


async def test_a_child_of_a_killed_hub_does_not_keep_the_lock(folder: Path) -> None:
    with child("fork", folder) as process:
        orphan = int(heard(process))
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        os.kill(orphan, 0)
        await fill(folder, "a")


@pytest.mark.parametrize("content", [b"{", b"", b'{"pid": 1, "host": "\xff", "started": ""}', b"\xff\xfe"])
async def test_a_lock_file_without_sense_still_locks(folder: Path, content: bytes) -> None:
    clock = VirtualClock()
    store = file_store(folder, clock)
    await store.open()
    await until(clock, (folder / "nodes_registry.json").exists)
    (folder / "lock").write_bytes(content)
    assert "another process" in await refusal(folder)
    await store.close()


async def test_a_refused_open_leaves_the_lock_free(folder: Path) -> None:
    await fill(folder, "a")
    log = folder / "log-000000000001"
    content = log.read_bytes()
    log.write_bytes(content[:100])
    store = file_store(folder)
    for _ in range(2):
        with pytest.raises(StoreRefused, match="damaged"):
            await store.open()
    log.write_bytes(content)
    await store.open()
    await whole(store, "a")
    await store.close()


async def test_who_comes_second_does_not_make_anew_what_the_first_has_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find no store; before the second has the lock, the first has made one, worked and gone."""
    from sheratan_stores.lock import FileLock

    take = FileLock.take

    def late(lock: FileLock) -> None:
        monkeypatch.setattr(FileLock, "take", take)
        run = subprocess.run(
            [sys.executable, "-c", FIRST, str(CHILD.parents[2]), str(folder)],
            check=True,
            capture_output=True,
            text=True,
        )
        assert run.stdout == "done\n"
        take(lock)

    monkeypatch.setattr(FileLock, "take", late)
    store = file_store(folder)
    await store.open()
    await whole(store, "first")
    await store.close()


FIRST = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.stores.test_file_folder import fill
asyncio.run(fill(Path(sys.argv[2]), "first"))
print("done")
"""


# Place


async def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    store = file_store(tmp_path / "var" / "hub")
    await store.open()
    for n in range(40):
        await add(store, f"{n:02}", 300, kind="node" if n == 3 else "job")
    await quiet(store)
    await store.events()
    await store.close()
    modes = {path.name.partition("-")[0]: path.stat().st_mode & 0o777 for path in store.folder.iterdir()}
    names = ["lock", "store.json", "closed.json", "nodes_registry.json", "log", "snapshot", "events"]
    assert modes == dict.fromkeys(names, 0o600)
    assert store.folder.stat().st_mode & 0o777 == 0o700


async def test_the_path_is_taken_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a b%20?mode=ro#x", "é", "log-*", "[x]"):
        store = FileStore(f"file://{name}", VirtualClock())
        await store.open()
        await add(store, "a")
        await store.close()
        await store.open()
        await whole(store, "a")
        await store.close()
        assert (tmp_path / name / "store.json").is_file()


async def test_a_parent_that_is_missing_is_made(tmp_path: Path) -> None:
    await fill(tmp_path / "a" / "b" / "c", "a")
    assert len((await opened(tmp_path / "a" / "b" / "c"))[-1]) == 1


async def test_a_place_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is no folder" in await refusal(tmp_path / "file")
    assert "is no folder" in await refusal(tmp_path / "file" / "hub")
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be read" in await refusal(tmp_path / "loop")
    with pytest.raises(StoreRefused, match="/proc/nowhere cannot be made a store: No such file or directory"):
        await file_store(Path("/proc/nowhere")).open()
    assert "name too long" in await refusal(tmp_path / ("n" * 300))


@pytest.mark.parametrize(
    "name", ["notes.txt", "hub.db", "log-000000000001", "log-000000000002", "snapshot-000000000002"]
)
async def test_a_folder_with_other_things_is_refused(folder: Path, name: str) -> None:
    folder.mkdir()
    (folder / name).write_bytes(b"mine")
    assert "holds other things" in await refusal(folder)


async def test_a_store_without_its_mark_is_not_made_anew(folder: Path) -> None:
    await fill(folder, "a")
    (folder / "store.json").unlink()
    assert "holds other things" in await refusal(folder)
    for path in folder.iterdir():
        if path.name not in ("log-000000000001", "lock"):
            path.unlink()
    assert "holds other things" in await refusal(folder)


async def test_a_mark_that_leads_nowhere_is_no_missing_mark(folder: Path) -> None:
    await fill(folder, "a")
    (folder / "store.json").unlink()
    (folder / "store.json").symlink_to("nowhere")
    assert "cannot be read" in await refusal(folder, folder / "store.json")


async def test_a_folder_that_holds_the_hubs_logs_may_become_a_store(folder: Path) -> None:
    (folder / "logs").mkdir(parents=True)
    (folder / "lost+found").mkdir()
    await fill(folder, "a")
    assert (folder / "logs").is_dir()


async def test_what_others_put_beside_the_stores_files_stays(folder: Path) -> None:
    await fill(folder, "a")
    (folder / "mine.tmp").write_text("mine")
    (folder / "log-mine").write_text("mine")
    (folder / "events-1").write_text("mine")
    (folder / "dir.tmp").mkdir()
    await fill(folder, *(f"{n:02}" for n in range(40)))
    assert {path.name for path in folder.iterdir()} >= {"mine.tmp", "log-mine", "events-1", "dir.tmp"}


# Folders that may not be used


async def as_nobody(folder: Path) -> tuple[int, str]:
    """Opening it as a user who owns nothing: (exit status, what it says)."""
    if os.geteuid():
        lacking("only root can become another user")
    command = [sys.executable, "-c", NOBODY, str(CHILD.parents[2]), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.stderr == ""
    return run.returncode, run.stdout


NOBODY = """
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from sheratan_hub.storage import StoreRefused
from tests.stores.history import file_store
os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    asyncio.run(file_store(Path(sys.argv[2])).open())
except StoreRefused as refused:
    print(refused)
"""


@pytest.fixture
def in_the_open() -> Iterator[Path]:
    """A place for a store where everybody may go; pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        yield Path(place) / "hub"


@pytest.mark.parametrize(
    ("mode", "words"), [(0o700, "cannot be read: Permission denied"), (0o755, "cannot be locked: Permission denied")]
)
async def test_a_store_of_another_user_is_refused(in_the_open: Path, mode: int, words: str) -> None:
    folder = in_the_open
    await fill(folder, "a")
    folder.chmod(mode)
    (folder / "store.json").chmod(0o644)
    before = everything(folder)
    status, said = await as_nobody(folder)
    assert (status, said.count("\n")) == (0, 1)
    assert str(folder) in said
    assert words in said
    assert everything(folder) == before


async def test_a_folder_that_may_not_be_made_is_refused(in_the_open: Path) -> None:
    folder = in_the_open
    _, said = await as_nobody(folder)
    assert said == f"{folder} cannot be made a store: Permission denied\n"
    folder.mkdir()
    _, said = await as_nobody(folder)
    assert said == f"{folder / 'lock'} cannot be locked: Permission denied\n"
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["log-000000000001", "snapshot-", "events-", "closed.json", "store.json"])
async def test_a_file_that_cannot_be_read_is_named(in_the_open: Path, name: str) -> None:
    folder = in_the_open
    ids = ["a"] if name == "log-000000000001" else [f"{n:02}" for n in range(60)]
    await fill(folder, *ids)
    for path in (folder, *folder.iterdir()):
        os.chown(path, 65534, 65534)
    (path,) = folder.glob(f"{name}*")
    path.chmod(0)
    _, said = await as_nobody(folder)
    assert said.endswith(" cannot be read: Permission denied\n")
    assert str(path) in said


async def test_a_read_only_disk_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        lacking("only root can mount a read-only disk")
    try:
        await fill(place / "hub", "a")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        assert "Read-only file system" in await refusal(place / "hub")
        assert "Read-only file system" in await refusal(place / "new")
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("function", ["pwrite", "ftruncate", "fdatasync", "unlink"])
async def test_a_store_that_cannot_be_written_when_it_is_opened_is_refused(folder: Path, function: str) -> None:
    await fill(folder, "a")
    with failing(function, str(folder), but="lock"):
        assert "cannot be written" in await refusal(folder)
    assert len((await opened(folder))[-1]) == 1


@pytest.mark.parametrize("function", ["open", "pwrite", "fsync", "replace"])
async def test_a_store_that_cannot_be_made_leaves_nothing(folder: Path, function: str) -> None:
    folder.mkdir()
    for left in range(1, 4):
        with failing(function, str(folder), but="lock", left=left):
            assert "cannot be made a store: Input/output error" in await refusal(folder)
    await fill(folder, "a")


# Format


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the JSON of the first record of a file, as a newer version would write it; of the same length."""
    content = path.read_bytes()
    head = next(read_all(content, path.name))
    payload = msgspec.json.decode(head.payload)
    change(payload)
    record = frame(msgspec.json.encode(payload), path.name, 0, 0)
    assert len(record) == head.end
    path.write_bytes(record + content[head.end :])


@pytest.mark.parametrize("name", ["store.json", "log-", "snapshot-"])
async def test_a_newer_format_is_refused_untouched(folder: Path, name: str) -> None:
    await fill(folder, *(f"{n:02}" for n in range(60)))
    path = max(folder.glob(f"{name}*"))
    if name == "store.json":
        path.write_text('{"store":"file","format":9,"more":[1]}')
    else:
        rewritten(path, lambda head: head.update(format=9))
    text = await refusal(folder, path)
    assert "format 9" in text
    assert "up to 1" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged"),
        (b"{", "damaged"),
        (b"[]", "damaged"),
        (b'{"store":"file"}', "damaged"),
        (b'{"store":"f\xffle","format":1}', "damaged"),
        (b'{"store":"file","format":"1"}', "damaged"),
        (b'{"store":"other","format":1}', "another kind: other"),
    ],
)
async def test_a_mark_without_sense_is_refused(folder: Path, content: bytes, words: str) -> None:
    await fill(folder, "a")
    (folder / "store.json").write_bytes(content)
    assert words in await refusal(folder)


@pytest.mark.parametrize("content", [b"", b"\xff", b'{"log":1}', b'{"log":1,"end":99}', b'{"log":2,"end":70}'])
async def test_a_log_that_ends_elsewhere_than_when_it_was_closed_is_refused(folder: Path, content: bytes) -> None:
    await fill(folder, "a")
    (folder / "closed.json").write_bytes(content)
    assert "damaged" in await refusal(folder)


async def test_a_log_with_its_end_zeroed_since_it_was_closed_is_refused(folder: Path) -> None:
    store = file_store(folder)
    await store.open()
    await add(store, "a")
    size = store._log.end
    await add(store, "b")
    await store.close()
    log = folder / "log-000000000001"
    log.write_bytes(log.read_bytes()[:size] + bytes(1024 - size))
    text = await refusal(folder, log)
    assert f"ends in it at byte {size}" in text
    (folder / "closed.json").unlink()
    assert len((await opened(folder))[-1]) == 1


async def test_pieces_that_are_missing_are_named(folder: Path) -> None:
    await fill(folder, *(f"{n:02}" for n in range(60)))
    logs = sorted(folder.glob("log-*"))
    (snapshot,) = folder.glob("snapshot-*")
    (events,) = folder.glob("events-*")
    for gone in ([logs[0]], [snapshot], logs, [events]):
        contents = {path: path.read_bytes() for path in gone}
        for path in gone:
            path.unlink()
        missing = folder / "log-000000000001" if gone == [snapshot] else logs[0]
        text = await refusal(folder, folder if gone == [events] else missing)
        assert "missing" in text
        for path, content in contents.items():
            path.write_bytes(content)
    assert len((await opened(folder))[-1]) == 60


async def test_what_stands_behind_a_seal_is_damage(folder: Path) -> None:
    """A record that was acknowledged, if somebody had written it there."""
    await fill(folder, *(f"{n:02}" for n in range(8)))
    sealed, *_ = sorted(folder.glob("log-*"))
    content = sealed.read_bytes()
    end = [record.end for record in read_all(content, sealed.name)][-1]
    record = frame(b"\x90", sealed.name, end, end)
    sealed.write_bytes((content[:end] + record).ljust(len(content), b"\0"))
    assert f"something follows its end at byte {end}" in await refusal(folder, sealed)


async def test_a_ledger_that_lacks_lines_says_which(folder: Path) -> None:
    await fill(folder, *(f"{n:02}" for n in range(60)))
    (events,) = folder.glob("events-*")
    content = events.read_bytes()
    third = [record.at for record in read_all(content, events.name)][2]
    events.write_bytes(content[: third + 5] + b"?" + content[third + 6 :])
    text = await refusal(folder, events)
    assert f"at byte {third} is damaged: the events from number 3 to " in text


async def test_what_a_log_says_of_its_events_fits_together(folder: Path) -> None:
    """A record that is whole and in its place, but not one that this log can have."""
    await fill(folder, "a")
    log = folder / "log-000000000001"
    content = log.read_bytes()
    last = list(read_all(content, log.name))[-1]
    batch = msgspec.msgpack.decode(last.payload)
    assert batch[3] == 1
    batch[3] = 5
    log.write_bytes(
        content[: last.at] + frame(msgspec.msgpack.encode(batch), log.name, last.at, 0) + content[last.end :]
    )
    assert "event 1 is missing" in await refusal(folder)
    log.write_bytes(content[: last.at] + frame(b"\xc1" * len(last.payload), log.name, last.at, 0) + content[last.end :])
    assert f"the record at byte {last.at}" in await refusal(folder, log)


# The registry


async def heartbeat(store: FileStore, id: str, doc: bytes) -> None:
    key = Key("node", id)
    found = await store.fetch([key])
    row = Row(*key, doc)
    await save(store, Changes(put=[row] if found else [], new=[] if found else [row]), durable=False)


def registry(folder: Path) -> dict[str, Any]:
    """What stands in it: whole JSON, whenever one looks."""
    path = folder / "nodes_registry.json"
    nodes: dict[str, Any] = json.loads(path.read_text())["nodes"] if path.exists() else {}
    return nodes


async def test_the_registry_follows_heartbeats(folder: Path) -> None:
    clock = VirtualClock()
    store = file_store(folder, clock)
    await store.open()
    for n in range(3):
        await heartbeat(store, "a", b'{"status":"online","n":%d}' % n)
        await heartbeat(store, "b", b"\xff no JSON")
        expected = {"a": {"status": "online", "n": n}, "b": "\ufffd no JSON"}
        await until(clock, lambda expected=expected: registry(folder) == expected)
    await save(store, Changes(gone=[Key("node", "b")]))
    await add(store, "job")
    await until(clock, lambda: set(registry(folder)) == {"a"})
    await heartbeat(store, "c", b"12345678901234567890123456789012345678901234567890")
    await heartbeat(store, "d", b"[" * 5000)
    await store.close()
    assert set(registry(folder)) == {"a", "c", "d"}, "closing writes what is left"


async def test_the_registry_is_written_behind_many_changes_not_at_each(folder: Path) -> None:
    clock = VirtualClock()
    store = file_store(folder, clock)
    await store.open()
    await until(clock, (folder / "nodes_registry.json").exists)
    with failing("replace", "nodes_registry.json", left=0) as counted:
        for n in range(50):
            await heartbeat(store, "a", b"%d" % n)
        assert counted.calls <= 1
    await store.close()
    assert registry(folder) == {"a": 49}


async def test_a_registry_that_was_removed_comes_back_and_is_never_read(folder: Path) -> None:
    store = file_store(folder)
    await store.open()
    await heartbeat(store, "a", b"{}")
    await store.close()
    path = folder / "nodes_registry.json"
    for content in (None, b"", b'{"nodes": {"evil": {}}}', b"\xff"):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        await store.open()
        page = await store.page("node")
        assert [row.id for row in page.rows] == ["a"]
        await store.close()
        assert registry(folder) == {"a": {}}


@pytest.mark.parametrize("function", ["open", "pwrite", "fsync", "replace"])
async def test_a_registry_that_cannot_be_written_is_only_logged(
    folder: Path, function: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock = VirtualClock()
    store = file_store(folder, clock)
    await store.open()
    await heartbeat(store, "a", b"1")
    await until(clock, lambda: registry(folder) == {"a": 1})
    with failing(function, "nodes_registry.json") as failed, caplog.at_level(logging.WARNING):
        for n in range(2):
            calls = failed.calls
            await heartbeat(store, "a", b"%d" % n)
            await until(clock, lambda calls=calls: failed.calls > calls)
        assert registry(folder) == {"a": 1}, "whole or not at all"
        assert not (folder / "nodes_registry.json.tmp").exists()
    said = [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()]
    assert len(said) == 1
    assert str(folder / "nodes_registry.json") in said[0]
    await heartbeat(store, "a", b"9")
    await store.close()
    assert registry(folder) == {"a": 9}
