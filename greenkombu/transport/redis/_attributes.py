"""What programs may set of a Redis channel, and use of it, by Kombu's names.

A name that a Redis transport of Kombu has is here if it can mean the same.  How a program says
what it wants, in this order: a transport option; an attribute of its own subclass of `Channel`; the
default here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from greenkombu.exceptions import ArgumentError
from greenkombu.transport.redis._client import make_client
from greenkombu.transport.redis._keys import NAMES, PRIORITY_STEPS, SEPARATOR
from greenkombu.transport.redis._options import HEALTH_CHECK_INTERVAL, read_seconds
from greenkombu.transport.virtual import base as virtual

if TYPE_CHECKING:
    from greenkombu.transport.redis.connection import Connection
    from greenkombu.transport.virtual.consumers import Consumer

__all__ = ["Attributes", "check_options"]

#: Where None means that the program did not say anything.
_NEEDED = (
    "sep",
    "priority_steps",
    "priority_order",
    "queue_order_strategy",
    "unacked_key",
    "unacked_index_key",
    "unacked_mutex_key",
    "unacked_mutex_expire",
    "visibility_timeout",
    "global_keyprefix",
    "ack_emulation",
)

#: Values of options that are words.
_WORDS = {
    "priority_order": ("kombu", "amqp"),
    "queue_order_strategy": ("round_robin", "sorted", "priority"),
}


class Attributes:
    """Names of keys, times, orders; and a client of redis-py for the program's own commands.

    Attributes:
        sep: between the name of a queue and a priority, and between the parts of a binding.
        priority_steps: priorities that have a list of their own; others count as the next lower
            one.
        priority_order: "kombu", where 0 is served first, or "amqp", where 9 is.
        queue_order_strategy: which of several queues is asked when the prefetch limit leaves room
            for one: "round_robin", "sorted" by name, "priority" as they were consumed.
        visibility_timeout: seconds without a sign of life of its consumer, after which a message
            goes back.
        unacked_key, unacked_index_key, unacked_mutex_key: where unacknowledged messages are kept.
        unacked_mutex_expire: seconds for which one client may look for lost messages.
        unacked_restore_limit: messages that it puts back at a time; None takes 100.
        ack_emulation: False lets a delivery count as acknowledged.
        fanout_prefix: of the channels of fanout exchanges; True takes `keyprefix_fanout`, False
            none.
        fanout_patterns: None: a binding key with a wildcard is a pattern, and others mean
            nothing, as in AMQP. True: each binding key is a pattern. False: none means anything.
        global_keyprefix: before the names of all keys and channels.
        keyprefix_queue, keyprefix_binding_permanent: the sets with the bindings of an exchange.
        keyprefix_fanout: see `fanout_prefix`; ``{db}`` is the number of the database.
        socket_timeout, socket_connect_timeout: seconds for a command, and for connecting.
        socket_keepalive, socket_keepalive_options: of TCP.
        health_check_interval: seconds of silence after which the server is asked whether it lives.
        client_name: what CLIENT LIST shows.
    """

    sep: str = SEPARATOR
    priority_steps: Sequence[int] = list(PRIORITY_STEPS)
    priority_order: str = "kombu"
    queue_order_strategy: str = "round_robin"
    visibility_timeout: float = 3600
    unacked_key: str = NAMES["unacked_key"]
    unacked_index_key: str = NAMES["unacked_index_key"]
    unacked_mutex_key: str = NAMES["unacked_mutex_key"]
    unacked_mutex_expire: float = 300
    unacked_restore_limit: int | None = None
    ack_emulation: bool = True
    fanout_prefix: bool | str = True
    fanout_patterns: bool | None = None
    global_keyprefix: str = ""
    keyprefix_queue: str = NAMES["keyprefix_queue"]
    keyprefix_binding_permanent: str = NAMES["keyprefix_binding_permanent"]
    keyprefix_fanout: str = NAMES["keyprefix_fanout"]
    socket_timeout: float | None = None
    socket_connect_timeout: float | None = None
    socket_keepalive: bool | None = None
    socket_keepalive_options: Mapping[int, int] | None = None
    health_check_interval: float | None = HEALTH_CHECK_INTERVAL
    client_name: str | None = None

    supports_fanout = True
    supports_batch_publish = True

    from_transport_options = (
        *virtual.Channel.from_transport_options,
        "sep",
        "priority_steps",
        "priority_order",
        "queue_order_strategy",
        "visibility_timeout",
        "unacked_key",
        "unacked_index_key",
        "unacked_mutex_key",
        "unacked_mutex_expire",
        "unacked_restore_limit",
        "ack_emulation",
        "fanout_prefix",
        "fanout_patterns",
        "global_keyprefix",
        "socket_timeout",
        "socket_connect_timeout",
        "socket_keepalive",
        "socket_keepalive_options",
        "health_check_interval",
        "client_name",
    )

    # What a channel has.
    redis: Connection
    _consumers: dict[str, Consumer]
    _fanout_queues: dict[str, Any]

    _client: Any = None
    _subclient: Any = None

    @classmethod
    def options(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return transport options, and the attributes of this class where there are none.

        Args:
            given: what the program gave with its connection.
        """
        names = (*cls.from_transport_options, *NAMES)
        found = {name: getattr(cls, name) for name in names if hasattr(cls, name)}
        for name, value in given.items():
            if value is not None or name not in _NEEDED:
                found[name] = value
        return found

    def priority(self, n: Any) -> int:
        """Return the step of `priority_steps` that a priority counts as."""
        return self.redis.keys.step_of(n)

    @property
    def active_queues(self) -> list[str]:
        """The queues that are consumed on this channel, without those of fanout exchanges."""
        queues = dict.fromkeys(each.queue for each in list(self._consumers.values()))
        return [queue for queue in queues if queue not in self._fanout_queues]

    # -- redis-py

    @property
    def client(self) -> Any:
        """A client of redis-py for the same server, for the program's own commands.

        It has sockets of its own, opened when they are needed, and puts `global_keyprefix` before
        the names of keys as the channel does.
        """
        if self._client is None:
            self._client = make_client(self.redis.settings, self.redis.keys.prefix)
        return self._client

    @property
    def subclient(self) -> Any:
        """The client's `pubsub()`, for subscriptions of the program's own."""
        if self._subclient is None:
            self._subclient = self.client.pubsub()
        return self._subclient

    @property
    def pool(self) -> Any:
        """The client's pool of connections."""
        return self.client.connection_pool

    async_pool = pool

    def pipeline(self) -> Any:
        """Return a pipeline of the client: commands that go together."""
        return self.client.pipeline()

    @contextlib.contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        """Give the block a client of redis-py.

        Args:
            client: to use; None takes the channel's.
        """
        yield self.client if client is None else client

    def _close_client(self) -> None:
        client, self._client = self._client, None
        subclient, self._subclient = self._subclient, None
        for each in (subclient, client):
            if each is not None:
                each.close()


#: Options that are texts, and whether those may be empty.
_TEXTS = {
    "sep": False,
    "unacked_key": False,
    "unacked_index_key": False,
    "unacked_mutex_key": False,
    "global_keyprefix": True,
}


def check_options(options: Mapping[str, Any]) -> None:
    """Raise if an option that is a word is another one, or one that is a text is none.

    Raises:
        ArgumentError: it names the option, and the words.
    """
    for name, may_be_empty in _TEXTS.items():
        value = options.get(name)
        if value is not None and not (isinstance(value, str) and (value or may_be_empty)):
            which = "" if may_be_empty else " that is not empty"
            raise ArgumentError(f"the transport option {name} is a text{which}, not {value!r:.100}")
    if options.get("polling_interval"):
        read_seconds(options, "polling_interval", 1.0)
    for name, words in _WORDS.items():
        if options.get(name) not in (None, *words):
            raise ArgumentError(
                f"the transport option {name} is one of {', '.join(words)}, not"
                f" {options[name]!r:.100}"
            )
