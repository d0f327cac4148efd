"""What `make test` calls: it must see failures, tests that hang, and suites that take too long."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tools import suites

FINE = "def test_it(): pass\n"
BROKEN = "def test_other(): assert False\n"
HANGING = "import threading\ndef test_it(): threading.Event().wait()\n"


@pytest.fixture(autouse=True)
def _in_a_project_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(sys, "argv", ["suites.py"])
    monkeypatch.setattr(suites, "install_tools", lambda: None)
    (tmp_path / "tests").mkdir()


def put(suite: str, text: str) -> None:
    folder = Path("tests") / suite
    folder.mkdir()
    (folder / f"test_{suite}.py").write_text(text)


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    return capfd.readouterr().out.splitlines()[-1]


def test_the_last_line_sums_up_all_suites(capfd: pytest.CaptureFixture[str]) -> None:
    put("rules", FINE)
    put("hub", FINE + BROKEN)
    (Path("tests") / "web").mkdir()
    assert suites.main() == 1
    assert last_line(capfd) == "2 passed, 1 failed"


def test_all_passed_is_success(capfd: pytest.CaptureFixture[str]) -> None:
    put("rules", FINE)
    assert suites.main() == 0
    assert last_line(capfd) == "1 passed, 0 failed"


LEAKING = """
import logging, subprocess, sys
from tools import canaries
canaries.keep_outputs()
def test_it(tmp_path):
    {}
"""


@pytest.mark.parametrize(
    "leak",
    [
        "(tmp_path / 'log').write_text(canaries.HMAC.encode().hex())",
        "subprocess.run([sys.executable, '-c', 'from tools.canaries import *; print(ACTIVE)'], capture_output=True)",
    ],
)
def test_a_secret_that_is_left_behind_is_a_failure(
    leak: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(suites.__file__).parents[1]))
    put("rules", LEAKING.format(leak))
    assert suites.main() == 1
    said = capfd.readouterr().out
    assert "SECRET: " in said
    for line in said.splitlines():
        if line.startswith("SECRET: "):
            shutil.rmtree("/".join(line.partition(" in ")[2].split("/")[:3]), ignore_errors=True)


def test_a_secret_in_a_file_of_its_own_is_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(suites.__file__).parents[1]))
    put("rules", LEAKING.format("(tmp_path / 'token').write_text(canaries.ACTIVE)"))
    assert suites.main() == 0


def test_bytecode_is_kept_even_where_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    put("rules", "import sys\ndef test_it(): assert not sys.dont_write_bytecode\n")
    assert suites.main() == 0


def test_no_test_at_all_is_a_failure() -> None:
    assert suites.main() == 1


def test_a_suite_that_cannot_be_read_is_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    put("rules", FINE)
    put("hub", "import nothing_of_this_name\n")
    assert suites.main() == 1
    assert last_line(capfd) == "1 passed, 1 failed"


def test_options_of_pytest_may_leave_a_suite_without_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    put("rules", FINE)
    put("hub", FINE.replace("test_it", "test_other"))
    monkeypatch.setattr(sys, "argv", ["suites.py", "-k", "test_other"])
    assert suites.main() == 0


def test_a_suite_over_its_budget_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suites, "BUDGETS", {"rules": 2.0})
    put("rules", FINE)
    moments = iter((0.0, 2.5))
    monkeypatch.setattr(suites, "now", lambda: next(moments))
    assert suites.main() == 1
    assert "over its budget of 2.0 s" in capfd.readouterr().out


def test_a_suite_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(suites, "BUDGETS", {"rules": 0.5})
    put("rules", HANGING)
    assert suites.main() == 1
    assert "over its budget of 0.5 s" in capfd.readouterr().out


def test_a_suite_without_a_budget_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    put("strange", FINE)
    assert suites.main() == 1
    assert "strange" in capfd.readouterr().out
