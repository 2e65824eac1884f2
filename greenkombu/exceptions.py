"""Errors of greenkombu: one hierarchy, and Kombu's names.

::

    KombuError
     +-- OperationalError                 the broker could not be reached or used
     |    +-- ConnectionBlocked           the broker asked publishers to wait, for too long
     +-- ConfirmTimeoutError              (also TimeoutError) no confirm within the deadline
     +-- BatchPublishError                some messages of a batch were not taken
     +-- NotBoundError                    an entity is used without a channel
     +-- ArgumentError                    (also ValueError) a value that cannot be sent
     +-- MessageStateError                acked, rejected or requeued twice
     +-- LimitExceeded                    a pool is exhausted
     |    +-- ConnectionLimitExceeded
     |    +-- ChannelLimitExceeded
     +-- SerializationError
     |    +-- EncodeError
     |    +-- DecodeError
     |    +-- NestingTooDeep              (EncodeError and DecodeError)
     |    +-- BodyTooLarge                (EncodeError and DecodeError)
     |         +-- DecompressionBomb
     +-- SerializerNotInstalled
     |    +-- UnknownSerializer           (also KeyError)
     |    +-- ContentDisallowed           the content type is not on the accept list
     +-- CompressorNotInstalled           (also KeyError)
     +-- InvalidURL                       (also ValueError)
     +-- TransportNotFound                (also KeyError and ImportError)
     +-- UnsupportedOperation             (also NotImplementedError) not in `implements`
     +-- VersionMismatch
     +-- HttpError
     +-- StdChannelError                  in the `channel_errors` of every transport
     |    +-- NotFoundError               (also amqp's NotFound, 404)
     |    +-- NotEquivalentError          (also amqp's PreconditionFailed, 406)
     |    +-- ChannelClosedError          (also amqp's RecoverableChannelError)
     |    +-- PublishError                (also amqp's ChannelError)
     |         +-- DeliveryError          (also amqp's MessageNacked) the broker refused it
     |         +-- UnroutableError        (312) returned: no queue is bound for it
     +-- InconsistencyError               (also amqp's ConnectionError)
     +-- ConnectionClosedError            (also amqp's RecoverableConnectionError)
          +-- StaleDeliveryError          the delivery belongs to a connection that is gone

Kombu's `ConnectionError`, `ChannelError` and `ResourceError` *are* the classes of the ``amqp``
package, and programs catch both spellings, so those three are the same objects here, and errors
that such a program must catch derive from them.  The ``amqp`` package imports ``socket``, ``ssl``
and ``threading``; a program may patch them after it imported this module, so everything that needs
``amqp`` is made at first use (PEP 562) from `greenkombu._broker_exceptions`.

`TimeoutError` is `socket.timeout`, which is the builtin since Python 3.10.

Every error pickles with its arguments and attributes.  A message says what failed, on which
broker, queue or name (never a password), and what to do about it.
"""

from __future__ import annotations

import builtins
import importlib
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    from greenkombu._broker_exceptions import (
        ChannelClosedError,
        ChannelError,
        ConnectionClosedError,
        ConnectionError,
        DeliveryError,
        InconsistencyError,
        NotEquivalentError,
        NotFoundError,
        PublishError,
        ResourceError,
        StaleDeliveryError,
        UnroutableError,
    )

__all__ = [
    "ArgumentError",
    "BatchPublishError",
    "BodyTooLarge",
    "ChannelClosedError",
    "ChannelError",
    "ChannelLimitExceeded",
    "CompressorNotInstalled",
    "ConfirmTimeoutError",
    "ConnectionBlocked",
    "ConnectionClosedError",
    "ConnectionError",
    "ConnectionLimitExceeded",
    "ContentDisallowed",
    "DecodeError",
    "DecompressionBomb",
    "DeliveryError",
    "EncodeError",
    "HttpError",
    "InconsistencyError",
    "InvalidURL",
    "KombuError",
    "LimitExceeded",
    "MessageStateError",
    "NestingTooDeep",
    "NotBoundError",
    "NotEquivalentError",
    "NotFoundError",
    "OperationalError",
    "PublishError",
    "ResourceError",
    "SerializationError",
    "SerializerNotInstalled",
    "StaleDeliveryError",
    "StdChannelError",
    "TimeoutError",
    "TransportNotFound",
    "UnknownSerializer",
    "UnroutableError",
    "UnsupportedOperation",
    "VersionMismatch",
    "reraise",
]

