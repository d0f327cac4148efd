"""Logs: one JSON line a record, in the right file, readable by nobody else, whatever the text holds."""

import asyncio
import json
import logging
import stat
from pathlib import Path

import pytest

from sheratan_hub import log
from sheratan_hub.config import BadConfig, LogSettings, Settings


@pytest.fixture
def lines(tmp_path):
    """Reads what a plane's file holds, after logs were set up with the defaults."""
    end = log.setup(Settings(), tmp_path)
    yield lambda plane: [
        json.loads(line) for line in (tmp_path / "logs" / f"hub_{plane}.jsonl").read_text().splitlines()
    ]
    end()


def test_a_record_is_one_json_object_with_its_extra_fields(lines):
    logging.getLogger("sheratan.data").info("job %s", "j1", extra={"data": {"job_id": "j1", "ms": 3}})
    (line,) = lines("data")
    assert line.pop("ts").endswith("Z")
    assert line == {"level": "info", "logger": "sheratan.data", "event": "job j1", "job_id": "j1", "ms": 3}


def test_ts_is_rfc_3339_with_milliseconds():
    record = logging.makeLogRecord({"created": 1_700_000_000.25, "msg": "x"})
    assert json.loads(log.JsonFormatter().format(record))["ts"] == "2023-11-14T22:13:20.250Z"


def test_each_plane_has_its_file_and_the_engine_is_in_both(lines):
    for name in ("sheratan.control.web", "sheratan.data", "sheratan", "sheratan.database", "asyncio"):
        logging.getLogger(name).warning(name)
    assert [line["event"] for line in lines("control")] == [
        "sheratan.control.web",
        "sheratan",
        "sheratan.database",
        "asyncio",
    ]
    assert [line["event"] for line in lines("data")] == ["sheratan.data", "sheratan", "sheratan.database", "asyncio"]


@pytest.mark.parametrize(
    "sign",
    ["\n", "\r", "\x00", "\x1b", "\x7f", "\x85", "\u2028", "\u2029", "\ud800", "\u202e"],
    ids=lambda sign: f"U+{ord(sign):04X}",
)
def test_no_sign_can_break_a_line_or_reach_a_terminal(lines, tmp_path, sign, capsys, pytestconfig):
    text = f"a{sign}b"
    logging.getLogger("sheratan.data").warning(text, extra={"data": {"name": text}})
    raw = (tmp_path / "logs" / "hub_data.jsonl").read_bytes()
    assert all(32 <= byte < 127 for byte in raw.removesuffix(b"\n"))
    assert lines("data")[0]["event"] == lines("data")[0]["name"] == text
    shown = capsys.readouterr().err
    assert shown.startswith("WARNING sheratan.data: a")
    assert shown.removesuffix("\n").isprintable()
    # pytest's own record of it goes to another process, which a lone surrogate cannot
    pytestconfig.pluginmanager.get_plugin("logging-plugin").report_handler.reset()


def test_fields_cannot_replace_what_every_line_has(lines):
    logging.getLogger("sheratan").info("real", extra={"data": {"event": "forged", "level": "none"}})
    assert lines("data")[0]["event"] == "real"
    assert lines("data")[0]["level"] == "info"


@pytest.mark.parametrize("data", [{"x": float("nan")}, {(1, 2): 3}, ["no mapping"]])
def test_fields_that_are_not_json_are_still_written(lines, data):
    logging.getLogger("sheratan").info("odd", extra={"data": data})
    assert lines("data")[0]["data"] == repr(data)


def test_fields_that_json_does_not_know_are_written_as_text(lines, tmp_path):
    logging.getLogger("sheratan").info("path", extra={"data": {"path": tmp_path}})
    assert lines("data")[0]["path"] == str(tmp_path)


def test_a_traceback_is_one_field(lines):
    try:
        raise ValueError("no\nway")
    except ValueError:
        logging.getLogger("sheratan.control").exception("broken")
    (line,) = lines("control")
    assert line["exception"].startswith("Traceback")
    assert "ValueError: no\nway" in line["exception"]


def test_lines_carry_the_request_id_while_it_is_set(lines):
    token = log.request_id.set("r1")
    logging.getLogger("sheratan").info("inside")
    log.request_id.reset(token)
    logging.getLogger("sheratan").info("outside")
    assert [line.get("request_id") for line in lines("data")] == ["r1", None]


def test_only_warnings_reach_stderr_and_as_one_short_line(lines, capsys):
    logging.getLogger("sheratan.data").info("quiet")
    logging.getLogger("sheratan.data").error("loud\nforged", exc_info=ValueError("why"))
    assert capsys.readouterr().err == "ERROR sheratan.data: loud\\nforged (ValueError: why)\n"


def test_files_and_directories_are_for_their_owner_only(tmp_path):
    logs = tmp_path / "state" / "logs"
    logs.mkdir(parents=True, mode=0o755)
    (logs / "hub_data.jsonl").touch(0o644)
    log.setup(Settings(), tmp_path / "state")()
    assert stat.S_IMODE(logs.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in logs.iterdir()} == {0o600}
    assert sorted(file.name for file in logs.iterdir()) == ["hub_control.jsonl", "hub_data.jsonl"]


def test_earlier_lines_are_kept_and_a_second_setup_writes_each_line_once(tmp_path):
    log.setup(Settings(), tmp_path)
    logging.getLogger("sheratan").info("first")
    end = log.setup(Settings(), tmp_path)
    logging.getLogger("sheratan").info("second")
    end()
    assert len((tmp_path / "logs" / "hub_data.jsonl").read_text().splitlines()) == 2


