"""What URLs and options make of a connection to Redis, and what they must not hold."""

from __future__ import annotations

import pickle
import socket
import ssl
from types import SimpleNamespace
from typing import Any

import pytest

from greenkombu._parameters import truth
from greenkombu.exceptions import ArgumentError, KombuError
from greenkombu.transport.redis._attributes import check_options
from greenkombu.transport.redis._errors import (
    CHANNEL_ERRORS,
    CONNECTION_ERRORS,
    CommandError,
    CommandTimeoutError,
    LoginRefusedError,
    NoSuchDatabaseError,
    ReadOnlyError,
    ReplyError,
    ServerError,
    copy_of,
    to_error,
)
from greenkombu.transport.redis._options import Settings


def connection(**attributes: Any) -> Any:
    """What `Settings` reads of a connection."""
    usual: dict[str, Any] = {
        "hostname": None,
        "port": None,
        "userid": None,
        "password": None,
        "virtual_host": None,
        "ssl": False,
        "connect_timeout": None,
        "transport_options": {},
    }
    return SimpleNamespace(**{**usual, **attributes})


def of_options(**options: Any) -> Settings:
    return Settings.from_connection(connection(transport_options=options))


def test_nothing_said_is_the_local_server_with_bounds() -> None:
    settings = Settings.from_connection(connection())
    assert settings.address == ("localhost", 6379)
    assert (settings.db, settings.protocol, settings.ssl) == (0, 3, False)
    assert settings.socket_timeout == 30
    assert settings.connect_timeout == 10
    assert settings.health_check_interval == 25
    assert settings.peer == "localhost:6379"
    assert settings == Settings(("localhost", 6379))


def test_host_user_password_and_database() -> None:
    settings = Settings.from_connection(
        connection(hostname="::1", port="7000", userid="u", password="secret", virtual_host="/3")
    )
    assert settings.address == ("::1", 7000)
    assert settings.peer == "[::1]:7000"
    assert settings.db == 3
    assert settings.credentials() == ("u", "secret")
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    ("virtual_host", "db"), [(None, 0), ("", 0), ("/", 0), ("5", 5), ("/5", 5), (7, 7)]
)
def test_the_virtual_host_is_the_database(virtual_host: Any, db: int) -> None:
    assert Settings.from_connection(connection(virtual_host=virtual_host)).db == db


@pytest.mark.parametrize("virtual_host", ["x", "-1", "1.5", True])
def test_a_database_is_a_number(virtual_host: Any) -> None:
    with pytest.raises(ValueError, match="number of the database"):
        Settings.from_connection(connection(virtual_host=virtual_host))


def test_a_unix_socket_with_options_in_its_url() -> None:
    settings = Settings.from_connection(
        connection(hostname="socket://:pw%2F1@/run/redis.sock?virtual_host=2&socket_timeout=5")
    )
    assert settings.address == settings.peer == "/run/redis.sock"
    assert settings.db == 2
    assert settings.socket_timeout == 5
    assert settings.credentials() == (None, "pw/1")


@pytest.mark.parametrize(
    "url",
    ["socket://host/a.sock", "socket://", "socket:///a?credential_provider=os.system"],
)
def test_a_unix_socket_url_that_makes_no_sense_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"redis\+socket"):
        Settings.from_connection(connection(hostname=url))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("socket_timeout", "soon"),
        ("socket_timeout", 0),
        ("socket_timeout", float("nan")),
        ("socket_timeout", True),
        ("socket_connect_timeout", -1),
        ("health_check_interval", "x"),
        ("protocol", 4),
        ("max_reply_bytes", "many"),
        ("client_name", "with space"),
        ("client_name", 5),
        ("socket_keepalive_options", "x"),
        ("socket_keepalive_options", {"x": 1}),
        ("credential_provider", 5),
        ("credential_provider", "no_such_package.Provider"),
        ("retry_on_timeout", "perhaps"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(name: str, value: Any) -> None:
    with pytest.raises((ValueError, KombuError)) as caught:
        of_options(**{name: value})
    assert name in str(caught.value) or isinstance(caught.value, ValueError)
    assert isinstance(caught.value, KombuError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sep", ""),
        ("unacked_key", ""),
        ("global_keyprefix", 5),
        ("polling_interval", "x"),
        ("polling_interval", -3),
    ],
)
def test_an_option_of_channels_that_cannot_be_used_is_named(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=name):
        check_options({name: value})
    check_options({name: None})


