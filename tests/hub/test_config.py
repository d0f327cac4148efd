"""The loader of settings: what counts, what is refused, and what it says."""

import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from sheratan_hub import config
from sheratan_hub.app import limits_of
from sheratan_hub.config import BadConfig, Secrets, Settings, explain, is_loopback, load, store_url
from sheratan_hub.reload import is_reloaded
from sheratan_hub.rules.command import Rate

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def settings(environ=None, toml=None, flags=None):
    if toml is not None:
        Path("hub.toml").write_text(toml)
    return load(None, environ or {}, flags)[0]


def refusal(environ=None, toml=None, flags=None, path=None):
    if toml is not None:
        Path("hub.toml").write_text(toml)
    with pytest.raises(BadConfig) as refused:
        load(path, environ or {}, flags)
    return str(refused.value)


def value_of(settings, key):
    table, name = key.split(".")
    return getattr(getattr(settings, table), name)


def test_nothing_given_means_the_defaults():
    assert load(None, {}) == (Settings(), Secrets())


def test_the_shipped_hub_toml_holds_every_setting_with_its_default():
    tables = tomllib.loads((ROOT / "hub.toml").read_text())
    assert {f"{table}.{key}" for table, entries in tables.items() for key in entries} == set(config.FIELDS)
    assert load(str(ROOT / "hub.toml"), {}) == (Settings(), Secrets())
    assert msgspec.convert(tables, Settings) == Settings()


def test_the_shipped_hub_toml_explains_every_setting_and_names_its_variables():
    table = ""
    for line in (ROOT / "hub.toml").read_text().splitlines():
        if header := re.match(r"\[(\w+)\] +# ", line):
            table = header[1]
        elif line and not line.startswith("#"):
            key, comment = re.match(r"(\w+) = .*?# (.+)", line).groups()
            variables = [name for name, known in config.ENVIRONMENT.items() if known == f"{table}.{key}"]
            for source in config.SECRETS.values():
                variables += source.variables if source.file_key == f"{table}.{key}" else ()
            assert set(re.findall(r"SHERATAN_\w+", comment)) >= set(variables), line
            for unit in ("seconds", "ms", "bytes"):
                if key.endswith(f"_{unit}"):
                    assert unit.replace("ms", "milliseconds") in comment, line


def test_the_shipped_hub_toml_says_what_waits_for_a_restart():
    table, waiting = "", set()
    for line in (ROOT / "hub.toml").read_text().splitlines():
        if header := re.match(r"\[(\w+)\]", line):
            table = header[1]
        elif line.endswith("[restart]"):
            waiting.add(f"{table}.{line.partition(' ')[0]}")
    assert waiting == {key for key in config.FIELDS if not is_reloaded(key)}


EXAMPLES = {bool: ("no", False), int: ("77", 77), str: ("memory://", "memory://")}
SPECIAL = {
    "control.host": ("localhost", "localhost"),
    "data.host": ("::1", "::1"),
    "retry.backoff_cap_ms": ("7777", 7777),
    "queue.backpressure_mode": ("503", 503),
    "integrity.mode": ("none", "none"),
    "auth.token_required": ("0", False),
    "auth.rotation_until": ("2027-01-31T12:00:00Z", "2027-01-31T12:00:00Z"),
    "integrity.required": ("YES", True),
    "nodes.dead_seconds": ("777", 777),
    "retry.backoff_base_ms": ("77", 77),
}


@pytest.mark.parametrize(("variable", "key"), config.ENVIRONMENT.items())
def test_every_variable_sets_its_key(variable, key):
    text, value = SPECIAL.get(key) or EXAMPLES[config.FIELDS[key].type]
    found = settings({variable: text})
    assert value_of(found, key) == value != config.FIELDS[key].default
    assert [other for other in config.FIELDS if value_of(found, other) != config.FIELDS[other].default] == [key]


def test_the_environment_wins_over_the_file_and_a_flag_over_both():
    toml = "[data]\nport = 1\nhost = '127.0.0.2'\n[control]\nport = 9"
    found = settings({"SHERATAN_DATA_PORT": "2", "SHERATAN_DATA_HOST": "127.0.0.3"}, toml, {"data.port": 3})
    assert (found.data.port, found.data.host, found.control.port) == (3, "127.0.0.3", 9)


