"""What can be set on an AMQP connection beyond the ``amqp`` package's own arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from greenkombu._amqp.protocol import DEFAULT_MAX_MESSAGE_SIZE

__all__ = ["AMQPOptions", "as_bool"]


@dataclass(frozen=True)
class AMQPOptions:
    """Bounds and habits of a connection; each is also a transport option of that name.

    All times are seconds.  None as a time means no bound of its own; the deadline of the calling
    task (`greenkombu.deadline`) holds in any case.
    """

    #: Wait for the answer to a request.  A quorum queue's declaration under load takes a few
    #: seconds; a broker that needs half a minute is not coming back soon.
    rpc_timeout: float | None = 30.0
    #: Wait for the confirm of one publish.  Brokers fsync in batches, quorum queues wait for a
    #: majority: seconds at worst.
    confirm_timeout: float | None = 30.0
    #: Publishes of one channel that may be unconfirmed.  RabbitMQ itself asks for a bound; this one
    #: is far above what a round trip needs, and bounds the memory to some megabytes.
    confirm_window: int = 10_000
    #: Wait of a publish while the broker has blocked the connection (memory or disk alarm).
    blocked_timeout: float | None = 30.0
    #: Wait of a publish until the broker takes data again.
    write_timeout: float | None = 30.0
    #: Polite close of a connection or channel, until it is aborted.
    close_timeout: float = 1.0
    #: Wait for a channel id when all are in use.
    channel_timeout: float | None = 30.0
    #: Put small publishes of one turn of the loop into one send.
    coalesce: bool = True
    #: Log in to RabbitMQ in one round trip instead of three, once it has accepted the same login.
    quick_handshake: bool = True
    #: Largest body that is received, in octets.
    max_message_size: int = DEFAULT_MAX_MESSAGE_SIZE
    #: Unacknowledged deliveries of a consumer for whose channel nobody called basic_qos; 0 is no
    #: bound.  It keeps a slow consumer's backlog at the broker; programs that hold more messages
    #: than this at a time say so by basic_qos.
    default_prefetch: int = 10_000
    #: Waiting deliveries above which the socket is not read (unless a request waits for its
    #: answer); reading goes on at half of them.
    inbox_messages: int = 20_000
    #: The same in octets of their bodies.
    inbox_bytes: int = 64 * 1024 * 1024
    #: How many times those two the inbox may grow to while a request waits for its answer.
    inbox_hard_factor: int = 8
    #: How long sent data may stay unacknowledged by the peer's TCP before the connection is given
    #: up; finds a dead link where no heartbeat was asked for.
    user_timeout: float | None = 60.0

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> AMQPOptions:
        """Take what is ours out of *options*, converted; the rest is somebody else's.

        Raises:
            ValueError: a value that is no number where one is needed, or is out of range.
        """
        if not options:
            return _USUAL
        chosen: dict[str, Any] = {}
        for name in _NAMES & options.keys():
            value = options[name]
            default = getattr(cls, name)
            if value is None and not isinstance(default, (bool, int)):
                chosen[name] = None
                continue
            try:
                chosen[name] = _convert(value, default)
            except (TypeError, ValueError) as exc:
                raise ValueError(f"transport option {name}={value!r}: {exc}") from exc
        if not chosen:
            return _USUAL
        made = cls(**chosen)
        if len(_made) > 256:
            _made.clear()
        return _made.setdefault(made, made)


# Thousands of connections with the same options share one object.
_made: dict[AMQPOptions, AMQPOptions] = {}
_USUAL = AMQPOptions()
_NAMES = frozenset(field.name for field in fields(AMQPOptions))


def _convert(value: Any, like: Any) -> Any:
    if isinstance(like, bool):
        return as_bool(value)
    number = int(value) if isinstance(like, int) else float(value)
    if number < 0:
        raise ValueError("must not be negative")
    return number


def as_bool(value: Any) -> bool:
    """Return *value* as a truth value; text, from a URL, as people write it."""
    if isinstance(value, str):
        return value.strip().lower() in ("1", "true", "yes", "on")
    return bool(value)
