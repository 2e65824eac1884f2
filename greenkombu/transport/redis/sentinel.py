"""Redis Sentinel: who is the master is asked at each connecting.

``sentinel://:password@one:26379/0;sentinel://two:26379`` names sentinels; user name, password and
the number of the database are those of the master.  The sentinels are asked one after the other,
first the one that answered last time.  None may take more than its share of the time for
connecting, so one that hangs costs a part of it, once.  What a sentinel names must say itself that
it is the master; a sentinel that was cut off may name an old one.

A failover ends the connections: the old master is dead, or closes them, or answers READONLY when it
has become a replica.  Whoever connects again, as consumers do by themselves, asks again.  What the
old master had accepted and not passed on to its replica is lost then: Redis replicates without
waiting (``min-replicas-to-write`` and ``min-replicas-max-lag`` of the server bound that).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from time import monotonic
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from redis import sentinel as redis_py

from greenkombu.transport.redis._errors import (
    ArgumentError,
    CommandTimeoutError,
    LoginRefusedError,
    ReplyError,
    ServerError,
    to_error,
)
from greenkombu.transport.redis._fanout import Fanout
from greenkombu.transport.redis._keys import Keys
from greenkombu.transport.redis._options import Settings
from greenkombu.transport.redis._payload import dumps
from greenkombu.transport.redis._seeds import SeededTransport
from greenkombu.transport.redis._wire import Wire
from greenkombu.transport.redis.channel import Channel
from greenkombu.transport.redis.connection import Connection

if TYPE_CHECKING:
    from greenkombu.transport.redis._fanout import FanoutQueue

__all__ = [
    "MasterNotFoundError",
    "SentinelChannel",
    "SentinelConnection",
    "SentinelRefusedError",
    "SentinelTransport",
]

logger = logging.getLogger(__name__)

PORT = 26379

#: Broadcast messages that are remembered, to drop their second copies; Kombu's number.
REMEMBERED = 1000


class MasterNotFoundError(ServerError, redis_py.MasterNotFoundError):
    """No sentinel names a master that is one; during a failover there is none for a while."""


class SentinelRefusedError(LoginRefusedError):
    """A sentinel, and not the master, does not let us in."""


class _Master(NamedTuple):
    """What one sentinel says of the master."""

    address: tuple[str, int]
    down: bool
    other_sentinels: int


class SentinelChannel(Channel):
    """A channel to the master.

    Transport options besides those of `Channel`: master_name, min_other_sentinels,
    sentinel_kwargs, sentinel_fanout_compat.
    """

    from_transport_options = (
        *Channel.from_transport_options,
        "master_name",
        "min_other_sentinels",
        "sentinel_kwargs",
    )
    master_name: str | None = None
    min_other_sentinels: int = 0
    sentinel_kwargs: Mapping[str, Any] | None = None

    redis: SentinelConnection

    def _broadcasts(self, exchange: str, message: Any, routing_key: str) -> list[tuple[Any, ...]]:
        old = self.redis.fanout_compat
        if old is None:
            return super()._broadcasts(exchange, message, routing_key)
        payload = dumps(message)
        return [("PUBLISH", channel, payload) for channel in old.channels(exchange, routing_key)]


class _CompatFanout(Fanout):
    """Meets Kombu before 5.6, which broadcasts on channels that begin with ``/{db}.`` literally."""

    def __init__(self, connection: SentinelConnection) -> None:
        super().__init__(connection)
        self._old_keys = Keys(connection.transport_options, "{db}")
        self._seen: dict[tuple[FanoutQueue, int], None] = {}

    def channels(self, exchange: str, routing_key: str) -> list[bytes]:
        """Return the channels of a message."""
        every = (self._connection.keys, self._old_keys)
        return list(dict.fromkeys(keys.fanout_channel(exchange, routing_key) for keys in every))

    def patterns(self, exchange: str, routing_key: str, keys: Keys | None = None) -> list[bytes]:
        """Return what a binding is subscribed to."""
        patterns = super().patterns
        return [
            *patterns(exchange, routing_key, keys),
            *patterns(exchange, routing_key, self._old_keys),
        ]

    def received(self, pattern: bytes, data: bytes) -> None:
        """Give a message to the queues that have not had it; in the hub."""
        seen, number = self._seen, hash(data)
        for queue in list(self._queues.get(pattern, ())):
            # Each message has a delivery tag of its own.
            if (queue, number) in seen:
                continue
            seen[queue, number] = None
            queue.received(pattern, data)
        while len(seen) > REMEMBERED:
            del seen[next(iter(seen))]


class SentinelConnection(Connection):
    """A connection to the master that the sentinels name."""

    redis_transport: SentinelTransport

    def __init__(self, transport: SentinelTransport, settings: Settings) -> None:
        super().__init__(transport, settings)
        #: Broadcasts under Kombu's older names as well; None if that was not asked for.
        self.fanout_compat: _CompatFanout | None = None
        if self.transport_options.get("sentinel_fanout_compat"):
            self.fanout = self.fanout_compat = _CompatFanout(self)

    def _open_wire(self, settings: Settings, **options: Any) -> Wire:
        until = monotonic() + options.pop("timeout")
        transport = self.redis_transport
        name, sentinels = transport.master_name, transport.sentinels
        least = transport.min_other_sentinels
        failures: list[Exception] = []
        for number, sentinel in enumerate(sentinels):
            share = max(until - monotonic(), 0.0) / (len(sentinels) - number + 1)
            try:
                address = self._ask(sentinel, name, least, share)
                found = replace(settings, address=address)
                # The rest of the time, but for what the other sentinels may need.
                share = max(until - monotonic(), 0.0) / (len(sentinels) - number)
                wire = super()._open_wire(found, timeout=share, **options)
            except (CommandTimeoutError, ServerError) as exc:
                if isinstance(exc, LoginRefusedError) and not isinstance(exc, SentinelRefusedError):
                    raise  # the master's word
                failures.append(exc)
                continue
            if wire.server.get("role") == "master":
                self.settings = found
                transport.prefer(sentinel)
                return wire
            wire.abort()
            failures.append(
                MasterNotFoundError(
                    f"{wire.peer}, which sentinel {sentinel.peer} names, is a"
                    f" {wire.server.get('role')}"
                )
            )
        if all(isinstance(each, LoginRefusedError) for each in failures):
            raise failures[-1]
        raise MasterNotFoundError(
            f"No master found for {name!r}: " + "; ".join(str(each) for each in failures)
        )

    def _ask(self, sentinel: Settings, name: str, least: int, timeout: float) -> tuple[str, int]:
        """Ask a sentinel where the master is; parks the task.

        Raises:
            MasterNotFoundError: it knows of none that can be used.
            ServerError: it cannot be asked.
        """
        until = monotonic() + timeout
        try:
            wire = Wire.connect(sentinel, on_push=_ignore, on_lost=_ignore, timeout=timeout)
        except LoginRefusedError as exc:
            raise SentinelRefusedError(
                f"{exc} (a sentinel has a login of its own: see the transport option"
                " sentinel_kwargs)"
            ) from exc
        try:
            replies = wire.call_many(
                [
                    ("SENTINEL", "MASTER", name),
                    ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name),
                ],
                max(until - monotonic(), 0.0),
                raises=False,
            )
        finally:
            wire.abort()
        for reply in replies:
            if isinstance(reply, ReplyError):
                raise MasterNotFoundError(
                    str(to_error(reply, server=wire.peer, what="SENTINEL MASTER"))
                )
        master = _master(*replies)
        if master is None:
            raise MasterNotFoundError(f"sentinel {sentinel.peer} does not know {name!r}")
        if master.down:
            raise MasterNotFoundError(f"sentinel {sentinel.peer} says that the master is down")
        if master.other_sentinels < least:
            raise MasterNotFoundError(
                f"sentinel {sentinel.peer} knows of {master.other_sentinels} others, and"
                f" min_other_sentinels is {least}"
            )
        return master.address


def _master(about: Any, address: Any) -> _Master | None:
    """Read what a sentinel says, in RESP2 or RESP3."""
    if not isinstance(about, dict):
        about = dict(zip(about[::2], about[1::2], strict=False))
    if not address:
        return None
    host, port = address[0].decode(), int(address[1])
    # In a failover, the address may be that of the next master already.
    same = about.get(b"ip", b"").decode() == host and int(about.get(b"port", 0)) == port
    flags = about.get(b"flags", b"").split(b",")
    return _Master(
        (host, port),
        same and (b"s_down" in flags or b"o_down" in flags),
        int(about.get(b"num-other-sentinels", 0)),
    )


class SentinelTransport(SeededTransport):
    """The Redis transport for a master that sentinels watch over: ``sentinel://``.

    Transport options besides those of `redis.Transport`:

    * master_name: what the sentinels call the master; it has to be given.
    * min_other_sentinels: a sentinel that knows of fewer others is not believed.
    * sentinel_kwargs: username, password, ssl, socket_timeout, ... of the sentinels, as redis-py
      has them. What the URL says is for the master.
    * sentinel_fanout_compat: broadcast also under the names of Kombu before 5.6.
    """

    Channel = SentinelChannel
    Connection = SentinelConnection

    default_port = PORT

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        self._preferred: Any = None

    @property
    def master_name(self) -> str:
        """What the sentinels call the master.

        Raises:
            ArgumentError: the transport option is missing.
        """
        name = self.transport_options.get("master_name")
        if not name:
            raise ArgumentError(
                "the transport option master_name must be given with sentinel://: what the"
                " sentinels call the master, as in transport_options={'master_name': 'mymaster'}"
            )
        return str(name)

    @property
    def min_other_sentinels(self) -> int:
        """Of how many others a sentinel has to know.

        Raises:
            ArgumentError: it is no number.
        """
        least = self.transport_options.get("min_other_sentinels") or 0
        try:
            return int(least)
        except (TypeError, ValueError):
            raise ArgumentError(
                f"the transport option min_other_sentinels is a number, not {least!r:.100}"
            ) from None

    @property
    def sentinels(self) -> list[Settings]:
        """How to reach each sentinel, in the order in which they are to be asked.

        Raises:
            ArgumentError: an option cannot be used.
        """
        options = self.transport_options.get("sentinel_kwargs") or {}
        if not isinstance(options, Mapping):
            raise ArgumentError(
                "the transport option sentinel_kwargs is a dict, such as {'password': ...}, not"
                f" a {type(options).__name__}"
            )
        found = [self._settings(*address, options) for address in self.seeds()]
        return sorted(found, key=lambda each: each.address != self._preferred)

    def _settings(self, host: str, port: int, options: Mapping[str, Any]) -> Settings:
        tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
        return Settings.from_connection(
            SimpleNamespace(
                hostname=host,
                port=port,
                userid=options.get("username"),
                password=options.get("password"),
                virtual_host=None,
                ssl=tls or bool(options.get("ssl")),
                connect_timeout=self.client.connect_timeout,
                transport_options=options,
            ),
        )

    def prefer(self, sentinel: Settings) -> None:
        """Ask this one first the next time."""
        self._preferred = sentinel.address


def _ignore(argument: Any) -> None:
    del argument