def test_a_file_moved_away_is_made_again(lines, tmp_path):
    logging.getLogger("sheratan").info("before")
    (tmp_path / "logs" / "hub_data.jsonl").rename(tmp_path / "old")
    logging.getLogger("sheratan").info("after")
    assert [line["event"] for line in lines("data")] == ["after"]


def test_a_lost_directory_is_said_on_stderr_and_stops_nobody(lines, tmp_path, capsys):
    (tmp_path / "logs").rename(tmp_path / "gone")
    logging.getLogger("sheratan.data").info("lost")
    assert "ERROR cannot write" in capsys.readouterr().err


def test_a_full_disk_is_said_on_stderr_and_the_end_is_an_end(tmp_path, capsys):
    end = log.setup(Settings(), tmp_path)
    (file,) = [one for one in logging.getLogger("sheratan").handlers if "hub_data" in str(one)]
    file.setStream(open("/dev/full", "a")).close()  # noqa: SIM115 - the handler closes it
    file.reopenIfNeeded = lambda: None
    logging.getLogger("sheratan.data").info("lost")
    assert "No space left on device" in capsys.readouterr().err
    end()
    assert capsys.readouterr().err == ""


def test_logs_that_cannot_be_written_stop_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadConfig, match=r"hub\.data_dir: logs cannot be written to .*: "):
        log.setup(Settings(), tmp_path / "file")


def test_the_level_is_the_configured_one(tmp_path):
    end = log.setup(Settings(log=LogSettings(level="warning")), tmp_path)
    logging.getLogger("sheratan.data").info("quiet")
    logging.getLogger("sheratan.data").warning("loud")
    end()
    (line,) = (tmp_path / "logs" / "hub_data.jsonl").read_text().splitlines()
    assert json.loads(line)["event"] == "loud"


def test_an_error_of_a_server_keeps_its_traceback_and_its_chatter_is_dropped(lines):
    logger = logging.getLogger("aiohttp.server")
    logger.info("Ignored premature client disconnection")
    logger.error("Error handling request from %s", "192.0.2.7", exc_info=KeyError("x"))
    (line,) = lines("data")
    assert "KeyError" in line["exception"]


async def test_an_error_that_asyncio_reports_is_written(lines):
    asyncio.get_running_loop().call_exception_handler({"message": "task was lost"})
    assert [line["event"] for line in lines("control")] == ["task was lost"]


def test_a_full_log_is_moved_away_and_the_oldest_is_forgotten(tmp_path):
    end = log.setup(Settings(log=LogSettings(max_bytes=1000, keep_files=2)), tmp_path)
    for number in range(60):
        logging.getLogger("sheratan.data").info("line %d", number)
    end()
    files = [tmp_path / "logs" / f"hub_data.jsonl{ending}" for ending in (".2", ".1", "")]
    kept = [json.loads(line)["event"] for file in files for line in file.read_text().splitlines()]
    assert kept == [f"line {number}" for number in range(60 - len(kept), 60)]
    assert {path.name for path in (tmp_path / "logs").glob("hub_data*")} == {file.name for file in files}
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert file.stat().st_size < 1100
    assert files[1].stat().st_size >= 1000


def test_a_log_that_is_moved_while_a_line_is_written_loses_no_line(tmp_path, monkeypatch, capsys):
    file, moved = (tmp_path / "logs" / name for name in ("hub_data.jsonl", "moved"))
    end = log.setup(Settings(log=LogSettings(max_bytes=1000)), tmp_path)
    look = log.PlaneFile.reopenIfNeeded

    def look_too_early(handler) -> None:
        look(handler)
        if handler.baseFilename == str(file) and not moved.exists():
            file.rename(moved)

    monkeypatch.setattr(log.PlaneFile, "reopenIfNeeded", look_too_early)
    for number in range(2):
        logging.getLogger("sheratan.data").info("line %d", number)
    end()
    assert capsys.readouterr().err == ""
    assert [json.loads(one.read_text())["event"] for one in (moved, file)] == ["line 0", "line 1"]


def test_a_log_without_a_bound_is_never_moved(tmp_path):
    end = log.setup(Settings(log=LogSettings(max_bytes=0)), tmp_path)
    for number in range(60):
        logging.getLogger("sheratan.data").info("line %d", number)
    end()
    assert [path.name for path in (tmp_path / "logs").glob("hub_data*")] == ["hub_data.jsonl"]


def test_a_log_that_cannot_be_moved_grows_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    def refuse(path: Path, _keep: int) -> None:
        raise PermissionError(13, "not here")

    monkeypatch.setattr(log, "shift", refuse)
    end = log.setup(Settings(log=LogSettings(max_bytes=200)), tmp_path)
    for number in range(20):
        logging.getLogger("sheratan.data").info("line %d", number)
    end()
    assert len((tmp_path / "logs" / "hub_data.jsonl").read_text().splitlines()) == 20
    assert capsys.readouterr().err.count("cannot rotate") == 1


def test_logs_that_cannot_be_opened_leave_those_that_are_written(lines, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "logs").write_text("a file")
    with pytest.raises(BadConfig):
        log.Logs(Settings(), tmp_path / "other")
    logging.getLogger("sheratan.data").info("still here")
    assert [line["event"] for line in lines("data")] == ["still here"]
