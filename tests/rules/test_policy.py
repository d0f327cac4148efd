"""Policies: the first rule that matches decides, gates come before all, and a plan tells what activation will do."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheratan_hub.rules.attestation import Attested
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.rules.finish import Finish
from sheratan_hub.rules.lanes import Lane
from sheratan_hub.rules.nodes import Beat, Node
from sheratan_hub.rules.plan import OF_NODES, may_do, plan
from sheratan_hub.rules.policies import ActivatePolicy, CreatePolicy, Snapshot, judge_of, node_ask, submit_ask
from sheratan_hub.rules.policy import ACTIONS, Ask, Gates, Judge, Policy, Rule
from tests.rules.stage import Stage

NODE = Node("n1", 0, 0, zone="dmz", capabilities=("gpu",), attested=Attested(status="OK"))


def judge(*rules, default="allow", **gates):
    return Judge(Policy(default, tuple(Rule(**rule) for rule in rules), Gates(**gates)), 3)


def test_the_first_rule_that_matches_decides():
    both = judge({"effect": "deny", "zones": ("dmz",)}, {"effect": "allow", "nodes": ("n1",)})
    assert both.decide(node_ask("heartbeat", "n1", NODE)) == (False, "rule 1")
    assert both.decide(Ask("heartbeat", "n1")) == (True, "rule 2")


def test_what_no_rule_is_about_gets_the_default():
    assert judge(default="deny").decide(Ask("submit")) == (False, "default")
    assert Judge().decide(Ask("submit")) == (True, "default")


@pytest.mark.parametrize(
    ("rule", "ask", "matches"),
    [
        ({"kinds": ("render.*",)}, Ask("submit", kind="render.frame"), True),
        ({"kinds": ("render.*",)}, Ask("submit", kind="xrender.frame"), False),
        ({"kinds": ("a.b",)}, Ask("submit", kind="axb"), False),
        ({"kinds": ("secret.*",)}, Ask("submit", kind="secret.\nx"), True),
        ({"kinds": ("*",)}, Ask("submit"), False),
        ({"sources": ("s", "t")}, Ask("submit", source="t"), True),
        ({"nodes": ("n*",)}, Ask("submit"), False),
        ({"capabilities": ("gpu",)}, Ask("pull", capabilities=frozenset({"cpu", "gpu"})), True),
        ({"capabilities": ("gpu",)}, Ask("pull"), False),
        ({"attestation": ("DRIFT",)}, Ask("pull", attestation="DRIFT"), True),
        ({"attestation": ("DRIFT",)}, Ask("pull"), False),
        ({"actions": ("pull", "result")}, Ask("result"), True),
        ({"actions": ("pull",)}, Ask("result"), False),
    ],
)
def test_a_rule_matches_what_has_all_that_it_names(rule, ask, matches):
    assert judge({"effect": "deny", **rule}).decide(ask).allowed is not matches


def starred(pattern, text):
    """What a pattern means, said slowly."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(starred(pattern[1:], text[start:]) for start in range(len(text) + 1))
    return bool(text) and pattern[0] == text[0] and starred(pattern[1:], text[1:])


@given(st.text("ab*", min_size=1, max_size=7), st.text("ab", min_size=1, max_size=9))
def test_a_star_stands_for_any_characters(pattern, text):
    denied = judge({"effect": "deny", "kinds": (pattern,)}).decide(Ask("submit", kind=text))
    assert denied.allowed is not starred(pattern, text)


def test_many_stars_and_a_long_name_are_decided_in_no_time():
    many = judge({"effect": "deny", "kinds": ("*-" * 40 + "x",)})
    assert many.decide(Ask("submit", kind="-" * 200)).allowed


def test_gates_come_before_every_rule():
    gated = judge({"effect": "allow"}, block_spoof_suspect=True, heartbeat_before_pull=True)
    suspect = Ask("pull", "n1", attestation="SPOOF_SUSPECT")
    assert gated.decide(suspect) == gated.pull(suspect) == (False, "block_spoof_suspect")
    assert gated.decide(suspect._replace(action="heartbeat")).allowed
    assert gated.pull(Ask("pull", "stranger")) == (False, "heartbeat_before_pull")


def test_a_pull_is_denied_only_when_every_job_is():
    some = judge({"effect": "allow", "kinds": ("a",)}, {"effect": "deny", "actions": ("pull",)})
    assert some.pull(Ask("pull", "n1")).allowed
    none = judge({"effect": "deny", "kinds": ("a",)}, {"effect": "deny", "actions": ("pull",)})
    assert none.pull(Ask("pull", "n1")) == (False, "rule 2")


def test_a_policy_with_an_unknown_word_is_none():
    for text in (
        '{"defualt": "deny"}',
        '{"rules": [{"effect": "maybe"}]}',
        '{"rules": [{"effect": "deny", "kind": []}]}',
    ):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(text, type=Policy)


# Versions


def test_versions_are_numbered_and_chained():
    stage = Stage()
    one = stage.do(CreatePolicy(Policy("deny")))
    two = stage.do(CreatePolicy(Policy("allow"), "better"))
    assert (one.version, two.version, two.prev_sha256) == (1, 2, one.sha256)
    assert one.proves_itself()
    assert two.proves_itself()
    assert not msgspec.structs.replace(two, policy=Policy("deny")).proves_itself()


def test_a_version_is_activated_against_the_one_that_is_active():
    stage = Stage()
    stage.do(CreatePolicy(Policy("deny")))
    assert stage.do(ActivatePolicy(1, 0)).active == 1
    with pytest.raises(Refused) as no:
        stage.do(ActivatePolicy(1, 0))
    assert no.value.code is Code.PRECONDITION_FAILED
    assert stage.do(ActivatePolicy(0, 1)).active == 0
    assert [event.event for event in stage.events] == ["policy.created", "policy.activated", "policy.activated"]