def test_a_scheme_behind_redis_that_does_not_exist_is_named_without_the_password() -> None:
    with pytest.raises(ArgumentError, match=r"redis\+sentinel://.*use .*sentinel://") as caught:
        Settings.from_connection(connection(hostname="sentinel://:secret@host"))
    assert "secret" not in str(caught.value)


def test_a_remedy_follows_what_the_server_said() -> None:
    said = ReplyError("WRONGPASS invalid username-password pair or user is disabled.")
    assert str(to_error(said, server="host:1")).endswith("disabled. (check user name and password)")


def test_options_of_kombu_are_read() -> None:
    settings = of_options(
        socket_timeout="2.5",
        socket_connect_timeout=3,
        health_check_interval=None,
        retry_on_timeout="yes",
        client_name="worker-1",
        protocol=2,
        max_connections=10,
        socket_keepalive=False,
    )
    assert settings.socket_timeout == 2.5
    assert settings.connect_timeout == 3
    assert settings.health_check_interval == 0
    assert settings.retry_on_timeout is truth("yes")
    assert settings.client_name == "worker-1"
    assert settings.protocol == 2
    assert settings.socket_options.keepalive is False


def test_socket_options_by_number_and_by_name() -> None:
    number = socket.TCP_KEEPCNT
    for key in (number, "TCP_KEEPCNT"):
        settings = of_options(socket_keepalive=True, socket_keepalive_options={key: 3})
        assert settings.socket_options.extra == {(socket.IPPROTO_TCP, number): 3}


def test_the_bound_of_the_connection_is_used_unless_the_option_says_otherwise() -> None:
    assert Settings.from_connection(connection(connect_timeout=2)).connect_timeout == 2
    both = connection(connect_timeout=2, transport_options={"socket_connect_timeout": 1})
    assert Settings.from_connection(both).connect_timeout == 1


def test_tls_options_have_the_names_of_redis_py() -> None:
    options = {
        "ssl_cert_reqs": ssl.CERT_NONE,
        "ssl_ca_certs": None,
        "ssl_check_hostname": "no",
        "ssl_ca_path": None,
    }
    settings = Settings.from_connection(connection(ssl=options))
    with pytest.warns(UserWarning, match="does not verify the certificate"):
        context, name = settings.tls()
    assert context is not None
    assert context.verify_mode == ssl.CERT_NONE
    assert name == "localhost"


@pytest.mark.parametrize("given", ["required", "CERT_REQUIRED", ssl.CERT_REQUIRED])
def test_certificates_are_verified(given: Any) -> None:
    settings = Settings.from_connection(connection(ssl={"ssl_cert_reqs": given}))
    context, _ = settings.tls()
    assert context is not None
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname


def test_the_name_of_the_transport_asks_for_tls() -> None:
    context, _ = Settings.from_connection(connection(), tls=True).tls()
    assert context is not None
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert Settings.from_connection(connection()).tls() == (None, None)


def test_an_unknown_tls_option_is_named() -> None:
    with pytest.raises(ValueError, match="cert_regs"):
        Settings.from_connection(connection(ssl={"ssl_cert_regs": "none"})).tls()


class Provider:
    """As redis-py's credential providers."""

    given: Any = ("app", "secret")

    def get_credentials(self) -> Any:
        return self.given


@pytest.mark.parametrize("provider", [Provider(), Provider, f"{__name__}.Provider"])
def test_a_credential_provider_is_asked(provider: Any) -> None:
    assert of_options(credential_provider=provider).credentials() == ("app", "secret")


def test_a_provider_of_a_password_alone() -> None:
    provider = Provider()
    provider.given = ("secret",)
    assert of_options(credential_provider=provider).credentials() == (None, "secret")


