"""Messages that RabbitMQ itself holds back for a while, for up to 268 435 455 s (8.5 years).

The names, functions and declarations are those of Kombu 5.7 (`kombu.transport.
native_delayed_delivery`), so that programs on either side share one topology. The scheme is the
one of NServiceBus (https://docs.particular.net/transports/rabbitmq/delayed-delivery): a chain of
28 levels, each a topic exchange and a queue whose messages expire after 2**level seconds::

    publish ─► level 27 ─0─► level 26 ─0─► ... ─0─► level 0 ─0─► delivery exchange ─► yours
                  │1            ▲ │1                   ▲ │1             ▲
                  └─► queue ────┘ └─► queue ────► ... ─┘ └─► queue ─────┘

The routing key begins with the delay as 28 binary digits, highest first. Each exchange looks at
its own digit: 0 hands the message to the next level at once, 1 puts it into the level's queue,
whose dead letters go to the next level. The delivery exchange hands it to the exchanges of the
destination queues, with the digits still in front: so these exchanges have to be of a type that
can ignore them (topic, fanout), and a direct exchange cannot be used.

Publish with `calculate_routing_key` to the exchange `level_name(MAX_LEVEL)`. The queues refuse
what they cannot hold and, as quorum queues, hand dead letters on at least once (RabbitMQ 3.10).
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from greenkombu.entity import Exchange

if TYPE_CHECKING:
    from greenkombu.connection import Connection
    from greenkombu.entity import Queue

__all__ = (
    "CELERY_DELAYED_DELIVERY_EXCHANGE",
    "MAX_LEVEL",
    "MAX_NUMBER_OF_BITS_TO_USE",
    "bind_queue_to_native_delayed_delivery_exchange",
    "calculate_routing_key",
    "declare_native_delayed_delivery_exchanges_and_queues",
    "level_name",
)

logger = logging.getLogger(__name__)

#: Digits of a delay, and levels of the topology: part of what other programs declare.
MAX_NUMBER_OF_BITS_TO_USE = 28
#: The level to which messages are published.
MAX_LEVEL = MAX_NUMBER_OF_BITS_TO_USE - 1
#: Where messages come out after their delay.
CELERY_DELAYED_DELIVERY_EXCHANGE = "celery_delayed_delivery"

#: Queue type -> the arguments that only it has.  A classic queue hands dead letters on at most
#: once, and refuses to declare anything else.
_QUEUE_TYPES = {"classic": {}, "quorum": {"x-dead-letter-strategy": "at-least-once"}}

_DIGITS = re.compile(rf"(?:[01]\.){{{MAX_NUMBER_OF_BITS_TO_USE}}}")


def level_name(level: int, prefix: str | None = None) -> str:
    """Return the name of a level's exchange, which is also the name of its queue.

    Args:
        level: from 0 (one second) to `MAX_LEVEL`.
        prefix: goes in front, with an underscore; None or "" for none.

    Raises:
        ValueError: level is negative.
    """
    if level < 0:
        raise ValueError(f"levels begin at 0; there is no level {level}")
    return _prefixed(f"celery_delayed_{level}", prefix)


def calculate_routing_key(countdown: int, routing_key: str) -> str:
    """Return the routing key for a message that is to be delayed.

    Args:
        countdown: whole seconds, from 1 to 268 435 455.
        routing_key: that of the message without a delay; if it has a delay in front already, the
            new one takes its place.

    Raises:
        ValueError: countdown is out of range or no whole number, or routing_key is empty.
    """
    if countdown < 1:
        raise ValueError(f"a delay is at least 1 s, not {countdown}")
    if not isinstance(countdown, int):
        raise ValueError(f"a delay is in whole seconds, not {countdown!r}")
    if countdown.bit_length() > MAX_NUMBER_OF_BITS_TO_USE:
        # Another digit in front would be read as another, much shorter delay.
        longest = 2**MAX_NUMBER_OF_BITS_TO_USE - 1
        raise ValueError(f"a delay is at most {longest} s, not {countdown}")
    if not routing_key:
        raise ValueError("a delayed message needs a routing key to be delivered by")
    delayed = _DIGITS.match(routing_key)
    destination = routing_key if delayed is None else routing_key[delayed.end() :]
    return ".".join((*f"{countdown:0{MAX_NUMBER_OF_BITS_TO_USE}b}", destination))


def declare_native_delayed_delivery_exchanges_and_queues(
    connection: Connection, queue_type: str, prefix: str | None = None
) -> None:
    """Declare all levels and the delivery exchange.

    Args:
        connection: to RabbitMQ; a channel of it is used and closed.
        queue_type: "quorum" (RabbitMQ 3.10 or newer) or "classic".
        prefix: for all names; see `level_name`.

    Raises:
        ValueError: queue_type is neither.
        NotEquivalentError: they exist with another queue type.
    """
    if queue_type not in _QUEUE_TYPES:
        raise ValueError(f"queue_type is 'classic' or 'quorum', not {queue_type!r}")
    with connection.channel() as channel:
        following = _prefixed(CELERY_DELAYED_DELIVERY_EXCHANGE, prefix)
        channel.exchange_declare(following, "topic", durable=True, auto_delete=False)
        # From the end of the chain: each level refers to the next.
        for level in range(MAX_NUMBER_OF_BITS_TO_USE):
            name = level_name(level, prefix)
            channel.exchange_declare(name, "topic", durable=True, auto_delete=False)
            channel.queue_declare(
                name,
                durable=True,
                auto_delete=False,
                arguments={
                    "x-queue-type": queue_type,
                    "x-overflow": "reject-publish",
                    "x-message-ttl": 2**level * 1000,
                    "x-dead-letter-exchange": following,
                    **_QUEUE_TYPES[queue_type],
                },
            )
            digits_before = "*." * (MAX_LEVEL - level)
            channel.queue_bind(name, name, f"{digits_before}1.#")
            channel.exchange_bind(following, name, f"{digits_before}0.#")
            following = name


def bind_queue_to_native_delayed_delivery_exchange(
    connection: Connection, queue: Queue, prefix: str | None = None
) -> None:
    """Have delayed messages delivered to a queue.

    Each exchange that the queue is bound to is bound to the delivery exchange, and the queue to
    that exchange, for keys that end with the routing key of the binding. An exchange of type
    direct, `Exchange`'s default, is left out, with a warning in the log: delayed messages do not
    reach the queue by it.

    Args:
        connection: to RabbitMQ; a channel of it is used and closed.
        queue: declared already, and its exchanges as well.
        prefix: that of the declaration.

    Raises:
        NotFoundError: the queue, an exchange or the delivery exchange was not declared.
    """
    delivery = _prefixed(CELERY_DELAYED_DELIVERY_EXCHANGE, prefix)
    with connection.channel() as channel:
        for each in queue.bindings or [queue]:
            exchange = each.exchange
            if not isinstance(exchange, Exchange):
                exchange = Exchange(exchange or "")
            if exchange.type == "direct":
                logger.warning(
                    "queue %r gets no delayed messages by way of exchange %r: it is of type direct"
                    " and compares whole routing keys; use a topic exchange",
                    queue.name,
                    exchange.name,
                )
                continue
            pattern = f"#.{each.routing_key}"
            channel.exchange_bind(exchange.name, delivery, pattern)
            channel.queue_bind(queue.name, exchange.name, pattern)


def _prefixed(name: str, prefix: str | None) -> str:
    return f"{prefix}_{name}" if prefix else name
