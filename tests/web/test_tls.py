"""Both planes over HTTPS, with client certificates, and files that will not do. Certificates come from `openssl`."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub import serving
from sheratan_hub.client import HubClient, HubUnreachable, client_tls
from sheratan_hub.config import BadConfig, ControlSettings, DataSettings, HubSettings, Secrets, Settings, TlsSettings
from sheratan_hub.notify import Notifier
from sheratan_hub.web.tls import server_context
from tests.conftest import TOKEN, MakeSite, Site


class Files:
    """An authority, a server's certificate of it, a client's of it, and another authority."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "key.pem")
        self.run("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "other.key")
        for name in ("ca", "stranger"):
            self.run(
                "req", "-x509", "-new", "-key", "key.pem", "-subj", f"/CN={name}", "-days", "2", "-out", f"{name}.pem"
            )
        (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
        for name in ("hub", "node"):
            self.run("req", "-new", "-key", "key.pem", "-subj", f"/CN={name}", "-out", f"{name}.csr")
            signed = ("-CA", "ca.pem", "-CAkey", "key.pem", "-CAcreateserial", "-extfile", "names", "-days", "2")
            self.run("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
        self.run("ec", "-in", "key.pem", "-aes128", "-passout", "pass:secret", "-out", "locked.key")

    def run(self, *words: str) -> None:
        subprocess.run(["openssl", *words], cwd=self.folder, check=True, capture_output=True, timeout=30)

    def __getattr__(self, name: str) -> str:
        return str(self.folder / name.replace("_", "."))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    assert shutil.which("openssl"), "openssl is not there: apt-get install openssl"
    return Files(tmp_path_factory.mktemp("tls"))


def hub_of(site: Site, tls: ssl.SSLContext | None) -> HubClient:
    urls = (f"https://127.0.0.1:{site.app.ports[plane]}" for plane in ("control", "data"))
    return HubClient(*urls, TOKEN, tls=tls, patience_seconds=0)


async def test_both_planes_speak_https(make_site: MakeSite, files: Files) -> None:
    site = await make_site(tls=TlsSettings(cert=files.hub_pem, key=files.key_pem))
    async with hub_of(site, client_tls(files.ca_pem)) as hub:
        job = await hub.submit("k")
        assert (await hub.heartbeat("n")).node_id == "n"
        (lease,) = (await hub.pull("n", wait_seconds=5)).jobs
        assert lease.job_id == job.job_id
    for stranger in (None, client_tls(files.stranger_pem)):
        async with hub_of(site, stranger) as hub:
            with pytest.raises(HubUnreachable):
                await hub.heartbeat("n")


async def test_plain_http_is_not_answered_on_an_https_port(make_site: MakeSite, files: Files) -> None:
    site = await make_site(tls=TlsSettings(cert=files.hub_pem, key=files.key_pem))
    reader, writer = await asyncio.open_connection("127.0.0.1", site.app.ports["data"])
    writer.write(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    async with asyncio.timeout(10):
        with suppress(ConnectionError):
            assert b"200" not in await reader.read()
    writer.close()


async def test_with_client_ca_only_clients_with_its_certificate_are_let_in(make_site: MakeSite, files: Files) -> None:
    site = await make_site(tls=TlsSettings(cert=files.hub_pem, key=files.key_pem, client_ca=files.ca_pem))
    async with hub_of(site, client_tls(files.ca_pem, files.node_pem, files.key_pem)) as hub:
        await hub.heartbeat("n")
    for wrong in (client_tls(files.ca_pem), client_tls(files.ca_pem, files.stranger_pem, files.key_pem)):
        async with hub_of(site, wrong) as hub:
            with pytest.raises(HubUnreachable):
                await hub.heartbeat("n")


def test_tls_is_1_2_at_least(files: Files) -> None:
    context = server_context(TlsSettings(cert=files.hub_pem, key=files.key_pem))
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert server_context(TlsSettings()) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cert": "none_pem"}, "tls.cert: the file .* cannot be read: No such file"),
        ({"key": "none_pem"}, "tls.key: the file .* cannot be read"),
        ({"key": "other_key"}, "not a PEM certificate and its unencrypted private key: key values mismatch"),
        ({"cert": "names"}, "not a PEM certificate"),
        ({"key": "locked_key"}, "unencrypted private key"),
        ({"client_ca": "none_pem"}, "tls.client_ca: the file .* cannot be read"),
        ({"client_ca": "key_pem"}, "tls.client_ca: .* holds no PEM certificate"),
    ],
)
def test_files_that_will_not_do_are_named(files: Files, given: dict[str, str], said: str) -> None:
    names = {"cert": "hub_pem", "key": "key_pem", **given}
    with pytest.raises(BadConfig, match=said):
        server_context(TlsSettings(**{key: getattr(files, name) for key, name in names.items()}))


async def test_a_hub_with_bad_files_does_not_start(tmp_path: Path, files: Files, capsys: Any) -> None:
    settings = Settings(
        control=ControlSettings(port=0),
        data=DataSettings(port=0),
        hub=HubSettings(data_dir=str(tmp_path)),
        tls=TlsSettings(cert=files.hub_pem, key=files.other_key),
    )
    load = lambda: (settings, Secrets(token=TOKEN))  # noqa: E731
    assert await serving.run(load, {}, Notifier({})) == 78
    assert "sheratan-hub cannot start: tls.cert and tls.key" in capsys.readouterr().err
