"""What a message carries when it is dead-lettered.

As RabbitMQ does it (https://www.rabbitmq.com/docs/dlx): the header ``x-death`` lists, the newest
first, from which queue and why the message went, how often, and where it had been published to.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from greenkombu.transport.virtual.message import copy_message
from greenkombu.transport.virtual.policy import QueuePolicy

__all__ = ["EXPIRED", "MAXLEN", "REJECTED", "is_cycle", "make_dead_letter"]

REJECTED = "rejected"
EXPIRED = "expired"
MAXLEN = "maxlen"


def make_dead_letter(
    raw: Mapping[str, Any], queue: str, reason: str, policy: QueuePolicy, delivery_tag: str
) -> tuple[dict[str, Any], str, str]:
    """Make the message that goes to the dead-letter exchange.

    Args:
        raw: the dict of the message.
        queue: that it leaves.
        reason: `REJECTED`, `EXPIRED` or `MAXLEN`.
        policy: of the queue; it has a dead-letter exchange.
        delivery_tag: for the new message.

    Returns:
        The dict of the new message, the exchange, and the routing key to publish it with. It has
        no `expiration` any more, so that it does not expire again at once.
    """
    message = copy_message(raw, delivery_tag)
    message.pop("redelivered", None)
    properties = message["properties"]
    info = properties["delivery_info"]
    info.pop("redelivered", None)
    exchange = policy.dead_letter_exchange or ""
    published_to, published_with = info.get("exchange", ""), info.get("routing_key", "")
    routing_key = policy.dead_letter_routing_key
    if routing_key is None:
        routing_key = published_with
    headers = message["headers"]
    entry: dict[str, Any] = {
        "count": 1,
        "exchange": published_to,
        "queue": queue,
        "reason": reason,
        "routing-keys": [published_with],
        # The form in which the amqp package reads RabbitMQ's: UTC without a time zone.
        "time": datetime.now(timezone.utc).replace(tzinfo=None, microsecond=0),
    }
    expiration = properties.pop("expiration", None)
    if expiration is not None:
        entry["original-expiration"] = expiration
    deaths = _deaths(headers)
    for index, death in enumerate(deaths):
        if death.get("queue") == queue and death.get("reason") == reason:
            count = death.get("count")
            entry = {**death, "count": count + 1 if isinstance(count, int) else 1}
            del deaths[index]
            break
    headers["x-death"] = [entry, *deaths]
    for name, value in (("exchange", published_to), ("queue", queue), ("reason", reason)):
        headers.setdefault(f"x-first-death-{name}", value)
        headers[f"x-last-death-{name}"] = value
    info["exchange"], info["routing_key"] = exchange, routing_key
    return message, exchange, routing_key


def is_cycle(raw: Mapping[str, Any], queue: str) -> bool:
    """Tell whether a dead letter came back to a queue that it left, with nobody having touched it.

    Such a message would go round for ever, so it is dropped; a round in which a consumer rejected
    it is the program's own will.
    """
    deaths = _deaths(raw["headers"])
    for position, death in enumerate(deaths):
        if death.get("queue") == queue:
            return all(each.get("reason") != REJECTED for each in deaths[: position + 1])
    return False


def _deaths(headers: Mapping[str, Any]) -> list[dict[str, Any]]:
    # A header of this name may come from anybody.
    deaths = headers.get("x-death")
    if not isinstance(deaths, list):
        return []
    return [death for death in deaths if isinstance(death, dict)]
