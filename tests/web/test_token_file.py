"""A client with a token file: it goes over to what the file holds now when its token is refused, or when told to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sheratan_hub.client import HubClient
from sheratan_hub.transport import HubRefused
from tests.web.faking import Fake, HastyClock, refuses, says

FINE = says({"ok": True, "jobs": [], "next_cursor": None})


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("first-token\n")
    return path


@pytest.fixture
async def follower(fake: Fake, hasty: HastyClock, secret: Path) -> AsyncIterator[HubClient]:
    url = str(fake.server.make_url("/"))
    async with HubClient(url, url, "first-token", clock=hasty, patience_seconds=0, token_file=str(secret)) as hub:
        yield hub


def used(fake: Fake) -> list[str]:
    return [request.headers["Authorization"].removeprefix("Bearer ") for request in fake.requests]


@pytest.mark.parametrize("code", ["old_token", "invalid_token", "expired_token", "missing_token"])
async def test_a_refused_token_is_read_again_and_the_call_goes_on(
    follower: HubClient, fake: Fake, secret: Path, code: str
) -> None:
    fake.script = [refuses(403, code), FINE]
    secret.write_text("second-token\n")
    await follower.call("data", "GET", "/api/jobs")
    await follower.call("data", "GET", "/api/jobs")
    assert used(fake) == ["first-token", "second-token", "second-token"]


async def test_when_the_file_holds_the_same_the_refusal_stands(follower: HubClient, fake: Fake) -> None:
    fake.script = [refuses(403, "old_token")]
    with pytest.raises(HubRefused, match="old_token"):
        await follower.call("data", "GET", "/api/jobs")
    assert used(fake) == ["first-token"]


async def test_another_kind_of_403_reads_nothing(follower: HubClient, fake: Fake, secret: Path) -> None:
    fake.script = [refuses(403, "forbidden_role")]
    secret.write_text("second-token")
    with pytest.raises(HubRefused, match="forbidden_role"):
        await follower.call("data", "GET", "/api/jobs")
    assert used(fake) == ["first-token"]


@pytest.mark.parametrize("content", ["", "  \n", "t\u00f6ken", None])
async def test_a_file_without_a_token_changes_nothing(
    follower: HubClient, fake: Fake, secret: Path, content: str | None
) -> None:
    fake.script = [FINE]
    if content is None:
        secret.unlink()
    else:
        secret.write_text(content)
    assert follower.reload_token() is False
    await follower.call("data", "GET", "/api/jobs")
    assert used(fake) == ["first-token"]


async def test_told_to_it_goes_over_before_it_is_refused(follower: HubClient, fake: Fake, secret: Path) -> None:
    fake.script = [FINE]
    secret.write_text("second-token")
    assert (follower.reload_token(), follower.reload_token()) == (True, False)
    await follower.call("data", "GET", "/api/jobs")
    assert used(fake) == ["second-token"]
