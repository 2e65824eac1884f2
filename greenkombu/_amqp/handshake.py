"""The opening dialogue, without I/O: methods in, methods out.

::

    client                      broker            state afterwards
    protocol header       ->                      STARTING
                          <-    Connection.start
    Connection.start_ok   ->                      LOGIN
                          <-    Connection.secure     (any number)
    Connection.secure_ok  ->                      LOGIN
                          <-    Connection.tune
    Connection.tune_ok    ->
    Connection.open       ->                      OPENING
                          <-    Connection.open_ok
                                                  OPEN

The broker may end it in each state by Connection.close, or by closing the socket; `refused` and
`cut_off` make the error that says what that means there and what to do about it.
Source: AMQP 0-9-1, 2.2.4 and the grammar of class connection; RabbitMQ's "Authentication Failure
Notifications".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import lru_cache
from typing import Any

from amqp import sasl
from amqp.exceptions import ConnectionError as AMQPConnectionError
from amqp.exceptions import error_for_code

from greenkombu._amqp.errors import (
    ConnectionLostError,
    HandshakeError,
    LoginRefusedError,
    MechanismError,
    UnexpectedFrameError,
    VirtualHostError,
)
from greenkombu._amqp.methods import BY_NAME, Method
from greenkombu._amqp.protocol import DEFAULT_FRAME_MAX, MethodEvent
from greenkombu._amqp.refusals import remedy_for
from greenkombu._amqp.values import EncodedTable, encode_table

__all__ = ["FRAME_MIN", "Handshake", "State", "closed_by_broker", "known", "make_authentication"]

#: Smallest frame_max that both sides have to accept (AMQP 0-9-1, 4.9).
FRAME_MIN = 4096

#: What RabbitMQ offers by default.
DEFAULT_CHANNEL_MAX = 2047

#: What we can do, where the broker can do it, too.
CAPABILITIES = (
    "authentication_failure_close",
    "basic.nack",
    "connection.blocked",
    "consumer_cancel_notify",
    "exchange_exchange_bindings",
    "publisher_confirms",
)

Step = tuple[Method, tuple[Any, ...]]


class State(Enum):
    """Where the dialogue is: what the broker has to say next."""

    STARTING = "before the broker said anything"
    LOGIN = "during the login"
    OPENING = "while opening the virtual host"
    OPEN = "after the handshake"


def make_authentication(
    login_method: str | None, userid: str | None, password: str | None, response: Any = None
) -> tuple[Any, ...]:
    """Return the SASL mechanisms to try, in order of preference.

    Args:
        login_method: PLAIN, AMQPLAIN, EXTERNAL, GSSAPI; None lets the broker choose between
            PLAIN and AMQPLAIN, and EXTERNAL without a user name.
        response: for any other method: what to answer, as bytes.

    Raises:
        ValueError: a method that is not known.
    """
    if login_method is None:
        if userid is None or password is None:
            return (sasl.EXTERNAL(),)
        return (sasl.PLAIN(userid, password), sasl.AMQPLAIN(userid, password))
    method = login_method.upper()
    if method == "EXTERNAL":
        return (sasl.EXTERNAL(),)
    if method == "GSSAPI":
        return (sasl.GSSAPI(userid),)
    if method in ("PLAIN", "AMQPLAIN"):
        if userid is None or password is None:
            raise ValueError(f"login_method {method} needs a user name and a password")
        kind = sasl.PLAIN if method == "PLAIN" else sasl.AMQPLAIN
        return (kind(userid, password),)
    if response is not None:
        return (_Raw(login_method.encode(), bytes(response)),)
    raise ValueError(
        f"unknown login_method {login_method!r}: use PLAIN, AMQPLAIN, EXTERNAL or GSSAPI"
    )


class _Raw:
    """A mechanism of the caller's own: a name and a fixed answer."""

    def __init__(self, mechanism: bytes, response: bytes) -> None:
        self.mechanism = mechanism
        self.response = response

    def start(self, connection: Any) -> bytes:  # noqa: ARG002  the SASL interface
        return self.response


# Those that do nothing but put bytes together.
_PURE = (sasl.PLAIN, sasl.AMQPLAIN, sasl.EXTERNAL, _Raw)


def closed_by_broker(
    code: int, text: str, signature: tuple[int, int], broker: str
) -> BaseException:
    """Make the error for Connection.close of an open connection."""
    remedy = remedy_for(code, text, signature, of_channel=False)
    message = f"{text} (broker {broker}{remedy})"
    error: BaseException = error_for_code(code, message, known(signature), AMQPConnectionError)
    return error


def known(signature: tuple[int, int]) -> tuple[int, int] | None:
    """Return the signature of the method at fault; None where the broker names none."""
    return signature if signature != (0, 0) else None


# What brokers say of themselves, and what we say to them, is the same for thousands of
# connections: a few are kept, and nobody changes them.


