"""Names of transport options: one that is nearly right is told, since it would do nothing.

Programs hand options of one transport to another (a list of brokers has one set of them), and
options of their own through it.  So an unknown name is no error, and only one that looks like a
known one is mentioned, once, in the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

__all__ = ["KNOWN", "tell_misspelt"]

#: Options of all transports, and those that Kombu's users pass besides.
KNOWN = frozenset(
    [
        "connect_retries_timeout",
        "errback",
        "interval_max",
        "interval_start",
        "interval_step",
        "max_retries",
        "authentication",
        "blocked_timeout",
        "channel_max",
        "channel_timeout",
        "client_properties",
        "close_timeout",
        "coalesce",
        "confirm_publish",
        "confirm_timeout",
        "confirm_window",
        "connection_name",
        "connect_timeout",
        "default_prefetch",
        "frame_max",
        "heartbeat",
        "host",
        "inbox_bytes",
        "inbox_hard_factor",
        "inbox_messages",
        "locale",
        "login_method",
        "login_response",
        "max_message_size",
        "on_blocked",
        "on_open",
        "on_tune_ok",
        "on_unblocked",
        "quick_handshake",
        "read_timeout",
        "rpc_timeout",
        "socket_settings",
        "ssl",
        "user_timeout",
        "write_timeout",
        "native_delayed_delivery_enabled",
        "native_delayed_delivery_queue_type",
        "body_encoding",
        "deadletter_queue",
        "polling_interval",
        "ack_emulation",
        "client_name",
        "credential_provider",
        "db",
        "fanout_patterns",
        "fanout_prefix",
        "global_keyprefix",
        "health_check_interval",
        "master_name",
        "max_connections",
        "max_reply_bytes",
        "min_other_sentinels",
        "priority_order",
        "priority_steps",
        "protocol",
        "queue_order_strategy",
        "retry_on_timeout",
        "sentinel_fanout_compat",
        "sentinel_kwargs",
        "sep",
        "socket_connect_timeout",
        "socket_keepalive",
        "socket_keepalive_options",
        "socket_read_size",
        "socket_timeout",
        "unacked_index_key",
        "unacked_key",
        "unacked_mutex_expire",
        "unacked_mutex_key",
        "unacked_restore_interval",
        "unacked_restore_limit",
        "unacked_restore_throttle",
        "visibility_timeout",
    ]
)

#: How alike two names are that one may stand for the other: a letter too many, too few or wrong.
_ALIKE = 0.87

_told: set[str] = set()


def tell_misspelt(options: Mapping[str, Any], own: Iterable[str] = ()) -> None:
    """Log each option whose name is unknown and looks like a known one, once in a process.

    Args:
        options: transport options.
        own: names that a transport of the program's own knows besides.
    """
    for name in options.keys() - KNOWN - set(own) - _told:
        near = get_close_matches(name, KNOWN, 1, _ALIKE) if isinstance(name, str) else ()
        if near:
            import logging  # late: it imports threading

            _told.add(name)
            logging.getLogger(__name__).warning(
                "the transport option %r is unknown and does nothing: did you mean %r?",
                name,
                near[0],
            )
