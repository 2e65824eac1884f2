"""Mailboxes of processes: commands to all or some of them, and their answers.

A `Node` listens on a queue of its own, ``<hostname>.<namespace>.pidbox``, bound to the exchange
``<namespace>.pidbox`` (fanout, or direct).  A client publishes a command there; whoever is meant by
it runs the handler of that name.  With a `reply_to` in the command the answer, ``{hostname:
result}``, goes to ``reply.<namespace>.pidbox`` and carries the command's ticket, so that answers to
different commands in one reply queue are told apart.  Names and fields are those of Kombu 5.7:
both kinds of nodes share a broker.

`Node` and `Mailbox` stay in one module although it is long: they are two ends of one exchange of
messages, and a change to one is a change to the other.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

from greenkombu import exceptions, messaging
from greenkombu.clocks import LamportClock
from greenkombu.common import maybe_declare, oid_from
from greenkombu.entity import Exchange, Queue
from greenkombu.matcher import match
from greenkombu.messaging import Producer
from greenkombu.utils.functional import maybe_evaluate, reprcall
from greenkombu.utils.objects import cached_property
from greenkombu.utils.uuid import uuid

if TYPE_CHECKING:
    from greenkombu.connection import Connection

__all__ = ["Mailbox", "Node"]

logger = logging.getLogger(__name__)

# Seconds after which a command that nobody waits for is stale; its header `expires` says so.
CAST_EXPIRES = 1.0

# Answers to tickets that nobody has asked for yet. A client that gave up leaves its late answers
# here, so both numbers are bounded.
UNCLAIMED_TICKETS = 100
UNCLAIMED_REPLIES = 1000


class Node:
    """One process that has a mailbox.

    Args:
        hostname: its name; None is the host's.
        state: passed to the handlers as their first argument.
        channel: listens on this one.
        handlers: name of the command -> handler.
        mailbox: the `Mailbox` it belongs to.
    """

    hostname: str | None = None
    mailbox: Mailbox | None = None
    handlers: dict[str, Callable[..., Any]] | None = None
    state: Any = None
    channel: Any = None

    def __init__(
        self,
        hostname: str | None,
        state: Any = None,
        channel: Any = None,
        handlers: Mapping[str, Callable[..., Any]] | None = None,
        mailbox: Mailbox | None = None,
    ) -> None:
        self.channel = channel
        self.mailbox = mailbox
        self.hostname = hostname
        self.state = state
        self.handlers = dict(handlers or {})
        self.adjust_clock = _no_clock if mailbox is None else mailbox.clock.adjust

    @property
    def _box(self) -> Mailbox:
        if self.mailbox is None:
            raise ValueError(f"node {self.hostname!r} has no mailbox; make it with mailbox.Node()")
        return self.mailbox

    def Consumer(
        self,
        channel: Any = None,
        no_ack: bool = True,
        accept: Iterable[str] | None = None,
        **options: Any,
    ) -> messaging.Consumer:
        """Return a consumer of this node's queue.

        Args:
            channel: None takes the node's.
            accept: None takes the mailbox's.
            **options: as for `greenkombu.Consumer`.
        """
        box = self._box
        queue = box.get_queue(self.hostname or socket.gethostname())

        def verify_exclusive(name: str, messages: int, consumers: int) -> None:  # noqa: ARG001
            if consumers:
                logger.warning(
                    "A node named %s is already using this process mailbox! Shut it down, or give "
                    "the two different names.",
                    self.hostname,
                )

        queue.on_declared = verify_exclusive
        return messaging.Consumer(
            channel or self.channel,
            [queue],
            no_ack=no_ack,
            accept=box.accept if accept is None else accept,
            **options,
        )

    def handler(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """Register *fun* for the command of its name; usable as a decorator.

        It is called as fun(state, **arguments).
        """
        self._own_handlers[fun.__name__] = fun
        return fun

    @property
    def _own_handlers(self) -> dict[str, Callable[..., Any]]:
        if self.handlers is None:
            self.handlers = {}
        return self.handlers

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Log a command that cannot be decoded; it is dropped."""
        logger.error(
            "Cannot decode message: %r (type:%r encoding:%r)",
            exc,
            getattr(message, "content_type", None),
            getattr(message, "content_encoding", None),
        )

    def listen(
        self, channel: Any = None, callback: Callable[[Any, Any], Any] | None = None
    ) -> messaging.Consumer:
        """Start to receive commands.

        Args:
            channel: None takes the node's.
            callback: called as (body, message) in place of `handle_message`.

        Returns:
            The consumer; its `cancel` ends it.
        """
        consumer = self.Consumer(
            channel=channel,
            callbacks=[callback or self.handle_message],
            on_decode_error=self.on_decode_error,
        )
        consumer.consume()
        return consumer

    def dispatch(
        self,
        method: str,
        arguments: Mapping[str, Any] | None = None,
        reply_to: Mapping[str, str] | None = None,
        ticket: str | None = None,
        **kwargs: Any,  # noqa: ARG002  Kombu's signature
    ) -> Any:
        """Run a command; answer it if somebody waits for that.

        An error in the handler is logged, and answered as ``{"error": repr}``.

        Args:
            reply_to: exchange and routing_key of the answer.
            ticket: the answer carries it.
        """
        arguments = arguments or {}
        logger.debug(
            "pidbox received method %s [reply_to:%s ticket:%s]",
            reprcall(method, (), kwargs=dict(arguments)),
            reply_to,
            ticket,
        )
        handle = self.handle_call if reply_to else self.handle_cast
        try:
            result = handle(method, arguments)
        except Exception as exc:
            logger.exception("pidbox command %s failed", method)
            result = {"error": repr(exc)}
        if reply_to:
            self.reply(
                {self.hostname: result},
                exchange=reply_to["exchange"],
                routing_key=reply_to["routing_key"],
                ticket=ticket,
            )
        return result

    def handle(self, method: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run the handler of a command.

        Raises:
            KeyError: there is none.
        """
        return self._own_handlers[method](self.state, **(arguments or {}))

    def handle_call(self, method: str, arguments: Mapping[str, Any]) -> Any:
        """Run a command that is answered."""
        return self.handle(method, arguments)

    def handle_cast(self, method: str, arguments: Mapping[str, Any]) -> Any:
        """Run a command that is not answered."""
        return self.handle(method, arguments)

    def handle_message(self, body: Mapping[str, Any], message: Any = None) -> Any:
        """Run the command in a message, if it is meant for this node.

        It is meant for those in `destination`, or those that `pattern` and `matcher` choose, or
        all.
        """
        destination = body.get("destination")
        pattern = body.get("pattern")
        matcher = body.get("matcher")
        if message is not None:
            self.adjust_clock(message.headers.get("clock") or 0)
        hostname = self.hostname or ""
        if destination:
            wanted = hostname in destination
        elif pattern and matcher:
            wanted = match(hostname, pattern, matcher)
        else:
            wanted = True
        return self.dispatch(**body) if wanted else None

    dispatch_from_message = handle_message

    def reply(
        self,
        data: Any,
        exchange: str,
        routing_key: str,
        ticket: str | None = None,
        **kwargs: Any,  # noqa: ARG002  Kombu's signature
    ) -> None:
        """Publish an answer."""
        self._box._publish_reply(
            data,
            exchange,
            routing_key,
            ticket,
            channel=self.channel,
            serializer=self._box.serializer,
        )


class Mailbox:
    """The mailboxes of one application.

    Args:
        namespace: name of the application.
        type: 'direct', or 'fanout' for commands that reach every node.
        connection: the Connection to use; `mailbox(connection)` gives a copy that has one.
        clock: a `LamportClock` that messages are stamped with.
        accept: content types of commands and answers; by default json only.
        serializer: for both; None is the default serializer.
        producer_pool: producers for commands and answers; None takes `pools.producers`.
        queue_ttl, queue_expires: seconds, for the nodes' queues.
        queue_durable, queue_exclusive: of the nodes' queues; not both.
        reply_queue_ttl, reply_queue_expires: seconds, for the clients' queues.

    Raises:
        ValueError: the queues would be durable and exclusive.
    """

    node_cls = Node
    exchange_fmt = "%s.pidbox"
    reply_exchange_fmt = "reply.%s.pidbox"

    namespace: str | None = None
    connection: Connection | None = None
    type: str = "direct"
    exchange: Exchange | None = None
    reply_exchange: Exchange | None = None
    accept: Iterable[str] | None = ["json"]
    serializer: str | None = None

    def __init__(
        self,
        namespace: str,
        type: str = "direct",
        connection: Connection | None = None,
        clock: LamportClock | None = None,
        accept: Iterable[str] | None = None,
        serializer: str | None = None,
        producer_pool: Any = None,
        queue_ttl: float | None = None,
        queue_expires: float | None = None,
        queue_durable: bool = False,
        queue_exclusive: bool = True,
        reply_queue_ttl: float | None = None,
        reply_queue_expires: float | None = 10.0,
    ) -> None:
        if queue_durable and queue_exclusive:
            raise ValueError(
                "queue_durable and queue_exclusive cannot both be set: an exclusive queue ends "
                "with its connection"
            )
        self.namespace = namespace
        self.connection = connection
        self.type = type
        self.clock = LamportClock() if clock is None else clock
        self.exchange = self._get_exchange(namespace, type)
        self.reply_exchange = self._get_reply_exchange(namespace)
        self.unclaimed: OrderedDict[str, deque[Any]] = OrderedDict()
        self.accept = self.accept if accept is None else accept
        self.serializer = self.serializer if serializer is None else serializer
        self.queue_ttl = queue_ttl
        self.queue_expires = queue_expires
        self.queue_durable = queue_durable
        self.queue_exclusive = queue_exclusive
        self.reply_queue_ttl = reply_queue_ttl
        self.reply_queue_expires = reply_queue_expires
        self._producer_pool = producer_pool
        self._handlers: dict[str, Callable[..., Any]] = {}

    def __call__(self, connection: Connection) -> Mailbox:
        """Return a copy on *connection*."""
        bound = copy(self)
        bound.connection = connection
        bound.__dict__.pop("producer_pool", None)
        return bound

    def handler(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """Register *fun* for the command of its name on every node made after this."""
        self._handlers[fun.__name__] = fun
        return fun

    def Node(
        self,
        hostname: str | None = None,
        state: Any = None,
        channel: Any = None,
        handlers: Mapping[str, Callable[..., Any]] | None = None,
    ) -> Node:
        """Return a node.

        Args:
            hostname: None is the host's name.
        """
        return self.node_cls(
            hostname or socket.gethostname(),
            state,
            channel,
            {**self._handlers, **(handlers or {})},
            mailbox=self,
        )

    # -- commands

    def call(
        self,
        destination: Iterable[str],
        command: str,
        kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        callback: Callable[[Any], Any] | None = None,
        channel: Any = None,
    ) -> list[Any] | None:
        """Send a command to *destination* and wait for the answers.

        Args:
            destination: list of node names.
            timeout: seconds; None takes 1.
            callback: called with each answer as it comes.

        Returns:
            The answers that came in time.
        """
        return self._broadcast(
            command,
            kwargs,
            destination,
            reply=True,
            timeout=1 if timeout is None else timeout,
            callback=callback,
            channel=channel,
        )

    def cast(
        self, destination: Iterable[str], command: str, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Send a command to *destination*; nobody answers."""
        self._broadcast(command, kwargs, destination, reply=False)

    def abcast(self, command: str, kwargs: Mapping[str, Any] | None = None) -> None:
        """Send a command to all nodes; nobody answers."""
        self._broadcast(command, kwargs, reply=False)

    def multi_call(
        self,
        command: str,
        kwargs: Mapping[str, Any] | None = None,
        timeout: float = 1,
        limit: int | None = None,
        callback: Callable[[Any], Any] | None = None,
        channel: Any = None,
    ) -> list[Any] | None:
        """Send a command to all nodes and collect answers.

        Args:
            timeout: seconds without an answer after which it ends.
            limit: end after so many answers.
        """
        return self._broadcast(
            command,
            kwargs,
            reply=True,
            timeout=timeout,
            limit=limit,
            callback=callback,
            channel=channel,
        )

    # -- queues

    def get_queue(self, hostname: str) -> Queue:
        """Return the queue of a node."""
        return Queue(
            f"{hostname}.{self.namespace}.pidbox",
            exchange=self.exchange,
            durable=self.queue_durable,
            exclusive=self.queue_exclusive,
            auto_delete=not self.queue_durable,
            expires=self.queue_expires,
            message_ttl=self.queue_ttl,
        )

    def get_reply_queue(self, ticket: str | None = None) -> Queue:  # noqa: ARG002  the manual's
        """Return the queue for answers to this task; all its tickets share it."""
        oid = self.oid
        return Queue(
            f"{oid}.{self.reply_exchange.name if self.reply_exchange else ''}",
            exchange=self.reply_exchange,
            routing_key=oid,
            durable=False,
            exclusive=True,
            auto_delete=True,
            expires=self.reply_queue_expires,
            message_ttl=self.reply_queue_ttl,
        )

    @property
    def reply_queue(self) -> Queue:
        """The queue for answers to this task."""
        return self.get_reply_queue()

    @property
    def oid(self) -> str:
        """The id of this client: one for each task, so that tasks do not share a reply queue."""
        return oid_from(self)

    def _get_exchange(self, namespace: str, type: str) -> Exchange:
        return Exchange(
            self.exchange_fmt % namespace, type=type, durable=False, delivery_mode="transient"
        )

    def _get_reply_exchange(self, namespace: str) -> Exchange:
        return Exchange(
            self.reply_exchange_fmt % namespace,
            type="direct",
            durable=False,
            delivery_mode="transient",
        )

    # -- publishing

    @cached_property
    def producer_pool(self) -> Any:
        """The pool that producers come from; None when the mailbox has no connection."""
        pool = maybe_evaluate(self._producer_pool)
        if pool is None and self.connection is not None:
            from greenkombu import pools

            pool = pools.producers[self.connection]
        return pool

    @contextmanager
    def producer_or_acquire(
        self, producer: Producer | None = None, channel: Any = None
    ) -> Iterator[Producer]:
        """Give *producer*, one of the pool, or one on *channel*."""
        if producer is not None:
            yield producer
        elif self.producer_pool is not None and channel is None:
            with self.producer_pool.acquire(block=True) as pooled:
                yield pooled
        else:
            yield Producer(channel, auto_declare=False)

    def _publish_reply(
        self,
        reply: Any,
        exchange: str,
        routing_key: str,
        ticket: str | None,
        channel: Any = None,
        producer: Producer | None = None,
        **opts: Any,
    ) -> None:
        answer_to = Exchange(exchange, type="direct", delivery_mode="transient", durable=False)
        with self.producer_or_acquire(producer, channel) as publisher:
            try:
                publisher.publish(
                    reply,
                    exchange=answer_to,
                    routing_key=routing_key,
                    declare=[answer_to],
                    headers={"ticket": ticket, "clock": self.clock.forward()},
                    retry=publisher.connection is not None,
                    retry_policy={"max_retries": 3},
                    **opts,
                )
            except exceptions.InconsistencyError:
                # The client is gone, and its queue with it.
                logger.info("nobody is left to take the answer to ticket %s", ticket)

    def _publish(
        self,
        type: str,
        arguments: Mapping[str, Any],
        destination: Iterable[str] | None = None,
        reply_ticket: str | None = None,
        channel: Any = None,
        timeout: float | None = None,
        serializer: str | None = None,
        producer: Producer | None = None,
        pattern: str | None = None,
        matcher: str | None = None,
    ) -> None:
        message: dict[str, Any] = {
            "method": type,
            "arguments": arguments,
            "destination": destination,
            "pattern": pattern,
            "matcher": matcher,
        }
        if reply_ticket:
            channel = channel or self._default_channel()
            maybe_declare(self.reply_queue, channel)
            message["ticket"] = reply_ticket
            message["reply_to"] = {
                "exchange": self.reply_exchange.name if self.reply_exchange else "",
                "routing_key": self.oid,
            }
        assert self.exchange is not None
        # Wall clock: it is compared by another process.
        expires = time.time() + (CAST_EXPIRES if timeout is None else timeout)
        with self.producer_or_acquire(producer, channel) as publisher:
            publisher.publish(
                message,
                exchange=self.exchange.name,
                declare=[self.exchange],
                headers={"clock": self.clock.forward(), "expires": expires},
                serializer=serializer or self.serializer,
                retry=publisher.connection is not None,
                retry_policy={"max_retries": 3},
            )

    def _default_channel(self) -> Any:
        if self.connection is None:
            raise ValueError(
                f"mailbox {self.namespace!r} has no connection; use mailbox(connection)"
            )
        return self.connection.default_channel

    def _broadcast(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        destination: Iterable[str] | None = None,
        reply: bool = False,
        timeout: float | None = 1,
        limit: int | None = None,
        callback: Callable[[Any], Any] | None = None,
        channel: Any = None,
        serializer: str | None = None,
        pattern: str | None = None,
        matcher: str | None = None,
    ) -> list[Any] | None:
        """Send a command, and collect the answers if *reply* is true."""
        if destination is not None and not isinstance(destination, (list, tuple)):
            raise ValueError(f"destination must be a list/tuple not {type(destination)}")
        if (pattern is not None and not isinstance(pattern, str)) or (
            matcher is not None and not isinstance(matcher, str)
        ):
            raise ValueError("pattern and matcher must be text")
        ticket = uuid() if reply else None
        if reply:
            channel = channel or self._default_channel()
            if limit is None and destination:
                limit = len(destination)
        self._publish(
            command,
            dict(arguments or {}),
            destination=list(destination) if destination is not None else None,
            reply_ticket=ticket,
            channel=channel,
            timeout=timeout,
            serializer=serializer,
            pattern=pattern,
            matcher=matcher,
        )
        if ticket is None:
            return None
        return self._collect(
            ticket, limit=limit, timeout=timeout, callback=callback, channel=channel
        )

    # -- answers

    def _collect(
        self,
        ticket: str,
        limit: int | None = None,
        timeout: float | None = 1,
        callback: Callable[[Any], Any] | None = None,
        channel: Any = None,
        accept: Iterable[str] | None = None,
    ) -> list[Any]:
        """Wait for the answers to *ticket*.

        Args:
            limit: how many answers are expected.
            timeout: seconds without an answer after which it ends.
        """
        channel = channel or self._default_channel()
        answers: list[Any] = []

        def take(body: Any) -> None:
            if callback is not None:
                callback(body)
            answers.append(body)

        def on_message(body: Any, message: Any) -> None:
            headers = message.headers
            self.clock.adjust(headers.get("clock") or 0)
            # Kombu before 2.5 sent no ticket with an answer: it is for whoever asks.
            answered = headers.get("ticket", ticket)
            if answered == ticket:
                take(body)
            else:
                self._keep_for(answered, body)

        for body in self.unclaimed.pop(ticket, ()):
            take(body)
        queue = self.reply_queue
        consumer = messaging.Consumer(
            channel,
            [queue],
            callbacks=[on_message],
            accept=self.accept if accept is None else accept,
            no_ack=True,
        )
        drain = partial(channel.connection.client.drain_events, timeout=timeout)
        try:
            with consumer:
                while limit is None or len(answers) < limit:
                    try:
                        drain()
                    except TimeoutError:
                        break
        finally:
            channel.after_reply_message_received(queue.name)
        return answers

    def _keep_for(self, ticket: str, body: Any) -> None:
        kept = self.unclaimed.setdefault(ticket, deque(maxlen=UNCLAIMED_REPLIES))
        kept.append(body)
        while len(self.unclaimed) > UNCLAIMED_TICKETS:
            self.unclaimed.popitem(last=False)


def _no_clock(value: int) -> int:
    return value