@lru_cache(16)
def _mechanisms(words: str) -> list[bytes]:
    return words.encode().split()


@lru_cache(16)
def _locales(words: str) -> list[str]:
    return words.split()


@lru_cache(32)
def _introduction(
    properties: tuple[tuple[str, str], ...], agreed: tuple[str, ...]
) -> tuple[dict[str, Any], EncodedTable]:
    """Return what the client says of itself, as a table and encoded."""
    table = {**dict(properties), "capabilities": dict.fromkeys(agreed, True)}
    return table, EncodedTable(encode_table(table, "client_properties"))


class Handshake:
    """The client's side of the dialogue.

    Args:
        authentication: SASL mechanisms in order of preference (see `amqp.sasl`).
        virtual_host, locale, client_properties: what goes to the broker.
        heartbeat: seconds that we want; 0 turns heartbeats off whatever the broker wants.
        channel_max, frame_max: upper bounds of ours; 0 or None leaves it to the broker.
        broker: "host:port" for errors.
        user: the user name, for errors.
        connection: passed to the mechanisms (GSSAPI looks at its socket).

    Attributes:
        state: see `State`; OPEN when it is complete.
        server_properties, mechanisms, locales, version: what the broker said of itself.
        channel_max, frame_max, heartbeat, server_heartbeat: what was agreed, from OPENING on.
    """

    def __init__(
        self,
        authentication: Sequence[Any],
        *,
        virtual_host: str,
        locale: str,
        client_properties: dict[str, Any],
        heartbeat: float,
        channel_max: int | None,
        frame_max: int | None,
        broker: str,
        user: str | None,
        connection: Any = None,
    ) -> None:
        self.state = State.STARTING
        self.authentication = authentication
        self.virtual_host = virtual_host
        self.locale = locale
        self.client_properties = client_properties
        self.client_heartbeat = heartbeat
        self.server_heartbeat = 0
        self.heartbeat: float = 0
        self.channel_max = channel_max or 0
        self.frame_max = frame_max or DEFAULT_FRAME_MAX
        self.server_properties: dict[str, Any] = {}
        self.mechanisms: list[bytes] = []
        self.locales: list[str] = []
        self.version = (0, 9)
        self.broker = broker
        self.user = user
        self._connection = connection
        self._mechanism: Any = None

    @property
    def only_makes_bytes(self) -> bool:
        """Whether `receive` can neither wait nor call a user's code."""
        return all(type(each) in _PURE for each in self.authentication)

    def forget_connection(self) -> None:
        """Let go of the connection: the dialogue is complete, and outlives it."""
        self._connection = None

    def receive(self, event: MethodEvent) -> list[Step]:
        """Take the broker's next method; return what to answer.

        Raises:
            HandshakeError: the broker, or we, cannot go on; the connection has to be aborted.
            ProtocolError: the method is not due.
        """
        name = event.method.name
        if name == "Connection.close":
            code, text, class_id, method_id = event.arguments
            raise self.refused(code, text, (class_id, method_id))
        step = _STEPS[self.state].get(name)
        if step is None:
            raise UnexpectedFrameError(
                f"broker {self.broker} sent {name} {self.state.value}", event.method.signature
            )
        return step(self, *event.arguments)

    # -- the steps

    def _on_start(
        self, major: int, minor: int, properties: dict[str, Any], mechanisms: str, locales: str
    ) -> list[Step]:
        self.version = (major, minor)
        if self.version != (0, 9):
            raise HandshakeError(
                f"broker {self.broker} speaks AMQP {major}.{minor}; version 0.9.1 is needed"
            )
        self.server_properties = properties
        self.mechanisms = _mechanisms(mechanisms)
        self.locales = _locales(locales)
        introduction = self._introduce(properties.get("capabilities"))
        mechanism, response = self._choose_mechanism()
        self.state = State.LOGIN
        return [
            (BY_NAME["Connection.start_ok"], (introduction, mechanism, response, self.locale)),
        ]

    def _introduce(self, theirs: Any) -> Mapping[str, Any] | EncodedTable:
        """Add the capabilities that both have to `client_properties`; return them for sending."""
        if not isinstance(theirs, dict):
            return self.client_properties
        agreed = tuple(name for name in CAPABILITIES if theirs.get(name))
        if not agreed:
            return self.client_properties
        ours = self.client_properties
        if all(type(value) is str for value in ours.values()):
            self.client_properties, encoded = _introduction(tuple(ours.items()), agreed)
            return encoded
        capabilities = {**dict.fromkeys(agreed, True), **(ours.get("capabilities") or {})}
        self.client_properties = {**ours, "capabilities": capabilities}
        return self.client_properties

    def _choose_mechanism(self) -> tuple[bytes, bytes]:
        for candidate in self.authentication:
            if candidate.mechanism and candidate.mechanism in self.mechanisms:
                response = candidate.start(self._connection)
                if response is not NotImplemented:
                    self._mechanism = candidate
                    return candidate.mechanism, response
        ours = b", ".join(each.mechanism for each in self.authentication if each.mechanism)
        theirs = b", ".join(self.mechanisms)
        raise MechanismError(
            f"broker {self.broker} offers the login mechanisms {theirs.decode() or 'none'};"
            f" allowed here: {ours.decode() or 'none'} (login_method)"
        )

    def _on_secure(self, challenge: str) -> list[Step]:
        respond: Callable[[bytes], bytes] | None = getattr(self._mechanism, "step", None)
        if respond is None:
            name = self._mechanism.mechanism.decode()
            raise MechanismError(
                f"broker {self.broker} asks a further question, which login mechanism {name} has"
                " no answer to"
            )
        answer = respond(challenge.encode("utf-8", "surrogateescape"))
        return [(BY_NAME["Connection.secure_ok"], (answer,))]

    def _on_tune(self, channel_max: int, frame_max: int, heartbeat: int) -> list[Step]:
        # Zero means "no limit" in all three (AMQP 0-9-1, connection.tune); 65535 is the number
        # space of channels.
        wanted = [number for number in (channel_max, self.channel_max) if number]
        self.channel_max = min(wanted, default=DEFAULT_CHANNEL_MAX)
        if frame_max:
            if frame_max < FRAME_MIN:
                raise HandshakeError(
                    f"broker {self.broker} allows frames of {frame_max} octets only; AMQP"
                    f" demands {FRAME_MIN}"
                )
            self.frame_max = min(frame_max, self.frame_max)
        self.frame_max = max(self.frame_max, FRAME_MIN)
        self.server_heartbeat = heartbeat
        self.heartbeat = _agree(heartbeat, self.client_heartbeat)
        self.state = State.OPENING
        return [
            (
                BY_NAME["Connection.tune_ok"],
                # The wire has whole seconds; rounding up keeps the broker patient.
                (self.channel_max, self.frame_max, -(-self.heartbeat // 1)),
            ),
            (BY_NAME["Connection.open"], (self.virtual_host, "", False)),
        ]

    def _on_open_ok(self, known_hosts: str) -> list[Step]:  # noqa: ARG002  RabbitMQ sends ""
        self.state = State.OPEN
        return []

    # -- the errors

    def refused(self, code: int, text: str, signature: tuple[int, int]) -> BaseException:
        """Make the error for Connection.close in the present state."""
        if code == 403:
            mechanism = self._mechanism.mechanism.decode() if self._mechanism else "?"
            return LoginRefusedError(
                f"broker {self.broker} refused the login of user {self.user!r} by {mechanism}:"
                f" {text} Check user name and password, and that this user may connect from here"
                " (RabbitMQ lets guest in from localhost only)",
                known(signature),
            )
        if code == 530 and self.state is State.OPENING:
            return VirtualHostError(
                f"broker {self.broker} refused virtual host {self.virtual_host!r} to user"
                f" {self.user!r}: {text}. Check its name (the URL's path; //name for /name) and the"
                " user's permissions",
                known(signature),
            )
        error: BaseException = error_for_code(
            code,
            f"broker {self.broker} ended the handshake {self.state.value}: {text}"
            + (f" (virtual host {self.virtual_host!r})" if code == 402 else ""),
            known(signature),
            AMQPConnectionError,
        )
        return error

    def cut_off(self, cause: BaseException | None) -> BaseException:
        """Make the error for a socket that was closed in the present state."""
        reason = f" ({cause})" if cause is not None else ""
        if self.state is State.STARTING:
            return ConnectionLostError(
                f"broker {self.broker} closed the connection {self.state.value}{reason}: is this"
                " the AMQP port, plain or TLS as asked for?"
            )
        theirs = self.server_properties.get("capabilities") or {}
        if self.state is State.LOGIN and not theirs.get("authentication_failure_close"):
            # Without that capability a broker refuses a login by closing the socket.
            return LoginRefusedError(
                f"broker {self.broker} closed the connection {self.state.value}{reason}: check the"
                f" user name ({self.user!r}) and the password"
            )
        hint = f": check virtual host {self.virtual_host!r}" if self.state is State.OPENING else ""
        return ConnectionLostError(
            f"broker {self.broker} closed the connection {self.state.value}{reason}{hint}"
        )


_STEPS: dict[State, dict[str, Callable[..., list[Step]]]] = {
    State.STARTING: {"Connection.start": Handshake._on_start},
    State.LOGIN: {
        "Connection.secure": Handshake._on_secure,
        "Connection.tune": Handshake._on_tune,
    },
    State.OPENING: {"Connection.open_ok": Handshake._on_open_ok},
    State.OPEN: {},
}


def _agree(server: float, client: float) -> float:
    """Return the smaller wish; ours to switch it off, as Kombu's users know it."""
    if not client:
        return 0
    return min(server, client) if server else client