@pytest.mark.parametrize("given", [None, "secret", ("a", "secret", "c"), (1, "secret"), ()])
def test_a_provider_that_returns_nonsense_is_an_error_without_secrets(given: Any) -> None:
    provider = Provider()
    provider.given = given
    with pytest.raises(ValueError, match="get_credentials") as caught:
        of_options(credential_provider=provider).credentials()
    assert "secret" not in str(caught.value)


# -- errors


REPLIES = [
    ("READONLY You can't write against a read only replica.", "ReadOnlyError", True),
    ("LOADING Redis is loading the dataset in memory", "BusyLoadingError", True),
    ("MASTERDOWN Link with MASTER is down", "MasterDownError", True),
    ("CLUSTERDOWN The cluster is down", "ClusterDownError", True),
    ("NOAUTH Authentication required.", "AuthenticationError", True),
    ("WRONGPASS invalid username-password pair", "AuthenticationError", True),
    ("ERR max number of clients reached", "ConnectionError", True),
    ("WRONGTYPE Operation against a key", "ResponseError", False),
    ("OOM command not allowed", "OutOfMemoryError", False),
    ("NOPERM this user has no permissions", "NoPermissionError", False),
    (
        "ERR The user executing the script can't run this command or subcommand script: f00",
        "NoPermissionError",
        False,
    ),
    ("NOSCRIPT No matching script", "NoScriptError", False),
    ("EXECABORT Transaction discarded", "ExecAbortError", False),
    ("TRYAGAIN Multiple keys request", "TryAgainError", False),
    ("CROSSSLOT Keys in request", "ClusterCrossSlotError", False),
    ("MOVED 1 127.0.0.1:7000", "ResponseError", False),
    ("ERR something", "ResponseError", False),
    ("", "ResponseError", False),
]


@pytest.mark.parametrize(("text", "name", "ends"), REPLIES, ids=[each[0] for each in REPLIES])
def test_an_error_is_redis_pys_and_ours(text: str, name: str, ends: bool) -> None:
    from redis import exceptions as redis_py

    error = to_error(ReplyError(text), server="h:1", what="POP")
    assert isinstance(error, getattr(redis_py, name))
    assert isinstance(error, ServerError) is ends
    assert isinstance(error, CommandError) is not ends
    assert isinstance(error, CONNECTION_ERRORS if ends else CHANNEL_ERRORS)
    assert not (isinstance(error, CONNECTION_ERRORS) and not ends)
    assert "h:1" in str(error)
    assert text in str(error)
    for other in (pickle.loads(pickle.dumps(error)), copy_of(error)):
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert other.__dict__ == error.__dict__
    assert str(error) in repr(error) or repr(str(error)) in repr(error)


def test_the_code_of_a_refusal_is_kept() -> None:
    error = to_error(ReplyError("WRONGTYPE x"), server="h:1")
    assert isinstance(error, CommandError)
    assert error.code == "WRONGTYPE"
    assert pickle.loads(pickle.dumps(error)).code == "WRONGTYPE"


def test_a_text_of_the_server_that_repeats_the_arguments_is_cut() -> None:
    text = "ERR unknown command 'AUTH', with args beginning with: 'secret' "
    assert "secret" not in str(to_error(ReplyError(text), server="h:1"))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("ERR DB index is out of range", NoSuchDatabaseError),
        ("ERR invalid password", LoginRefusedError),
        ("READONLY x", ReadOnlyError),
    ],
)
def test_the_remedy_is_said(text: str, kind: type[Exception]) -> None:
    error = to_error(ReplyError(text), server="h:1")
    assert type(error) is kind
    assert str(error).endswith(("databases", "password", "master"))


def test_a_timeout_is_every_kind_of_timeout() -> None:
    from redis.exceptions import TimeoutError as OfRedisPy

    error = CommandTimeoutError("late")
    assert isinstance(error, OfRedisPy)
    assert isinstance(error, TimeoutError)
    assert isinstance(error, CONNECTION_ERRORS)
    assert str(pickle.loads(pickle.dumps(error))) == "late"
