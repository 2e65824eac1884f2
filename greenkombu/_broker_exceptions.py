"""The errors that derive from the ``amqp`` package's; use them from `greenkombu.exceptions`.

They live apart because importing ``amqp`` imports socket, ssl and threading; the public module
loads this one at first use.  Each is built like amqp's: ``(reply_text, method_sig, method_name,
reply_code)``, and has `code`, `reply_code` and `reply_text`.
"""

from __future__ import annotations

from amqp.exceptions import (
    ChannelError,
    ConnectionError,
    IrrecoverableChannelError,
    MessageNacked,
    NotFound,
    PreconditionFailed,
    RecoverableChannelError,
    RecoverableConnectionError,
    ResourceError,
)

from greenkombu.exceptions import KombuError, StdChannelError

__all__ = [
    "ChannelClosedError",
    "ChannelError",
    "ConnectionClosedError",
    "ConnectionError",
    "DeliveryError",
    "InconsistencyError",
    "NotEquivalentError",
    "NotFoundError",
    "PublishError",
    "ResourceError",
    "StaleDeliveryError",
    "UnroutableError",
]


class NotFoundError(StdChannelError, NotFound):  # type: ignore[misc]
    """The queue or exchange does not exist (404)."""


class NotEquivalentError(StdChannelError, PreconditionFailed):  # type: ignore[misc]
    """A queue or exchange was declared again with other settings (406); it is unchanged."""


class ChannelClosedError(StdChannelError, RecoverableChannelError):  # type: ignore[misc]
    """The channel is closed; open another one."""


class PublishError(StdChannelError, ChannelError):  # type: ignore[misc]
    """Base of the errors of one published message; the channel stays usable."""


class DeliveryError(PublishError, RecoverableChannelError, MessageNacked):  # type: ignore[misc]
    """The broker refused a message (basic.nack, or a full queue that rejects)."""


class UnroutableError(PublishError, IrrecoverableChannelError):  # type: ignore[misc]
    """The broker returned a mandatory message: no queue is bound for its routing key (312)."""

    code = 312

    def __init__(
        self,
        reply_text: str | None = None,
        method_sig: tuple[int, int] | None = (60, 50),
        method_name: str | None = None,
        reply_code: int | None = None,
    ) -> None:
        # Programs look for the broker's word in the text of the error.
        text = reply_text or ""
        if "NO_ROUTE" not in text:
            text = f"NO_ROUTE: {text}" if text else "NO_ROUTE"
        super().__init__(text, method_sig, method_name, reply_code or self.code)


class InconsistencyError(KombuError, ConnectionError):  # type: ignore[misc]
    """What the store holds contradicts itself; a table or key set vanished under the transport."""


class ConnectionClosedError(KombuError, RecoverableConnectionError):  # type: ignore[misc]
    """The connection is closed, was lost, or belongs to the process before a fork."""


class StaleDeliveryError(ConnectionClosedError):
    """The delivery came over a connection that is gone; the broker delivers it again."""


# Pickles, reprs and tracebacks name the public module, wherever the classes are made.
for _name in __all__:
    _class = globals()[_name]
    if _class.__module__ == __name__:
        _class.__module__ = "greenkombu.exceptions"
del _name, _class
