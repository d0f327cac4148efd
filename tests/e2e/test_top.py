"""`sheratan-hub top`, `ready` and `completion` as they are used: on a terminal, in scripts, without a hub."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import Served
from tests.e2e.test_cli import Line


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    one = Served(tmp_path, SHERATAN_STORE_URL="memory://")
    one.start()
    yield one
    one.kill()


@pytest.fixture
def line(tmp_path: Path, served: Served) -> Line:
    return Line(tmp_path, served)


class Terminal:
    """A command on a terminal of so many columns."""

    def __init__(self, line: Line, columns: int, *words: str) -> None:
        self.master, slave = pty.openpty()
        environ = {**line.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "40"}
        command = [sys.executable, "-m", "sheratan_hub", *words]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environ, cwd=line.directory
        )
        os.close(slave)
        self.text = ""

    def until(self, words: str) -> str:
        """What it has shown until these words come anew."""
        start = len(self.text)
        while words not in self.text[start:]:
            assert select.select([self.master], [], [], 20)[0], self.text[start:]
            self.text += os.read(self.master, 65_536).decode()
        return self.text[start:]

    def rest(self) -> str:
        """What it shows until it ends."""
        start = len(self.text)
        try:
            while more := os.read(self.master, 65_536):
                self.text += more.decode()
        except OSError:  # nobody has the other end any more
            pass
        return self.text[start:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_top_on_a_terminal_lives_through_a_restart_and_leaves_a_clean_screen(
    line: Line, served: Served, number: signal.Signals
) -> None:
    terminal = Terminal(line, 60, "top", "--every", "0.2")
    try:
        terminal.until("0 pending")
        served.ask("POST", "/api/jobs", {"kind": "k"})
        terminal.until("1 pending")
        served.kill()
        terminal.until("AWAY")
        assert "1 pending" in terminal.until("AWAY")
        served.start()
        terminal.until("0 pending")
        terminal.process.send_signal(number)
        rest = terminal.rest()
        assert terminal.process.wait(timeout=20) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
    assert "Traceback" not in terminal.text
    assert rest.endswith("\x1b[?25h") or "\x1b[?1049l" in rest
    assert terminal.text.count("\x1b[?1049h") == terminal.text.count("\x1b[?1049l") == 1


def test_top_once_is_for_people_or_for_programs(line: Line, served: Served) -> None:
    served.ask("POST", "/api/jobs", {"kind": "k"})
    done = line("top", "--once", "--every", "0.2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 pending" in done.stdout
    assert "\x1b" not in done.stdout
    done = line("top", "--once", "--json", "--every", "0.2")
    shown = json.loads(done.stdout)
    assert (shown["jobs"]["pending"], shown["away"], shown["rates"]["submitted"]) == (1, None, 0)


def test_top_json_is_one_object_a_look(line: Line) -> None:
    command = [sys.executable, "-m", "sheratan_hub", "top", "--json", "--every", "0.2"]
    with subprocess.Popen(command, env=line.environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        looks = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    assert [look["health"]["control"] for look in looks] == ["ok"] * 3


def test_top_and_ready_say_what_keeps_them_from_a_hub(line: Line, served: Served) -> None:
    done = line("top", SHERATAN_HUB_TOKEN="wrong")
    assert (done.returncode, done.stdout) == (77, "")
    assert line("ready", SHERATAN_HUB_TOKEN="wrong").stdout == "ready\n"
    served.kill()
    for command in ("top", "ready"):
        done = line(command)
        assert (done.returncode, done.stdout) == (69, "")
        assert re.fullmatch(r"sheratan-hub: no answer from http://.*\n", done.stderr)


# Completion


@pytest.fixture
def bare(tmp_path: Path) -> Line:
    return Line(tmp_path)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_asks_the_command(bare: Line, shell: str) -> None:
    done = bare("completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_SHERATAN_HUB_COMPLETE={shell}_complete" in done.stdout
    assert "sheratan-hub" in done.stdout


def test_an_unknown_shell_is_refused(bare: Line) -> None:
    done = bare("completion", "cmd")
    assert done.returncode == 2
    assert "'bash', 'zsh', 'fish'" in done.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("sheratan-hub comp", "completion"), ("sheratan-hub jobs li", "list"), ("sheratan-hub serve --st", "--store")],
)
def test_bash_completes_with_the_script(bare: Line, typed: str, offered: str) -> None:
    """As bash does it: the script is read, then its function is called with what was typed."""
    script = bare("completion", "bash").stdout
    function = re.search(r"complete .*-F (\w+) sheratan-hub", script)
    assert function, script
    words = " ".join(f"'{word}'" for word in typed.split())
    place = len(typed.split()) - 1
    asked = f'COMP_WORDS=({words}); COMP_CWORD={place}; {function[1]} sheratan-hub; echo "${{COMPREPLY[@]}}"'
    bash = shutil.which("bash")
    assert bash
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        [bash, "--norc", "-c", f"{script}\n{asked}"],
        env={"PATH": path},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert offered in done.stdout.split(), done.stderr
