"""Numbers in queries: what is one, what is none."""

from __future__ import annotations

from tests.conftest import MakeSite

NONE = ("", " 5", "5 ", "1_0", "0x5", "five", "nan", "inf", "-inf", "\u0665", "+5", "1e9999")
NOT_WHOLE = ("5.5", "5.0", "1e1")


async def test_a_whole_number_in_a_query_is_digits_within_its_bounds(make_site: MakeSite) -> None:
    site = await make_site()
    for text in (*NONE, *NOT_WHOLE, "0", "1001", "-1", "9" * 40):
        status, body, _ = await site.ask("data", "GET", "/api/jobs", params={"limit": text})
        assert (status, body["code"]) == (422, "invalid_field"), text
    for text in ("1", "1000", "0005"):
        assert (await site.ask("data", "GET", "/api/jobs", params={"limit": text}))[0] == 200, text


async def test_a_number_in_a_query_is_a_decimal_within_its_bounds(make_site: MakeSite) -> None:
    site = await make_site()
    job_id = await site.submit()
    await site.data("POST", f"/api/jobs/{job_id}/cancel", {})
    for text in (*NONE, "-1", "30.1", ".", "1.", "."):
        status, body, _ = await site.ask("data", "GET", f"/api/jobs/{job_id}", params={"wait_seconds": text})
        assert (status, body["code"]) == (422, "invalid_field"), text
    for text in ("0", "0.5", "30", "1e-3", "-0"):
        assert (await site.ask("data", "GET", f"/api/jobs/{job_id}", params={"wait_seconds": text}))[0] == 200, text


async def test_an_empty_time_is_no_time(make_site: MakeSite) -> None:
    site = await make_site()
    status, body = await site.data("POST", "/api/jobs", {"kind": "x", "not_before": ""})
    assert (status, body["code"]) == (422, "invalid_field")
    assert (await site.data("POST", "/api/jobs", {"kind": "x", "not_before": None}))[0] == 201
