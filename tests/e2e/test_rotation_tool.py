"""`make rotation`: it runs, would notice a refusal, leaves nothing behind, and the how-to tells the same story."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import ended, left_in
from tools import rotation

ROOT = Path(rotation.__file__).parents[1]


@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_a_live_fleets_token_is_turned_without_a_refused_request(tmp_path: Path, store: str) -> None:
    with subprocess.Popen(
        [sys.executable, rotation.__file__, "--store", store, "--window", "8"],
        env={**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        said = process.communicate(timeout=80)[0]
    assert process.returncode == 0, said
    assert re.search(r"[0-9]{2,} requests of 3 producers, 0 refused", said)
    assert re.search(r"[0-9]{2,} jobs by 3 workers, 0 lost or tried again", said)
    assert "nobody was refused, and the old one is now" in said
    assert list(tmp_path.iterdir()) == []
    assert all(ended(pid) for pid in left_in(tmp_path))


def test_the_how_to_tells_to_do_what_it_does() -> None:
    how_to = (ROOT / "docs/howto.md").read_text().partition("### Rotate the token\n")[2].partition("\n### ")[0]
    how_to = " ".join(how_to.split())
    for step in (
        "sheratan-hub tokens rotate --until",
        "`sheratan-hub tokens status`",
        "--token-file FILE worker MODULE",
    ):
        assert step in how_to, step
    done = Path(rotation.__file__).read_text()
    for step in (
        '"tokens", "rotate", "--until"',
        '"--to"',
        '"tokens", "status"',
        '"--token-file"',
        "SHERATAN_HUB_TOKEN",
    ):
        assert step in done, step
    assert "make rotation" in how_to


JOB = {"status": "completed", "losses": 0, "failures": 0}
FINE = rotation.Counted(
    [rotation.Told(1.0, 201, "")],
    [JOB],
    Counter(AUTH_FAILURE=1, TOKEN_RETIRED=1, TOKEN_ROTATION_FINALIZED=1, TOKEN_ACCEPTED_OLD=9, TOKEN_ACCEPTED_NEXT=9),
    [200],
    [(403, "old_token")],
    "",
    (["a", "b", "c"], []),
    0,
)


def test_the_verdict_is_good_when_nobody_was_refused() -> None:
    assert rotation.verdict(FINE) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"told": [rotation.Told(1.0, 403, "invalid_token")]},
        {"told": [rotation.Told(1.0, 503, "unavailable")]},
        {"audit": FINE.audit + Counter(AUTH_FAILURE=1)},
        {"audit": FINE.audit - Counter(TOKEN_RETIRED=1)},
        {"audit": FINE.audit + Counter(TOKEN_ROTATION_FINALIZED=1)},
        {"missed": 1},
        {"audit": FINE.audit - Counter(TOKEN_ACCEPTED_OLD=9)},
        {"kept": [200, 403]},
        {"kept": []},
        {"probes": [(200, "")]},
        {"jobs": []},
        {"jobs": [{**JOB, "losses": 1}]},
        {"said": "AUTH_FAIL heartbeat: this token is not valid here"},
        {"locked_out": (["a", "b", "c"], ["a"])},
        {"locked_out": ([], [])},
    ],
)
def test_the_verdict_is_bad_for_anything_that_is_wrong(wrong: dict[str, Any]) -> None:
    assert rotation.verdict(FINE._replace(**wrong)) == 1
