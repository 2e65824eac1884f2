"""A private RabbitMQ for tests: see `greenkombu.utils.private_rabbitmq`, which starts it."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

import hub
from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ, TLSFiles, find_rabbitmq
from greenkombu.utils.private_rabbitmq_cluster import PrivateRabbitMQCluster

__all__ = ["Certificates", "make_cluster", "make_rabbitmq", "require_rabbitmq"]


@dataclass(frozen=True)
class Certificates:
    """A certificate authority made for one test, with one server and one client certificate.

    Args:
        folder: where the PEM files are written.
        user: the common name of the client certificate, which EXTERNAL logs in as.
    """

    folder: Path
    user: str = "greenkombu-client"

    def __post_init__(self) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.authority)
        server = authority.issue_cert("localhost", "127.0.0.1")
        server.private_key_pem.write_to_path(self._server_key)
        for index, blob in enumerate(server.cert_chain_pems):
            blob.write_to_path(self._server_certificate, append=index > 0)
        client = authority.issue_cert("client.invalid", common_name=self.user)
        client.private_key_and_cert_chain_pem.write_to_path(self.client)

    @property
    def authority(self) -> Path:
        """The authority's certificate."""
        return self.folder / "authority.pem"

    @property
    def client(self) -> Path:
        """The client's certificate and private key in one file."""
        return self.folder / "client.pem"

    @property
    def _server_key(self) -> Path:
        return self.folder / "server-key.pem"

    @property
    def _server_certificate(self) -> Path:
        return self.folder / "server.pem"

    def server_files(self, *, external: bool = False) -> TLSFiles:
        """Return what the server listens with.

        Args:
            external: also offer EXTERNAL, and create the user that the client certificate names.
        """
        return TLSFiles(
            ca=self.authority,
            certificate=self._server_certificate,
            key=self._server_key,
            external_user=self.user if external else None,
        )

    def client_context(self, *, with_certificate: bool = False) -> ssl.SSLContext:
        """Return a context that trusts this authority and, if asked for, shows the client's."""
        context = ssl.create_default_context(cafile=self.authority)
        if with_certificate:
            context.load_cert_chain(self.client)
        return context


def require_rabbitmq() -> None:
    """Skip the test where no RabbitMQ is installed; fail it where one has to be (CI is set)."""
    if find_rabbitmq() is not None:
        return
    reason = "rabbitmq-server is not installed; `make deps` installs it"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def make_rabbitmq(
    *,
    plugins: tuple[str, ...] = (),
    settings: dict[str, str] | None = None,
    tls: TLSFiles | None = None,
) -> PrivateRabbitMQ:
    """Return a private server, not started, whose waits let the other tasks run."""
    require_rabbitmq()
    return PrivateRabbitMQ(sleep=_sleep, plugins=plugins, settings=settings, tls=tls)


def make_cluster(size: int = 3) -> PrivateRabbitMQCluster:
    """Return a cluster of private servers, not started; starting takes about 5 s for each."""
    require_rabbitmq()
    return PrivateRabbitMQCluster(size, sleep=_sleep)


def _sleep(seconds: float) -> None:
    # Looked up at each wait: a test may choose another environment in between.
    hub.get_environment().sleep(seconds)
