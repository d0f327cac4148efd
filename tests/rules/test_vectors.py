"""The vectors that other languages are given: right by themselves, by our own code, and by a script in JavaScript."""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.canonical import canonical, payload_sha256, result_sha256, result_sig, result_text
from sheratan_hub.rules.integrity import Demand, Proof, check_result

FOLDER = Path(__file__).parents[1] / "vectors"
VECTORS = json.loads((FOLDER / "integrity.json").read_text())
RESULTS, PAYLOADS, KEY = VECTORS["results"], VECTORS["payloads"], VECTORS["key"]

each_result = pytest.mark.parametrize("vector", RESULTS, ids=lambda vector: vector["name"])
each_payload = pytest.mark.parametrize("vector", PAYLOADS, ids=lambda vector: vector["name"])


def covered(vector: Any) -> tuple[str, bool, bytes, bytes]:
    return vector["job_id"], vector["ok"], vector["result"].encode(), vector["error"].encode()


@each_result
def test_a_results_vector_is_what_pythons_json_and_hashlib_make_of_it(vector: Any) -> None:
    """Without our own code: the contract names this form."""
    parts = {name: vector[name] for name in ("job_id", "ok")}
    parts |= {name: json.loads(vector[name]) for name in ("result", "error")}
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert text == vector["canonical"]
    assert hashlib.sha256(text.encode()).hexdigest() == vector["sha256"]
    assert hmac.new(KEY.encode(), text.encode(), hashlib.sha256).hexdigest() == vector["sig"]


@each_result
def test_the_hub_and_its_client_come_to_a_results_vector(vector: Any) -> None:
    given = covered(vector)
    assert result_text(*given).decode() == vector["canonical"]
    assert result_sha256(*given) == vector["sha256"]
    assert result_sig(KEY, *given) == vector["sig"]
    assert check_result(*given, Proof("sha256", vector["sha256"]), Demand("sha256", required=True))
    assert check_result(*given, Proof("hmac", None, vector["sig"]), Demand("hmac", required=True, key=KEY))


@each_payload
def test_a_payloads_vector_is_what_an_idempotency_key_is_bound_to(vector: Any) -> None:
    whole = {"kind": vector["kind"], "params": json.loads(vector["params"])}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert text == vector["canonical"]
    assert payload_sha256(vector["kind"], vector["params"].encode()) == vector["sha256"]
    assert hashlib.sha256(text.encode()).hexdigest() == vector["sha256"]


@pytest.mark.parametrize("vector", [*RESULTS, *PAYLOADS], ids=lambda vector: vector["name"])
def test_what_is_canonical_stays_as_it_is(vector: Any) -> None:
    text = vector["canonical"].encode()
    assert canonical(text) == text


def test_the_vectors_hold_what_is_hard() -> None:
    told = "".join(vector["canonical"] for vector in RESULTS)
    hard = [
        "1.0",
        "1e+16",
        "1e-07",
        "5e-324",
        "1.7976931348623157e+308",
        "0.1",
        "-0.0",
        "{}",
        "[]",
        "null",
        "\U0001f600",
    ]
    hard += [str(number) for number in (2**53, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1)]
    assert [one for one in hard if one not in told] == []
    assert len({vector["name"] for vector in [*RESULTS, *PAYLOADS]}) == len(RESULTS) + len(PAYLOADS)
    assert len({vector["sha256"] for vector in RESULTS}) > len(RESULTS) * 0.9


@pytest.mark.parametrize("vector", [*RESULTS, *PAYLOADS], ids=lambda vector: vector["name"])
def test_what_a_vector_needs_is_what_its_numbers_are(vector: Any) -> None:
    texts = [vector[name] for name in ("result", "error", "params") if name in vector]
    found = [number for text in texts for number in numbers(json.loads(text))]
    floats = {"floats" for number in found if isinstance(number, float)}
    large = {"big integers" for number in found if isinstance(number, int) and abs(number) >= 2**53}
    assert set(vector["needs"]) == floats | large


def numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def javascript(path: Path) -> tuple[int, Any]:
    node = shutil.which("node")
    assert node, "node is not there: apt-get install nodejs"
    run = subprocess.run(
        [node, FOLDER / "integrity.mjs", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stdout, run.stderr
    return run.returncode, json.loads(run.stdout)


def test_a_script_in_javascript_comes_to_all_vectors_but_those_whose_numbers_it_cannot_keep() -> None:
    status, told = javascript(FOLDER / "integrity.json")
    assert (status, told["wrong"]) == (0, [])
    assert told["covered"] == [vector["name"] for vector in [*RESULTS, *PAYLOADS] if not vector["needs"]]
    left_out = [{"name": one["name"], "needs": one["needs"]} for one in [*RESULTS, *PAYLOADS] if one["needs"]]
    assert told["not_covered"] == left_out
    assert len(told["covered"]) >= 30


def test_the_script_in_javascript_sees_a_vector_that_is_wrong(tmp_path: Path) -> None:
    first, *others = RESULTS
    changed = {**VECTORS, "results": [{**first, "sig": "0" * 64}, *others]}
    (tmp_path / "wrong.json").write_text(json.dumps(changed))
    status, told = javascript(tmp_path / "wrong.json")
    assert (status, [(one["name"], one["differs"]) for one in told["wrong"]]) == (1, [(first["name"], ["sig"])])
