"""Helpers that most programs share: declare once, broadcast, replies, event loops."""

from __future__ import annotations

import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import NAMESPACE_OID, uuid3, uuid4, uuid5

from greenkombu.abstract import Attributes, MaybeChannelBound
from greenkombu.deadline import Deadline, remaining
from greenkombu.entity import Exchange, Queue
from greenkombu.exceptions import NotBoundError
from greenkombu.utils.uuid import uuid
from hub import primitives
from hub.environment import get_environment

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from greenkombu.connection import Connection
    from greenkombu.messaging import Consumer, Producer

__all__ = [
    "Broadcast",
    "QoS",
    "collect_replies",
    "declaration_cached",
    "drain_consumer",
    "entry_to_queue",
    "eventloop",
    "generate_oid",
    "get_node_id",
    "ignore_errors",
    "insured",
    "ipublish",
    "isend_reply",
    "itermessages",
    "maybe_declare",
    "oid_from",
    "revive_connection",
    "send_reply",
    "uuid",
]

logger = logging.getLogger(__name__)

# basic.qos carries the count in 16 bits (AMQP 0-9-1, basic.qos).
PREFETCH_COUNT_MAX = 0xFFFF

_node_id: int | None = None


def get_node_id() -> int:
    """Return a number that is random for each process."""
    global _node_id
    if _node_id is None:
        _node_id = uuid4().int
    return _node_id


def generate_oid(node_id: int, process_id: int, thread_id: int, instance: object) -> str:
    """Return a UUID that these four always give."""
    name = f"{node_id:x}-{process_id:x}-{thread_id:x}-{id(instance):x}"
    try:
        return str(uuid3(NAMESPACE_OID, name))
    except ValueError:
        # MD5 is switched off (FIPS).
        return str(uuid5(NAMESPACE_OID, name))


def oid_from(instance: object, threads: bool = True) -> str:
    """Return an id for *instance* in this process.

    Args:
        threads: and in this task (greenlet or thread).
    """
    task = 0
    if threads:
        current = get_environment().current()
        task = current if isinstance(current, int) else id(current)
    return generate_oid(get_node_id(), os.getpid(), task, instance)