def test_an_unknown_version_cannot_be_activated():
    with pytest.raises(Refused) as no:
        Stage().do(ActivatePolicy(7, 0))
    assert no.value.code is Code.POLICY_NOT_FOUND


# What is denied


def ruled(*rules, **gates):
    stage = Stage()
    stage.judge = judge(*rules, **gates)
    return stage


def denied(stage, command):
    with pytest.raises(Refused) as no:
        stage.do(command)
    return no.value


def test_a_denied_submit_names_version_and_rule_and_makes_nothing():
    stage = ruled({"effect": "deny", "actions": ("submit",), "sources": ("evil",)})
    with pytest.raises(Refused) as no:
        stage.submit(source="evil")
    assert (no.value.code, no.value.reason, no.value.detail["version"]) == (Code.POLICY_DENIED, "rule 1", "3")
    assert not stage.rows
    stage.submit(source="good")


def test_a_denied_heartbeat_is_recorded_all_the_same():
    stage = ruled({"effect": "deny", "actions": ("heartbeat",)})
    done = stage.do(Beat("n1"))
    assert done.denied.code is Code.POLICY_DENIED
    assert stage.rows


def test_a_denied_result_leaves_the_lease_as_it_was():
    stage = Stage()
    stage.submit()
    job = stage.lease()
    stage.judge = judge({"effect": "deny", "actions": ("result",)})
    with pytest.raises(Refused) as no:
        stage.do(Finish(job.id, True, job.lease_id))
    assert no.value.code is Code.POLICY_DENIED
    assert stage.job(job.id) == job


def test_a_node_gets_only_jobs_that_the_policy_lets_it_have():
    stage = ruled({"effect": "deny", "actions": ("pull",), "kinds": ("secret",)})
    stage.submit("secret")
    plain = stage.submit("plain")
    assert [job.id for job in stage.pull(limit=10)] == [plain]


def test_a_lease_carries_the_version_that_allowed_it():
    stage = ruled({"effect": "deny", "kinds": ("other",)})
    stage.submit()
    assert stage.lease().policy_version == 3


# Plans

WORDS = st.sampled_from(("a", "b", "c"))
SOME = st.none() | st.lists(WORDS, min_size=1, max_size=2).map(tuple)
RULES = st.builds(
    Rule,
    effect=st.sampled_from(("allow", "deny")),
    actions=st.none() | st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=2).map(tuple),
    zones=SOME,
    capabilities=SOME,
    kinds=SOME,
    sources=SOME,
    nodes=SOME,
    attestation=st.none() | st.just(("OK",)) | st.just(("MISSING",)),
)
POLICIES = st.builds(
    Policy,
    default=st.sampled_from(("allow", "deny")),
    rules=st.lists(RULES, max_size=4).map(tuple),
    gates=st.builds(Gates, block_spoof_suspect=st.booleans(), heartbeat_before_pull=st.booleans()),
)
NODES = st.builds(
    Node,
    id=WORDS,
    first_seen=st.just(0),
    last_seen=st.just(0),
    zone=st.none() | WORDS,
    capabilities=st.lists(WORDS, unique=True, max_size=2).map(tuple),
    attested=st.sampled_from((Attested(), Attested(status="OK"), Attested(status="SPOOF_SUSPECT"))),
)
LANES = st.builds(Lane, st.just(2), WORDS, st.just("") | WORDS, st.lists(WORDS, unique=True, max_size=1).map(tuple))


@given(POLICIES, POLICIES, st.lists(NODES, max_size=4), st.lists(LANES, max_size=3))
def test_a_plan_and_the_decisions_agree(old, new, nodes, lanes):
    before, after = Judge(old), Judge(new)
    planned = plan(before, after, nodes, lanes)
    told = {change.node_id: change for change in planned.nodes}
    for node in {node.id: node for node in nodes}.values():
        for action in OF_NODES:
            ask = node_ask(action, node.id, node)
            was, is_now = (may_do(one, ask) is None for one in (Judge(old), Judge(new)))
            same_id = [change for change in planned.nodes if change.node_id == node.id]
            if was != is_now:
                assert any(action in (change.lost if was else change.gained) for change in same_id)
    assert set(told) <= {node.id for node in nodes}
    for change in planned.lanes:
        lane = change.lane
        asks = [node_ask("pull", node.id, node, lane.kind, lane.source) for node in nodes]
        able = [ask for ask in asks if ask.capabilities.issuperset(lane.needs)]
        assert change.before == sum(Judge(old).decide(ask).allowed for ask in able)
        assert change.after == sum(Judge(new).decide(ask).allowed for ask in able)
        assert change.submit == Judge(new).decide(submit_ask(*lane[1:])).allowed


@given(POLICIES, NODES, st.lists(LANES, min_size=1, max_size=4))
def test_a_pull_that_is_denied_could_have_had_no_job(policy, node, lanes):
    ask = node_ask("pull", node.id, node)
    if not Judge(policy).pull(ask).allowed:
        for lane in lanes:
            assert not Judge(policy).decide(ask._replace(kind=lane.kind, source=lane.source or None)).allowed


@given(POLICIES)
def test_a_policy_comes_back_from_its_row_as_it_was(policy):
    made = Stage().do(CreatePolicy(policy))
    again = msgspec.json.decode(msgspec.json.encode(made), type=Snapshot)
    assert again == made
    assert again.proves_itself()
    assert judge_of(again).version == 1
