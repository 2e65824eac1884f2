"""The hierarchy of greenkombu.exceptions (behaviours 33-35)."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
import traceback

import amqp.exceptions
import pytest

from greenkombu import exceptions

KOMBU_NAMES = [
    "BatchPublishError",
    "ChannelError",
    "ChannelLimitExceeded",
    "ConnectionError",
    "ConnectionLimitExceeded",
    "ContentDisallowed",
    "DecodeError",
    "EncodeError",
    "HttpError",
    "InconsistencyError",
    "KombuError",
    "LimitExceeded",
    "MessageStateError",
    "NotBoundError",
    "OperationalError",
    "ResourceError",
    "SerializationError",
    "SerializerNotInstalled",
    "StdChannelError",
    "TimeoutError",
    "VersionMismatch",
]

CLASSES = [
    value
    for name in exceptions.__all__
    if isinstance(value := getattr(exceptions, name), type)
    and value.__module__ == "greenkombu.exceptions"
]


def sample(kind: type[BaseException]) -> BaseException:
    return kind(503, "busy") if kind is exceptions.HttpError else kind("what failed", (60, 40))


@pytest.mark.parametrize("name", KOMBU_NAMES)
def test_names_of_kombu_and_of_the_manual_exist(name: str) -> None:
    assert issubclass(getattr(exceptions, name), BaseException)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_b034_every_error_of_ours_is_a_kombu_error(kind: type[BaseException]) -> None:
    assert issubclass(kind, exceptions.KombuError)


def test_b035_timeout_error_is_socket_timeout() -> None:
    assert exceptions.TimeoutError is socket.timeout


def test_amqp_errors_are_the_amqp_packages_own() -> None:
    assert exceptions.ConnectionError is amqp.exceptions.ConnectionError
    assert exceptions.ChannelError is amqp.exceptions.ChannelError
    assert exceptions.ResourceError is amqp.exceptions.ResourceError


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_errors_pickle_with_arguments_and_attributes(kind: type[BaseException]) -> None:
    error = sample(kind)
    error.extra = {"queue": "q"}  # type: ignore[attr-defined]
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert copy.args == error.args
    assert copy.__dict__ == error.__dict__
    assert str(copy) == str(error)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_errors_show_their_text(kind: type[BaseException]) -> None:
    text = "no queue 'video'; declare it"
    error = exceptions.HttpError(404, text) if kind is exceptions.HttpError else kind(text)
    assert text in str(error)
    shown = "".join(traceback.format_exception_only(kind, error))
    assert shown.startswith(f"greenkombu.exceptions.{kind.__name__}: ")


@pytest.mark.parametrize(
    ("kind", "bases"),
    [
        ("ContentDisallowed", [exceptions.SerializerNotInstalled]),
        ("NestingTooDeep", [exceptions.EncodeError, exceptions.DecodeError]),
        ("DecompressionBomb", [exceptions.BodyTooLarge, exceptions.DecodeError]),
        ("CompressorNotInstalled", [KeyError]),
        ("TransportNotFound", [KeyError, ImportError]),
        ("InvalidURL", [ValueError]),
        ("UnsupportedOperation", [NotImplementedError]),
        ("ConfirmTimeoutError", [TimeoutError]),
        ("InconsistencyError", [amqp.exceptions.ConnectionError]),
        ("ConnectionClosedError", [amqp.exceptions.RecoverableConnectionError]),
        ("StaleDeliveryError", [amqp.exceptions.RecoverableConnectionError]),
        ("ChannelClosedError", [exceptions.StdChannelError, amqp.exceptions.ChannelError]),
        ("NotFoundError", [exceptions.StdChannelError, amqp.exceptions.NotFound]),
        ("NotEquivalentError", [exceptions.StdChannelError, amqp.exceptions.PreconditionFailed]),
        ("DeliveryError", [exceptions.StdChannelError, amqp.exceptions.MessageNacked]),
        ("UnroutableError", [exceptions.StdChannelError, amqp.exceptions.ChannelError]),
    ],
)
def test_new_errors_are_caught_by_what_kombu_programs_catch(
    kind: str, bases: list[type[BaseException]]
) -> None:
    for base in bases:
        assert issubclass(getattr(exceptions, kind), base)


def test_amqp_reply_codes_are_kept() -> None:
    error = exceptions.NotFoundError("NOT_FOUND - no queue 'q'", (50, 10))
    assert (error.code, error.reply_code, error.method_name) == (404, 404, "Queue.declare")
    assert str(error) == "Queue.declare: (404) NOT_FOUND - no queue 'q'"


@pytest.mark.parametrize("text", [None, "nothing is bound to 'x'", "NO_ROUTE"])
def test_unroutable_error_names_no_route(text: str | None) -> None:
    error = exceptions.UnroutableError(text)
    assert str(error).count("NO_ROUTE") == 1
    assert error.reply_code == 312


def test_http_error_has_kombus_fields() -> None:
    error = exceptions.HttpError(404, "nope", response="r")
    assert (error.code, error.message, error.response) == (404, "nope", "r")
    assert str(error) == "HTTP 404: nope"


def test_reraise_keeps_the_given_traceback() -> None:
    try:
        raise ValueError("first")
    except ValueError as exc:
        error, tb = exc, exc.__traceback__
    with pytest.raises(ValueError, match="first") as caught:
        exceptions.reraise(ValueError, error.with_traceback(None), tb)
    assert tb in [entry._rawentry for entry in caught.traceback]


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="NoSuchError"):
        exceptions.NoSuchError  # noqa: B018
    assert {"ChannelError", "KombuError"} <= set(dir(exceptions))


def test_importing_exceptions_imports_no_socket() -> None:
    script = (
        "import sys, greenkombu.exceptions\n"
        "bad = {'socket', '_socket', 'ssl', 'select', 'threading', 'amqp'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(bad)) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_lazy_names_are_exactly_those_of_the_private_module() -> None:
    from greenkombu import _broker_exceptions

    assert frozenset(_broker_exceptions.__all__) == exceptions._LAZY
