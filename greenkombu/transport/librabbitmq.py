"""The class path of Kombu's transport on the C library.

What stands behind it is what the name ``librabbitmq`` means: a transport on the C library where a
distribution announces one, else our own, with a record in the log; see
`greenkombu.transport.C_LIBRARY_ALIASES`.
"""

from __future__ import annotations

from greenkombu.transport import get_transport_cls

__all__ = ["Transport"]

Transport = get_transport_cls("librabbitmq")