def test_a_flag_that_was_not_given_changes_nothing():
    assert settings(flags={"data.port": None}) == Settings()


def test_an_explicit_file_must_exist_while_the_default_one_may_be_absent():
    assert "none.toml cannot be read: No such file" in refusal(path="none.toml")


def test_an_explicit_file_is_read_in_the_place_of_the_default_one():
    Path("hub.toml").write_text("[data]\nport = 1")
    Path("mine.toml").write_text("[data]\nport = 2")
    assert load("mine.toml", {})[0].data.port == 2


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[data]\nprot = 1", "data.prot in hub.toml is not a setting; did you mean data.port?"),
        ("[dta]\nport = 1", "dta in hub.toml is not a setting; did you mean data?"),
        ("[dta]", "dta in hub.toml is not a setting"),
        ("[auth]\ntoken = 'hunter2'", "auth.token in hub.toml is not a setting; did you mean auth.token_file?"),
        ("data = 1", "data in hub.toml must be a table: [data]."),
        ("[data]\nport = '1'", "data.port in hub.toml must be a whole number from 0 to 65535."),
        ("[data]\nport = true", "data.port in hub.toml must be a whole number"),
        ("[data]\nport = 1.0", "data.port in hub.toml must be a whole number"),
        ("[data]\nport = 65536", "data.port in hub.toml must be a whole number from 0 to 65535."),
        ("[data]\nhosts = 'a'", "data.hosts in hub.toml must be a list of texts."),
        ('[policies]\ndir = "a\\u0000b"', "policies.dir in hub.toml must be a text without NUL."),
        ("[queue]\nmax_depth = 0", "queue.max_depth in hub.toml must be a whole number from 1 to"),
        ("[queue]\nbackpressure_mode = 500", "queue.backpressure_mode in hub.toml must be one of 429, 503."),
        ("[log]\nlevel = 'loud'", "log.level in hub.toml must be one of debug, info, warning, error."),
        ("[metrics]\nrequire_token = 1", "metrics.require_token in hub.toml must be true or false."),
        ("[data\n", "hub.toml is not a TOML file in UTF-8: "),
    ],
)
def test_a_bad_file_is_refused_with_the_full_key(toml, said):
    text = refusal(toml=toml)
    assert text.startswith(said)
    assert "hunter2" not in text


def test_a_file_that_is_not_utf_8_is_refused():
    Path("hub.toml").write_bytes(b"# \xff")
    assert "hub.toml is not a TOML file in UTF-8" in refusal()


def test_a_directory_is_no_settings_file(tmp_path):
    assert "Is a directory" in refusal(path=str(tmp_path))


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("SHERATAN_DATA_PORT", "eighty"),
        ("SHERATAN_DATA_PORT", ""),
        ("SHERATAN_DATA_PORT", "-1"),
        ("SHERATAN_DATA_PORT", "8_0"),
        ("SHERATAN_DATA_PORT", "9" * 5000),
        ("SHERATAN_MAX_QUEUE_DEPTH", "0"),
        ("SHERATAN_BACKPRESSURE_MODE", "500"),
        ("SHERATAN_RESULT_INTEGRITY", "md5"),
        ("SHERATAN_HUB_TOKEN_REQUIRED", "maybe"),
        ("SHERATAN_RETRY_MAX_ATTEMPTS", "0"),
    ],
)
def test_a_bad_variable_is_refused_by_its_name(variable, text):
    assert refusal({variable: text}).startswith(f"{variable} must be ")


@pytest.mark.parametrize("text", ["1", "true", "True", "yes", "0", "false", "no", "NO"])
def test_yes_and_no_may_be_written_in_six_ways(text):
    expected = text.lower() in ("1", "true", "yes")
    assert settings({"SHERATAN_RESULT_INTEGRITY_REQUIRED": text}).integrity.required is expected


