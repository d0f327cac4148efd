"""What `serve` prints when it is up."""

from __future__ import annotations

from sheratan_hub.announce import announcement
from sheratan_hub.config import ControlSettings, DataSettings
from tests.conftest import MakeSite


async def test_what_to_try_next_names_an_address_that_can_be_asked(make_site: MakeSite) -> None:
    site = await make_site(control=ControlSettings(host="::1", port=0), data=DataSettings(host="0.0.0.0", port=0))
    said = announcement(site.app, {"token": "default"})
    control, data = site.app.ports["control"], site.app.ports["data"]
    assert f"control plane  http://[::1]:{control}\n" in said
    assert f"data plane     http://0.0.0.0:{data}\n" in said
    assert said.count(f"--data-url http://127.0.0.1:{data} ") == 2