class Broadcast(Queue):
    """A queue of one's own on a fanout exchange: every instance gets every message.

    Args:
        name: of the exchange.
        queue: of the queue; by default unique.
        unique: make a given queue name unique as well.
        auto_delete: delete the queue after its last consumer.
        exchange: another exchange in place of a fanout exchange called *name*.
        alias: default *name*.
        **kwargs: as for `Queue`.
    """

    attrs: ClassVar[Attributes] = (*Queue.attrs, ("queue", None))

    queue: str

    def __init__(
        self,
        name: str | None = None,
        queue: str | None = None,
        unique: bool = False,
        auto_delete: bool = True,
        exchange: Exchange | str | Mapping[str, Any] | None = None,
        alias: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not queue:
            queue = f"bcast.{uuid()}"
        elif unique:
            queue = f"{queue}.{uuid()}"
        super().__init__(
            name=queue,
            queue=queue,
            alias=alias or name,
            auto_delete=auto_delete,
            exchange=Exchange(name or "", type="fanout") if exchange is None else exchange,
            **kwargs,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Its own arguments are not its attributes: `name` is the exchange's.
        return _rebuild_broadcast, (type(self), self.as_dict())


def _rebuild_broadcast(cls: type[Broadcast], attributes: dict[str, Any]) -> Broadcast:
    made = cls.__new__(cls)
    Queue.__init__(made, **attributes)
    return made


def entry_to_queue(queue: str, **options: Any) -> Queue:
    """Same as `Queue.from_dict`."""
    return Queue.from_dict(queue, **options)


# -- declaring once


def declaration_cached(entity: MaybeChannelBound, channel: Any) -> bool:
    """Whether the connection of *channel* has declared *entity* before."""
    return entity in _declared_entities(channel)


def _declared_entities(channel: Any) -> set[Any]:
    """Return what the underlying connection of *channel* has declared; a new one starts empty."""
    client = getattr(getattr(channel, "connection", None), "client", None)
    declared: set[Any] | None = getattr(client, "declared_entities", None)
    return set() if declared is None else declared


def maybe_declare(
    entity: MaybeChannelBound,
    channel: Any = None,
    retry: bool = False,
    **retry_policy: Any,
) -> bool:
    """Declare *entity* unless this connection has declared it before.

    Args:
        entity: an exchange or a queue.
        channel: a channel or a Connection; None takes the channel that the entity is bound to.
        retry: after a connection error, declare on the connection that is established anew.
        **retry_policy: as for `Connection.ensure`.

    Returns:
        Whether it was declared now.

    Raises:
        NotBoundError: no channel.
        A channel error: it exists with other settings.

    An entity that can vanish by itself (auto_delete, expires) is declared every time.
    """
    channel = _channel_of(entity, channel)
    if not retry:
        return _maybe_declare(entity, channel)
    connection = channel.connection.client
    bound = entity.bind(channel)

    def declare_bound() -> bool:
        # `ensure` revives `bound` with the new channel before it calls this again.
        declared = _maybe_declare(bound, bound.channel)
        _adopt_name(entity, bound)
        return declared

    retry_policy.setdefault("errback", _log_retry)
    declared: bool = connection.ensure(bound, declare_bound, **retry_policy)()
    return declared


def _channel_of(entity: MaybeChannelBound, channel: Any) -> Any:
    if channel is None:
        if not entity.is_bound:
            raise NotBoundError(
                f"Can't declare {entity!r} without a channel: bind it first, or give a channel"
            )
        return entity.channel
    if hasattr(channel, "default_channel"):
        from greenkombu.connection import maybe_channel

        return maybe_channel(channel)
    return channel


def _maybe_declare(entity: MaybeChannelBound, channel: Any) -> bool:
    if not entity.can_cache_declaration:
        _declare(entity, channel)
        return True
    declared = _declared_entities(channel)
    if entity in declared:
        return False
    _declare(entity, channel)
    if getattr(entity, "name", None):
        # Unbound: the set must not keep a channel alive. The entity itself, when it can be, so
        # that the next look-up ends at identity.
        declared.add(_unbound(entity) if entity.is_bound else entity)
    return True


def _declare(entity: Any, channel: Any) -> None:
    entity.declare(channel=channel)


def _unbound(entity: MaybeChannelBound) -> MaybeChannelBound:
    copied = entity.__copy__()
    exchange = copied.__dict__.get("exchange")
    if isinstance(exchange, Exchange):
        copied.__dict__["exchange"] = exchange.__copy__()
    return copied


def _adopt_name(entity: Any, declared: Any) -> None:
    # The broker names anonymous queues.
    if getattr(entity, "name", None) == "":
        entity.name = declared.name


def _log_retry(exc: BaseException, interval: float) -> None:
    logger.error("Connection error: %r. Retry in %ss", exc, interval)


# -- receiving


def eventloop(
    conn: Connection,
    limit: int | None = None,
    timeout: float | None = None,
    ignore_timeouts: bool = False,
) -> Iterator[Any]:
    """Drain events for ever, or *limit* times; yield after each.

    Args:
        limit: how many rounds; a round that times out counts.
        timeout: seconds to wait in each round; None waits for ever.
        ignore_timeouts: go on with the next round rather than raise TimeoutError.

    Raises:
        TimeoutError: nothing came for *timeout* seconds.
    """
    for _ in range(limit) if limit else itertools.count():
        try:
            yield conn.drain_events(timeout=timeout)
        except TimeoutError:
            if timeout and not ignore_timeouts:
                raise


def drain_consumer(
    consumer: Consumer,
    limit: int | None = 1,
    timeout: float | None = None,
    callbacks: Iterable[Callable[[Any, Any], Any]] | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Yield (body, message) for what *consumer* receives.

    Args:
        limit: stop after so many messages; None does not.
        timeout: stop when nothing has come for so many seconds; None waits for ever.
        callbacks: called as (body, message) for each message before it is yielded.

    The consumer is cancelled when the iteration ends.
    """
    received: deque[tuple[Any, Any]] = deque()

    def keep(body: Any, message: Any) -> None:
        received.append((body, message))

    consumer.callbacks = [keep, *(callbacks or ())]
    left = limit or None
    with consumer:
        connection = consumer.channel.connection.client
        while left is None or left > 0:
            if not received:
                try:
                    connection.drain_events(timeout=timeout)
                except TimeoutError:
                    return
            while received and (left is None or left > 0):
                if left is not None:
                    left -= 1
                yield received.popleft()


def itermessages(
    conn: Connection,
    channel: Any,
    queue: Queue,
    limit: int | None = 1,
    timeout: float | None = None,
    callbacks: Iterable[Callable[[Any, Any], Any]] | None = None,
    Consumer: Callable[..., Consumer] | None = None,
    **kwargs: Any,
) -> Iterator[tuple[Any, Any]]:
    """Yield (body, message) for what comes into *queue*.

    Args:
        limit, timeout, callbacks: as for `drain_consumer`.
        Consumer: class to consume with; None is the connection's.
        **kwargs: more arguments of the consumer.
    """
    if Consumer is None:
        consumer = conn.Consumer(queues=[queue], channel=channel, **kwargs)
    else:
        consumer = Consumer(channel, queues=[queue], **kwargs)
    return drain_consumer(consumer, limit=limit, timeout=timeout, callbacks=callbacks)


# -- replies


def send_reply(
    exchange: Exchange | str,
    req: Any,
    msg: Any,
    producer: Producer | None = None,
    retry: bool = False,
    retry_policy: Mapping[str, Any] | None = None,
    **props: Any,
) -> Any:
    """Publish the answer to a request: to its reply_to, with its correlation_id.

    Args:
        req: the message to answer; its serializer is used as well.
        msg: the body of the answer.
        producer: None makes one on the channel of the request.
        **props: more arguments of `Producer.publish`; they win.

    Raises:
        KeyError: the request has no `reply_to`.
    """
    from greenkombu.serialization import registry

    if producer is None:
        from greenkombu.messaging import Producer

        producer = Producer(req.channel, auto_declare=False)
    properties = req.properties
    answer = {
        "routing_key": properties["reply_to"],
        "correlation_id": properties.get("correlation_id"),
        "serializer": registry.type_to_name.get(req.content_type),
        "content_encoding": req.content_encoding,
    }
    answer.update(props)
    return producer.publish(
        msg, exchange=exchange, retry=retry, retry_policy=retry_policy, **answer
    )


def collect_replies(
    conn: Connection, channel: Any, queue: Queue, *args: Any, **kwargs: Any
) -> Iterator[Any]:
    """Yield the bodies of the answers in *queue*.

    Args:
        *args, **kwargs: as for `itermessages`; `no_ack` (default True) False acknowledges each.
    """
    no_ack = kwargs.setdefault("no_ack", True)
    received = False
    try:
        for body, message in itermessages(conn, channel, queue, *args, **kwargs):
            if not no_ack:
                message.ack()
            received = True
            yield body
    finally:
        if received:
            channel.after_reply_message_received(queue.name)


# -- pools


def revive_connection(
    connection: Connection,  # noqa: ARG001  Kombu's signature
    channel: Any,
    on_revive: Callable[[Any], Any] | None = None,
) -> None:
    """Tell *on_revive* the new channel of a connection that was lost."""
    if on_revive is not None:
        on_revive(channel)


def insured(
    pool: Any,
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    errback: Callable[[BaseException, float], Any] | None = None,
    on_revive: Callable[[Any], Any] | None = None,
    *,
    timeout: float | None = None,
    **opts: Any,
) -> Any:
    """Call *fun* with a connection of *pool*; call it again after connection errors.

    Args:
        fun: called as fun(*args, **kwargs, connection=..., channel=...).
        errback: called as (exception, seconds until the next try); None logs.
        on_revive: called with the new channel.
        timeout: seconds for everything: the pool, connecting, tries and pauses.
        **opts: as for `Connection.ensure`.

    Raises:
        LimitExceeded: no connection became free within *timeout*.
        What *fun* raises when the retries are over.
    """
    errback = errback or _log_retry
    with Deadline(timeout), pool.acquire(block=True, timeout=remaining()) as connection:
        connection.ensure_connection(errback=errback)

        def revived(channel: Any) -> None:
            revive_connection(connection, channel, on_revive)

        channel = connection.default_channel
        call = connection.autoretry(fun, channel, errback=errback, on_revive=revived, **opts)
        result, _ = call(*args, **dict(kwargs, connection=connection))
        return result


def ipublish(
    pool: Any,
    fun: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    errback: Callable[[BaseException, float], Any] | None = None,
    on_revive: Callable[[Any], Any] | None = None,
    **retry_policy: Any,
) -> Any:
    """Call *fun* with a producer of *pool*; call it again after connection errors.

    Args:
        fun: called as fun(*args, **kwargs, producer=...).
        **retry_policy: as for `Connection.ensure`; `timeout` (seconds) bounds everything.
    """
    timeout = retry_policy.pop("timeout", None)
    with Deadline(timeout), pool.acquire(block=True, timeout=remaining()) as producer:
        call = producer.connection.ensure(
            producer, fun, errback=errback or _log_retry, on_revive=on_revive, **retry_policy
        )
        return call(*args, **dict(kwargs or {}, producer=producer))


def isend_reply(
    pool: Any,
    exchange: Exchange | str,
    req: Any,
    msg: Any,
    props: Mapping[str, Any],
    **retry_policy: Any,
) -> Any:
    """Same as `send_reply`, with a producer of *pool* and retries."""
    return ipublish(pool, send_reply, (exchange, req, msg), props, **retry_policy)


# -- errors that a cleanup may ignore


@contextmanager
def _ignoring(errors: tuple[type[BaseException], ...]) -> Iterator[None]:
    try:
        yield
    except errors:
        logger.debug("ignored while cleaning up", exc_info=True)


def ignore_errors(
    conn: Any, fun: Callable[..., Any] | None = None, *args: Any, **kwargs: Any
) -> AbstractContextManager[None] | Any:
    """Ignore connection and channel errors, which is right only when cleaning up.

    Args:
        conn: has `connection_errors` and `channel_errors`.
        fun: call it so, and return its result; without it a context manager is returned.
    """
    errors = (*conn.connection_errors, *conn.channel_errors)
    if fun is None:
        return _ignoring(errors)
    try:
        return fun(*args, **kwargs)
    except errors:
        logger.debug("ignored while cleaning up", exc_info=True)
        return None


class QoS:
    """A prefetch count that may be changed from any task and is sent at `update`.

    Args:
        callback: called as callback(prefetch_count=n) by `set`.
        initial_value: the first count; 0 is no limit.
        max_prefetch: the highest count; None is no limit.
    """

    prev: int | None = None

    def __init__(
        self, callback: Callable[..., Any], initial_value: int, max_prefetch: int | None = None
    ) -> None:
        self.callback = callback
        self.value = initial_value or 0
        self.max_prefetch = max_prefetch
        self._mutex = primitives.RLock()

    def increment_eventually(self, n: int = 1) -> int:
        """Raise the count by *n*; no limit stays no limit.

        Returns:
            The new count, which the channel learns at the next `update`.
        """
        with self._mutex:
            if self.value:
                value = self.value + max(n, 0)
                limit = self.max_prefetch
                self.value = value if not limit or value <= limit else limit
            return self.value

    def decrement_eventually(self, n: int = 1) -> int:
        """Lower the count by *n*, to 1 at least; no limit stays no limit.

        Returns:
            The new count, which the channel learns at the next `update`.
        """
        with self._mutex:
            if self.value:
                self.value = max(self.value - n, 1)
            return self.value

    def set(self, pcount: int) -> int:
        """Tell the channel the count now, if it has changed; above 65535 that is no limit."""
        if pcount != self.prev:
            value = pcount
            if pcount > PREFETCH_COUNT_MAX:
                logger.warning("QoS: Disabled: prefetch_count exceeds %r", PREFETCH_COUNT_MAX)
                value = 0
            logger.debug("basic.qos: prefetch_count->%s", value)
            self.callback(prefetch_count=value)
            self.prev = pcount
        return pcount

    def update(self) -> int:
        """Tell the channel the current count."""
        with self._mutex:
            return self.set(self.value)