def test_a_misspelt_variable_is_refused_with_a_suggestion():
    said = refusal({"SHERATAN_HUB_TOKN": "x"})
    assert said == "SHERATAN_HUB_TOKN is not a variable of the hub; did you mean SHERATAN_HUB_TOKEN?"
    assert "SHERATAN_MAX_QUEUE_DEPTH" in refusal({"SHERATAN_MAX_QUEUE_DEPHT": "1"})


def test_variables_of_other_software_are_left_alone():
    others = (
        "SHERATAN_ZONE",
        "SHERATAN_CONTROL_URL",
        "SHERATAN_DATA_URL",
        "SHERATAN_NODE_ID",
        "HUB_TOKEN",
        "SHERATAN_",
    )
    assert settings(dict.fromkeys(others, "?")) == Settings()


def test_two_names_of_one_setting_must_agree():
    both = {"SHERATAN_RESULT_INTEGRITY": "none", "SHERATAN_RESULT_INTEGRITY_MODE": "none"}
    assert settings(both).integrity.mode == "none"
    both["SHERATAN_RESULT_INTEGRITY_MODE"] = "sha256"
    said = refusal(both)
    assert "SHERATAN_RESULT_INTEGRITY_MODE" in said
    assert "differ" in said


def test_the_active_token_wins_over_the_plain_one_and_both_over_the_file():
    Path("token").write_text("  from-file\n")
    toml = "[auth]\ntoken_file = 'token'"
    environ = {"SHERATAN_HUB_TOKEN": "plain", "SHERATAN_HUB_TOKEN_ACTIVE": "active"}
    Path("hub.toml").write_text(toml)
    assert load(None, environ)[1].token == "active"
    assert load(None, {"SHERATAN_HUB_TOKEN": "plain"})[1].token == "plain"
    assert load(None, {})[1].token == "from-file"


def test_secret_files_must_exist_and_hold_something():
    Path("empty").write_text(" \n")
    Path("binary").write_bytes(b"\xff\xfe")
    said = refusal(toml="[auth]\ntoken_file = 'none'")
    assert said == "auth.token_file: the file none cannot be read: No such file or directory."
    assert "is empty" in refusal(toml="[integrity]\nhmac_key_file = 'empty'")
    assert "is not a text" in refusal(toml="[auth]\ntoken_file = 'binary'")


@pytest.mark.parametrize("token", ["", " x", "a\nb", "tök"])
def test_a_token_that_no_header_can_carry_is_refused(token):
    assert "token must be printable ASCII" in refusal({"SHERATAN_HUB_TOKEN": token})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "hub.example", "::ffff:192.0.2.1"])
@pytest.mark.parametrize("variable", ["SHERATAN_CONTROL_HOST", "SHERATAN_DATA_HOST"])
def test_off_loopback_a_token_of_ones_own_is_needed(variable, host):
    assert "set SHERATAN_HUB_TOKEN" in refusal({variable: host})
    assert "set SHERATAN_HUB_TOKEN" in refusal({variable: host, "SHERATAN_HUB_TOKEN": "shared-secret"})
    assert load(None, {variable: host, "SHERATAN_HUB_TOKEN": "mine"})[1].token == "mine"
    off = {variable: host, "SHERATAN_HUB_TOKEN": "mine", "SHERATAN_HUB_TOKEN_REQUIRED": "0"}
    assert "auth.token_required" in refusal(off)


def test_loopback_is_told_from_the_rest():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "localhost", "LOCALHOST")))
    assert not any(map(is_loopback, ("", "0.0.0.0", "::", "10.0.0.1", "localhost.example")))


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[data]\nport = 8787", "control.port and data.port must differ; both are 8787."),
        ("[data]\nhost = ''", "must not be empty"),
        ("[hub]\ndata_dir = ''", "hub.data_dir must not be empty."),
        ("[nodes]\nttl_seconds = 700", "nodes.dead_seconds must not be less than nodes.ttl_seconds."),
        ("[retry]\nbackoff_base_ms = 60001", "retry.backoff_cap_ms must not be less"),
        ("[limits]\nbatch_bytes = 1", "limits.batch_bytes must not be less"),
        ("[integrity]\nmode = 'hmac'", "integrity.mode hmac needs a key; set SHERATAN_RESULT_HMAC_KEY"),
        ("[store]\nurl = 'hub.db'", "store.url must look like"),
    ],
)
def test_settings_that_cannot_be_together_are_refused(toml, said):
    assert said in refusal(toml=toml)