#: `socket.timeout` is this very class on Python 3.10 and later; no need to import socket for it.
TimeoutError = builtins.TimeoutError

_E = TypeVar("_E", bound=BaseException)


def _rebuild(kind: type[_E], args: tuple[Any, ...], state: dict[str, Any]) -> _E:
    # Without __init__: signatures of subclasses (amqp's, HttpError's, an application's own) do not
    # match `args`, which is what pickle would pass to them.
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class KombuError(Exception):
    """Base of every error that greenkombu raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class OperationalError(KombuError):
    """The broker cannot be reached, or failed while it was being used."""


class ConnectionBlocked(OperationalError):
    """The broker blocked publishers (memory or disk alarm) beyond the caller's deadline."""


class ConfirmTimeoutError(KombuError, TimeoutError):
    """The broker did not confirm a publish in time: it may or may not have the message."""

    # OSError.__str__ would format two arguments as errno and text.
    __str__ = Exception.__str__


class BatchPublishError(KombuError):
    """Some messages of a batch were not taken by the broker."""


class NotBoundError(KombuError):
    """A declaration (exchange, queue) is used for an operation but is not bound to a channel."""


class ArgumentError(KombuError, ValueError):
    """A value cannot be sent; nothing was, and channel and connection are as they were."""


class MessageStateError(KombuError):
    """The message was already acknowledged, rejected or requeued."""


class LimitExceeded(KombuError):
    """A pool has no free resource, and none became free in time."""


class ConnectionLimitExceeded(LimitExceeded):
    """All connections of the pool are in use."""


class ChannelLimitExceeded(LimitExceeded):
    """All channels of the pool are in use."""


class SerializationError(KombuError):
    """Base of the errors of encoding and decoding a message body."""


class EncodeError(SerializationError):
    """The body cannot be encoded by the chosen serializer; nothing was sent."""


class DecodeError(SerializationError):
    """The body is not what its content type says; the message is untouched."""


# The next two happen in both directions, and programs written for Kombu catch the direction.
class NestingTooDeep(EncodeError, DecodeError):
    """The data structure is nested deeper than its serializer can follow."""


class BodyTooLarge(EncodeError, DecodeError):
    """A body is larger than the limit that applies to it."""


class DecompressionBomb(BodyTooLarge):
    """A compressed body expands beyond the limit; expansion stopped there."""


class SerializerNotInstalled(KombuError):
    """No encoder or decoder of that name or content type is registered."""


class UnknownSerializer(SerializerNotInstalled, KeyError):
    """No serializer of that name is registered."""

    __str__ = Exception.__str__  # KeyError shows the repr of its argument


class ContentDisallowed(SerializerNotInstalled):
    """The content type is not on the accept list, or disabled; the body was not looked at."""


class CompressorNotInstalled(KombuError, KeyError):
    """No compression of that name or content type is registered."""

    __str__ = Exception.__str__


class InvalidURL(KombuError, ValueError):
    """A broker URL cannot be understood."""


class TransportNotFound(KombuError, KeyError, ModuleNotFoundError):
    """No transport has that name, or its class cannot be imported."""

    __str__ = Exception.__str__


class UnsupportedOperation(KombuError, NotImplementedError):
    """The transport cannot do this; its `implements` says so."""


class VersionMismatch(KombuError):
    """A driver or server has a version that cannot be used."""


class HttpError(KombuError):
    """An HTTP service answered with an error.

    Args:
        code: HTTP status.
        message: the reason, as the service gave it.
        response: the response object of the client that was used, or None.
    """

    def __init__(self, code: int, message: str | None = None, response: Any = None) -> None:
        super().__init__(code, message, response)
        self.code = code
        self.message = message
        self.response = response

    def __str__(self) -> str:
        return f"HTTP {self.code}: {self.message}"


class StdChannelError(KombuError):
    """Base of the channel errors that do not come from one particular driver."""


def reraise(
    tp: type[BaseException], value: BaseException, tb: TracebackType | None = None
) -> NoReturn:
    """Raise value with the traceback tb.

    Args:
        tp: its class; kept for Kombu's signature.
        value: the exception.
        tb: the traceback to continue; None keeps the one that value has.

    Raises:
        BaseException: value, always.
    """
    del tp
    if tb is not None and value.__traceback__ is not tb:
        raise value.with_traceback(tb)
    raise value


#: Names made from classes of the ``amqp`` package, at first use.
_LAZY = frozenset(
    {
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
    }
)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module("greenkombu._broker_exceptions")
    for each in _LAZY:
        globals()[each] = getattr(module, each)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
