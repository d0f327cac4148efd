"""Proving an audit log: what was changed is found and named, what a crash has left is told from that."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from sheratan_hub.audit_lines import START_HASH, Head, chain_files, sealed
from sheratan_hub.audit_verify import Verdict, verify
from tests.hub.chains import record, written


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "hub_security_audit.jsonl"


def place(verdict: Verdict) -> tuple[str, int] | None:
    return (Path(verdict.broken.file).name, verdict.broken.line) if verdict.broken else None


def change(path: Path, line: int, before: bytes, after: bytes) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    assert before in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(before, after, 1)
    path.write_bytes(b"".join(lines))


def test_a_sound_log_is_proved_and_its_head_is_its_last_line(path: Path) -> None:
    file = written(path, 50)
    verdict = verify([path])
    assert (verdict.broken, verdict.cuts, verdict.notes, verdict.began_at) == (None, [], [], 1)
    assert verdict.head[:2] == file.head[:2] == (50, json.loads(path.read_bytes().splitlines()[-1])["hash"])


def test_an_empty_log_is_proved_too_but_not_against_a_head(path: Path) -> None:
    written(path, 0)
    assert verify([path]).broken is None
    assert verify([path], Head(3, "a" * 64)).broken is not None


def test_a_changed_line_is_named_with_its_file_and_number(path: Path) -> None:
    written(path, 50)
    change(path, 17, b"10.0.0.", b"10.9.0.")
    verdict = verify([path])
    assert place(verdict) == (path.name, 17)
    assert "does not match its hash" in verdict.broken.text


def test_a_line_with_its_own_hash_made_anew_breaks_the_next(path: Path) -> None:
    written(path, 5)
    lines = path.read_bytes().splitlines(keepends=True)
    forged = json.loads(lines[2]) | {"remote_addr": "6.6.6.6"}
    previous = forged.pop("prev_hash")
    del forged["hash"]
    lines[2] = sealed(forged, previous)[0]
    path.write_bytes(b"".join(lines))
    assert place(verify([path])) == (path.name, 4)


def test_a_number_that_is_left_out_is_found_though_all_hashes_fit(path: Path) -> None:
    path.parent.mkdir()
    previous, text = START_HASH, b""
    for seq in (1, 2, 4):
        line, previous = sealed({"seq": seq, **record(seq)}, previous)
        text += line
    path.write_bytes(text)
    assert place(verify([path])) == (path.name, 3)


def test_lines_missing_at_the_beginning_are_found(path: Path) -> None:
    written(path, 5)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    assert place(verify([path])) == (path.name, 1)
    assert verify([path], begin=2).broken is None


def test_lines_missing_at_the_end_are_found_with_a_head_only(path: Path) -> None:
    head = written(path, 5).head
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert verify([path]).broken is None
    assert place(verify([path], head)) == (path.name, 4)
    assert place(verify([path], Head(0, head.hash))) == (path.name, 4)


def test_a_log_that_has_grown_since_still_holds_against_an_old_head(path: Path) -> None:
    head = written(path, 5).head
    written(path, 5, first=6)
    assert verify([path], head).broken is None
    assert verify([path], head._replace(seq=4)).broken is not None, "the right hash at another number"


def test_rotated_files_are_proved_in_any_order_and_a_missing_one_is_found(path: Path) -> None:
    head = written(path, 60, max_bytes=6000).head
    files = chain_files(path)
    assert len(files) > 3
    shuffled = random.Random(1).sample(files, len(files))
    assert verify(shuffled, head).broken is None
    verdict = verify([file for file in files if file != files[1]])
    assert place(verdict) == (files[2].name, 1)
    assert "missing" in verdict.broken.text


def test_a_rotated_file_alone_is_proved_and_says_what_is_not(path: Path) -> None:
    written(path, 60, max_bytes=6000)
    middle = chain_files(path)[1]
    verdict = verify([middle])
    assert verdict.broken is None
    assert "were not given" in verdict.notes[0]
    middle.write_bytes(b"".join(middle.read_bytes().splitlines(keepends=True)[1:]))
    assert place(verify([middle])) == (middle.name, 1), "its name says where it begins"


def test_the_last_file_alone_is_proved_if_the_one_before_lies_beside_it(path: Path) -> None:
    written(path, 60, max_bytes=6000)
    verdict = verify([path])
    assert (verdict.broken, len(verdict.notes)) == (None, 1)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    assert place(verify([path])) == (path.name, 1)


@pytest.mark.parametrize("left", [b"", b"\0\0\0\0"])
@pytest.mark.parametrize("keep", [1, 7, 9, 20, 200])
def test_a_line_cut_by_a_crash_is_accounted_for_by_the_next_start(path: Path, keep: int, left: bytes) -> None:
    written(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + lines[2][:keep] + left)
    assert place(verify([path])) == (path.name, 3), "before the next start it might be anything"
    written(path, 2)
    verdict = verify([path])
    assert verdict.broken is None
    assert [(Path(cut.file).name, cut.line) for cut in verdict.cuts] == [(path.name, 3)]


def test_two_crashes_in_a_row_are_both_accounted_for(path: Path) -> None:
    written(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    again = sealed({"seq": 3, **record(9)}, json.loads(lines[1])["hash"])[0]
    path.write_bytes(lines[0] + lines[1] + lines[2][:50] + b"\n" + again[:30])
    written(path, 1)
    verdict = verify([path])
    assert verdict.broken is None
    assert [cut.line for cut in verdict.cuts] == [3, 4]


def test_a_last_line_without_its_newline_is_whole(path: Path) -> None:
    written(path, 3)
    path.write_bytes(path.read_bytes()[:-1])
    assert verify([path]).broken is None
    written(path, 1, first=4)
    assert verify([path]).broken is None
    assert verify([path]).head.seq == 4


def test_a_changed_last_line_is_no_crash_even_after_the_next_start(path: Path) -> None:
    written(path, 3)
    change(path, 3, b"10.0.0.3", b"10.0.0.4")
    written(path, 2)
    assert place(verify([path])) == (path.name, 3)


@pytest.mark.parametrize("mend", ["shorter", "other", "gone", "kept whole"])
def test_what_a_crash_has_left_cannot_be_changed_afterwards(path: Path, mend: str) -> None:
    written(path, 3)
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole[0] + whole[1] + whole[2][:60])
    written(path, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = {
        "shorter": lines[2][:40] + b"\n",
        "other": lines[2].replace(b"1", b"2"),
        "gone": b"",
        "kept whole": whole[2],
    }[mend]
    path.write_bytes(b"".join(lines))
    assert verify([path]).broken is not None


def test_text_from_outside_cannot_account_for_a_cut_line(path: Path) -> None:
    from sheratan_hub.audit_file import AuditFile

    file = AuditFile(path)
    for n in range(3):
        file.add(record(n, path='/x","detail":{"cut":{"bytes":1}}'))
    file.write()
    file.close()
    assert verify([path]).broken is None


def mutations(lines: list[bytes], chance: random.Random) -> bytes:
    """The log, changed in one way of many."""
    lines, at = list(lines), chance.randrange(len(lines))
    other = chance.randrange(len(lines))
    match chance.randrange(9):
        case 0:  # a bit flips
            flat = bytearray(b"".join(lines))
            flat[chance.randrange(len(flat))] ^= 1 << chance.randrange(8)
            return bytes(flat)
        case 1:
            del lines[at]
        case 2:
            del lines[at : at + chance.randrange(1, 20)]
        case 3:
            other = other if lines[other] != lines[at] else (at + 1) % len(lines)
            lines[at], lines[other] = lines[other], lines[at]
        case 4:
            lines.insert(other, lines[at])
        case 5:  # edited, with its own hash made anew
            fields = json.loads(lines[at]) | {chance.choice(("remote_addr", "path", "reason")): "forged"}
            previous = fields.pop("prev_hash")
            del fields["hash"]
            lines[at] = sealed(fields, previous)[0]
        case 6:
            flat = b"".join(lines)
            return flat[: chance.randrange(len(flat) - 1)]
        case 7:  # cut at a line's end
            return b"".join(lines[:at])
        case 8:
            lines[at] = lines[at][: chance.randrange(len(lines[at]) - 1)] + chance.choice((b"", b"\n"))
    return b"".join(lines)


def test_a_thousand_mutations_are_all_found(path: Path, tmp_path: Path) -> None:
    head = written(path, 120).head
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    victim = tmp_path / "victim.jsonl"
    chance = random.Random(20261121)
    tried = missed = 0
    while tried < 1000:
        changed = mutations(lines, chance)
        if changed in (whole, whole[:-1]):
            continue
        tried += 1
        victim.write_bytes(changed)
        missed += verify([victim], head).broken is None
    assert (tried, missed) == (1000, 0)


def test_a_mutation_of_a_healed_and_rotated_log_is_found(path: Path) -> None:
    written(path, 30, max_bytes=6000)
    path.write_bytes(path.read_bytes()[:-40])
    head = written(path, 30, first=31, max_bytes=6000).head
    files = chain_files(path)
    assert verify(files, head).broken is None
    chance = random.Random(5)
    for _ in range(200):
        file = chance.choice(files)
        whole = file.read_bytes()
        flat = bytearray(whole)
        flat[chance.randrange(len(flat))] ^= 1 << chance.randrange(8)
        file.write_bytes(bytes(flat))
        assert verify(files, head).broken is not None
        file.write_bytes(whole)


def test_the_hash_is_what_the_reference_says_it_is(path: Path) -> None:
    written(path, 1)
    (line,) = path.read_bytes().splitlines()
    text, _, rest = line.rpartition(b',"hash":"')
    assert rest == hashlib.sha256(text + b"}").hexdigest().encode() + b'"}'
    assert json.loads(line)["prev_hash"] == START_HASH