def test_all_that_is_wrong_together_is_said_at_once():
    said = refusal(toml="[data]\nport = 8787\n[nodes]\nttl_seconds = 700")
    assert "control.port" in said
    assert "nodes.dead_seconds" in said


def test_both_planes_may_ask_for_any_free_port():
    found = settings(toml="[data]\nport = 0\n[control]\nport = 0")
    assert (found.control.port, found.data.port) == (0, 0)


def test_the_key_of_hmac_comes_from_its_variable_or_its_file():
    Path("key").write_text("from-file\n")
    toml = "[integrity]\nmode = 'hmac'\nhmac_key_file = 'key'"
    Path("hub.toml").write_text(toml)
    assert load(None, {})[1].hmac_key == "from-file"
    assert load(None, {"SHERATAN_RESULT_HMAC_KEY": "variable"})[1].hmac_key == "variable"


def test_the_store_is_sqlite_in_the_data_directory_unless_told_otherwise():
    assert store_url(Settings()) == "sqlite://var/hub.db"
    assert store_url(settings({"SHERATAN_DATA_DIR": "/srv/hub"})) == "sqlite:///srv/hub/hub.db"
    assert store_url(settings({"SHERATAN_STORE_URL": "memory://"})) == "memory://"


def test_explain_says_where_each_value_comes_from():
    Path("hub.toml").write_text("[data]\nhost = 'localhost'\nport = 1")
    rows = {
        key: (value, origin)
        for key, value, origin in explain(None, {"SHERATAN_DATA_PORT": "2"}, {"log.level": "debug"})
    }
    assert rows["data.host"] == ("localhost", "hub.toml")
    assert rows["data.port"] == (2, "SHERATAN_DATA_PORT")
    assert rows["log.level"] == ("debug", "command line")
    assert rows["control.port"] == (8787, "default")
    assert set(rows) == {*config.FIELDS, *config.SECRETS}


def test_no_secret_is_shown_anywhere():
    Path("key").write_text("canary-key")
    environ = {
        "SHERATAN_HUB_TOKEN": "canary-token",
        "SHERATAN_STORE_URL": "postgresql://hub:canary-password@db.example/hub?a=1&sslpassword=canary&b=2",
    }
    Path("hub.toml").write_text("[integrity]\nmode = 'hmac'\nhmac_key_file = 'key'")
    found, secrets = load(None, environ)
    shown = repr(found) + repr(secrets) + str(secrets) + repr(explain(None, environ))
    assert secrets == Secrets("canary-token", "canary-key")
    assert "canary" not in shown
    assert "postgresql://hub:***@db.example/hub?a=1&sslpassword=***&b=2" in shown
    assert "canary" not in refusal({**environ, "SHERATAN_DATA_PORT": "x"})
    assert "canary" not in refusal({**environ, "SHERATAN_STORE_URL": "canary-password"})


# Rate limits of sources


def settings_of(tmp_path: Path, text: str) -> Settings:
    file = tmp_path / "hub.toml"
    file.write_text(text)
    return config.load(str(file), {})[0]


def test_a_source_that_is_listed_without_numbers_has_the_defaults(tmp_path: Path) -> None:
    text = '[rate_limits]\nplain = {}\n"with.dots" = { per_minute = 0, concurrent = 7 }\n'
    limits = limits_of(settings_of(tmp_path, text))
    assert limits.rates == {"plain": Rate(10, 5), "with.dots": Rate(0, 7)}


@pytest.mark.parametrize("value", ["5", "{ per_hour = 1 }", "{ concurrent = -1 }", '{ per_minute = "9" }'])
def test_a_bad_rate_limit_is_named(tmp_path: Path, value: str) -> None:
    with pytest.raises(BadConfig, match=r"rate_limits\.some"):
        settings_of(tmp_path, f"[rate_limits]\nsome = {value}\n")
