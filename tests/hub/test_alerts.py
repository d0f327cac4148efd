"""Alert rules: more than so many in a window, per whom, cool-downs; the same lines make the same alerts."""

from __future__ import annotations

from typing import Any

import msgspec

from sheratan_hub import alerts
from sheratan_hub.alerts import Alert, Judge, State
from sheratan_hub.clock import rfc3339
from sheratan_hub.config import AlertRule, AlertSettings
from tests.hub.chains import record

START = 1_700_000_000_000


def line(second: float, seq: int = 0, **fields: Any) -> dict[str, Any]:
    ts = rfc3339(START + int(second * 1000))
    return record(seq, event="AUTH_FAILURE", remote_addr="10.0.0.1", reason="invalid_token") | {
        "ts": ts,
        "seq": seq,
        "hash": f"h{seq}",
        **fields,
    }


def judged(rule: AlertRule, lines: list[dict[str, Any]]) -> list[Alert]:
    judge = Judge({"r": rule})
    return [alert for one in lines for alert in judge.take(one)]


def test_an_alert_comes_with_the_line_that_is_one_too_many():
    lines = [line(n, n) for n in range(10)]
    assert judged(AlertRule("AUTH_FAILURE", more_than=10), lines) == []
    (alert,) = judged(AlertRule("AUTH_FAILURE", more_than=9), lines)
    assert (alert.rule, alert.event, alert.count, alert.from_seq, alert.to_seq) == ("r", "AUTH_FAILURE", 10, 0, 9)
    assert alert.ts == lines[9]["ts"]
    assert alert.text == "10 AUTH_FAILURE within 60 s"


def test_only_what_lies_in_the_window_counts():
    rule = AlertRule("AUTH_FAILURE", more_than=2, window_seconds=10)
    assert judged(rule, [line(0), line(5), line(10)]) == []
    assert len(judged(rule, [line(0), line(5), line(9.999)])) == 1


def test_a_folded_line_counts_for_all_that_it_stands_for():
    rule = AlertRule("AUTH_FAILURE", more_than=100)
    (alert,) = judged(rule, [line(0), line(1, count=100)])
    assert alert.count == 101


def test_after_an_alert_the_rule_is_silent_for_its_cool_down():
    rule = AlertRule("AUTH_FAILURE", window_seconds=1, cooldown_seconds=60)
    found = judged(rule, [line(second, second) for second in range(0, 181, 10)])
    assert [alert.to_seq for alert in found] == [0, 60, 120, 180]


def test_a_burst_that_goes_on_is_told_again_after_the_cool_down():
    rule = AlertRule("AUTH_FAILURE", more_than=5, window_seconds=60, cooldown_seconds=300)
    found = judged(rule, [line(second, second) for second in range(700)])
    assert [alert.to_seq for alert in found] == [5, 305, 605]


def test_addresses_nodes_and_origins_are_counted_apart_if_the_rule_says_so():
    lines = [line(n, n, remote_addr=f"10.0.0.{n % 3}", node_id=f"n{n % 2}" if n > 5 else None) for n in range(12)]
    by = {per: judged(AlertRule("AUTH_FAILURE", more_than=3, per=per), lines) for per in ("all", "address", "node")}
    assert [alert.origin for alert in by["all"]] == [None]
    assert [alert.origin for alert in by["address"]] == ["10.0.0.0", "10.0.0.1", "10.0.0.2"]
    assert by["address"][0].text == "4 AUTH_FAILURE from 10.0.0.0 within 60 s"
    found = judged(AlertRule("AUTH_FAILURE", per="origin", more_than=1), lines)
    assert [alert.origin for alert in found] == ["10.0.0.0", "10.0.0.1", "10.0.0.2", "n0", "n1"]


def test_loopback_can_be_left_out():
    lines = [line(0, remote_addr=address) for address in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]
    assert judged(AlertRule("AUTH_FAILURE", ignore_loopback=True), lines) == []
    assert len(judged(AlertRule("AUTH_FAILURE"), lines)) == 1
    hub = line(0, remote_addr=None, event="FLEET_SILENT")
    assert len(judged(AlertRule("FLEET_SILENT", ignore_loopback=True), [hub])) == 1, "what the hub itself tells counts"


def test_a_rule_may_ask_for_a_reason():
    lines = [line(0, event="DLQ_ENQUEUE", reason=reason) for reason in ("RETRIES_EXHAUSTED", "POISON")]
    (alert,) = judged(AlertRule("DLQ_ENQUEUE", reason="POISON"), lines)
    assert alert.text == "1 DLQ_ENQUEUE POISON"


def test_the_same_lines_make_the_same_alerts_and_it_can_stop_anywhere():
    lines = [line(n * 0.7, n, remote_addr=f"10.0.0.{n % 4}", count=n % 5) for n in range(300)]
    rules = {"a": AlertRule("AUTH_FAILURE", more_than=30, per="address", cooldown_seconds=20)}
    whole = [alert for judge in [Judge(rules)] for one in lines for alert in judge.take(one)]
    assert len(whole) > 10
    for stop in range(0, 300, 7):
        first = Judge(rules)
        found = [alert for one in lines[:stop] for alert in first.take(one)]
        kept = msgspec.json.decode(msgspec.json.encode(first.state), type=State)
        second = Judge(rules, kept, first.now)
        assert found + [alert for one in lines[stop:] for alert in second.take(one)] == whole
    assert len({alert.id for alert in whole}) == len(whole)


def test_memory_is_bounded_under_a_flood(monkeypatch):
    monkeypatch.setattr(alerts, "GROUPS_MAX", 50)
    judge = Judge({"r": AlertRule("AUTH_FAILURE", more_than=20, per="address", window_seconds=3600)})
    for n in range(5000):
        list(judge.take(line(n / 100, n, remote_addr=f"10.0.{n % 100}.1")))
        list(judge.take(line(n / 100, n, remote_addr="10.1.1.1")))
    assert len(judge.state["r"]) <= 50
    assert max(len(group.hits) for group in judge.state["r"].values()) <= 21


def test_the_rules_that_ship_are_about_what_the_readme_promises():
    rules = AlertSettings().in_force()
    assert {(rule.event, rule.reason) for rule in rules.values()} == {
        ("AUTH_FAILURE", ""),
        ("PORT_MISMATCH", ""),
        ("RESULT_INTEGRITY_FAIL", ""),
        ("ATTESTATION_SPOOF_SUSPECT", ""),
        ("DLQ_ENQUEUE", "POISON"),
        ("FLEET_SILENT", ""),
    }


def test_rules_can_be_switched_off_changed_and_added():
    settings = AlertSettings(
        auth_failure=AlertRule("AUTH_FAILURE", on=False),
        rules=(AlertRule("POLICY_DENY", name="denied"), AlertRule("NODE_DEAD")),
    )
    found = settings.in_force()
    assert "auth_failure" not in found
    assert (found["denied"].event, found["rule_2"].event) == ("POLICY_DENY", "NODE_DEAD")
