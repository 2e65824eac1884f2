"""A received message: its body, its metadata, and what became of it.

Every transport derives from `Message`.  The life of a message is one table: a message
is received, and leaves that state once, by `Message.ack`, `Message.reject` or
`Message.requeue`.  The body is decoded when it is first asked for, and once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from greenkombu.compression import decompress
from greenkombu.exceptions import MessageStateError
from greenkombu.serialization import loads

if TYPE_CHECKING:
    import logging

__all__ = ["Message"]

RECEIVED = "RECEIVED"

# Where each settling action leads.  All three start in RECEIVED and nothing leaves the
# state that they lead to (AMQP 0-9-1, basic.ack and basic.reject: a delivery is settled once).
ACK = "ACK"
REJECTED = "REJECTED"
REQUEUED = "REQUEUED"

# Absent from the cache, told apart from a payload that is None or empty.
_UNDECODED: Any = object()


class Message:
    """One message taken from a queue.

    Args:
        body: the bytes (or text) as they arrived; decompressed here when the header
            `compression` names a method.
        delivery_tag: the channel's number for this delivery.
        content_type, content_encoding: how the body was serialized; None when the
            sender did not say.
        delivery_info: where it came from: consumer_tag, exchange, routing_key, redelivered.
        properties: the other AMQP properties.
        headers: application headers.
        postencode: the encoding for a body that arrived as str; None keeps it.
        accept: content types that may be decoded; None leaves it to the registry.
        channel: the channel to settle it on; None for a message that needs no settling.

    A body that cannot be decompressed does not raise here: the error is kept in `errors`
    (exc_info triples) and a `Consumer` hands it to `on_decode_error`.  `headers`,
    `properties` and `delivery_info` are plain dicts that belong to the receiver.
    """

    MessageStateError: type[Exception] = MessageStateError

    # Shared and empty until something goes wrong, so that a good message carries no list.
    errors: Sequence[tuple[type[BaseException], BaseException, None]] = ()

    __slots__ = (
        "__dict__",
        "__weakref__",
        "_decoded_cache",
        "_state",
        "accept",
        "body",
        "channel",
        "content_encoding",
        "content_type",
        "delivery_info",
        "delivery_tag",
        "headers",
        "properties",
    )

    def __init__(
        self,
        body: Any = None,
        delivery_tag: Any = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        delivery_info: dict[str, Any] | None = None,
        properties: dict[str, Any] | None = None,
        headers: dict[str, Any] | None = None,
        postencode: str | None = None,
        accept: Any = None,
        channel: Any = None,
        **kwargs: Any,  # noqa: ARG002  transports pass what they know; Kombu ignores the rest
    ) -> None:
        self.body = body
        self.delivery_tag = delivery_tag
        self.content_type = content_type
        self.content_encoding = content_encoding
        self.delivery_info = {} if delivery_info is None else delivery_info
        self.properties = {} if properties is None else properties
        self.headers = {} if headers is None else headers
        self.accept = accept
        self.channel = channel
        self._state = RECEIVED
        self._decoded_cache = _UNDECODED
        if headers:
            compression = headers.get("compression")
            if compression:
                self._decompress(compression)
        if postencode and isinstance(self.body, str):
            self._encode_text(postencode)

    def _decompress(self, method: str) -> None:
        try:
            self.body = decompress(self.body, method)
        except Exception as exc:
            self._note_error(exc)

    def _encode_text(self, encoding: str) -> None:
        try:
            self.body = self.body.encode(encoding)
        except Exception as exc:
            self._note_error(exc)

    def _note_error(self, exc: Exception) -> None:
        # Without tracebacks: they would hold this frame, and so the message, in a cycle.
        chained: BaseException | None = exc
        while chained is not None and chained.__traceback__ is not None:
            chained.__traceback__ = None
            chained = chained.__cause__ or chained.__context__
        entry = (type(exc), exc, None)
        self.errors = [*self.errors, entry]

    def _reraise_error(self, callback: Callable[[Message, Exception], Any] | None = None) -> None:
        """Raise the first error met while the message was built, or give it to *callback*."""
        if not self.errors:
            return
        error = self.errors[0][1]
        if callback is not None and isinstance(error, Exception):
            callback(self, error)
        else:
            raise error

    # -- settling

    def ack(self, multiple: bool = False) -> None:
        """Tell the broker that this message was processed; it is removed from the queue.

        Args:
            multiple: also acknowledge every earlier unsettled delivery of the channel.

        Raises:
            MessageStateError: settled before, or it has no channel.

        A message of a consumer with `no_ack` is settled already: this does nothing.
        When the channel raises, the message is still unsettled.
        """
        channel = self.channel
        if channel is None:
            raise self._no_channel("ack")
        if channel.no_ack_consumers is not None:
            tag = self.delivery_info.get("consumer_tag")
            if tag is not None and tag in channel.no_ack_consumers:
                return
        if self._state is not RECEIVED:
            raise self._settled_before("ack")
        # Set before the call: it may wait, and another task must not settle it meanwhile.
        self._state = ACK
        try:
            channel.basic_ack(self.delivery_tag, multiple=multiple)
        except BaseException:
            self._state = RECEIVED
            raise

    def reject(self, requeue: bool = False) -> None:
        """Refuse this message; the broker discards or dead-letters it.

        Args:
            requeue: put it back on its queue instead.

        Raises:
            MessageStateError: settled before, or it has no channel.
        """
        self._reject("reject", REJECTED, requeue)

    def requeue(self) -> None:
        """Refuse this message and put it back on its queue, for any consumer.

        Not a way to choose messages: it may come back at once.

        Raises:
            MessageStateError: settled before, or it has no channel.
        """
        self._reject("requeue", REQUEUED, True)

    def _reject(self, action: str, state: str, requeue: bool) -> None:
        channel = self.channel
        if channel is None:
            raise self._no_channel(action)
        if self._state is not RECEIVED:
            raise self._settled_before(action)
        self._state = state
        try:
            channel.basic_reject(self.delivery_tag, requeue=requeue)
        except BaseException:
            self._state = RECEIVED
            raise

    def ack_log_error(
        self,
        logger: logging.Logger,
        errors: type[BaseException] | tuple[type[BaseException], ...],
        multiple: bool = False,
    ) -> None:
        """Acknowledge, and log (CRITICAL) instead of raising any of *errors*."""
        try:
            self.ack(multiple=multiple)
        except BaseException as exc:
            if not isinstance(exc, errors):
                raise
            logger.critical("Couldn't ack %r, reason:%r", self.delivery_tag, exc, exc_info=True)

    def reject_log_error(
        self,
        logger: logging.Logger,
        errors: type[BaseException] | tuple[type[BaseException], ...],
        requeue: bool = False,
    ) -> None:
        """Reject, and log (CRITICAL) instead of raising any of *errors*."""
        try:
            self.reject(requeue=requeue)
        except BaseException as exc:
            if not isinstance(exc, errors):
                raise
            logger.critical("Couldn't reject %r, reason: %r", self.delivery_tag, exc, exc_info=True)

    @property
    def acknowledged(self) -> bool:
        """Whether it was acknowledged, rejected or requeued."""
        return self._state is not RECEIVED

    def _settled_before(self, action: str) -> Exception:
        return self.MessageStateError(
            f"Message already acknowledged with state: {self._state}; cannot {action} delivery "
            f"{self.delivery_tag!r} a second time"
        )

    def _no_channel(self, action: str) -> Exception:
        return self.MessageStateError(
            f"This message does not have a receiving channel; cannot {action} it"
        )

    # -- the body

    def decode(self) -> Any:
        """Return the body as the structure that was published.

        Raises:
            DecodeError: the body is not what its content type says.
            ContentDisallowed: the content type is not accepted.
            The error in `errors`, when the body could not be decompressed.

        After an error the message is unsettled and unchanged; the next call tries again.
        """
        value = self._decoded_cache
        if value is _UNDECODED:
            value = self._decoded_cache = self._decode()
        return value

    def _decode(self) -> Any:
        if self.errors:
            self._reraise_error()
        return loads(self.body, self.content_type, self.content_encoding, accept=self.accept)

    @property
    def payload(self) -> Any:
        """The decoded body, decoded once."""
        value = self._decoded_cache
        return self.decode() if value is _UNDECODED else value

    def __repr__(self) -> str:
        body = self.body
        details: dict[str, Any] = {
            "state": self._state,
            "content_type": self.content_type,
            "delivery_tag": self.delivery_tag,
            "body_length": len(body) if body is not None else None,
        }
        properties = self.properties
        details["properties"] = {
            name: properties[name] for name in ("correlation_id", "type") if name in properties
        }
        info = self.delivery_info
        details["delivery_info"] = {
            name: info[name] for name in ("exchange", "routing_key") if name in info
        }
        shown = {name: value for name, value in details.items() if value is not None}
        return f"<{type(self).__name__} object at {id(self):#x} with details {shown!r}>"
