"""The methods of AMQP 0-9-1 with RabbitMQ's extensions, as data.

One line for each method: its number, its name, the fields in wire order, and whether content
(header and body frames) follows.  A field is ``name:type``; the types are the letters of the
``amqp`` package:

    b bit   o octet   B short   l long   L long long
    s short string   S long string   F table

Sources: the AMQP 0-9-1 specification, section 1.2 to 1.8 of its XML definition, and RabbitMQ's
"Protocol Extensions" page (confirm class, basic.nack, exchange.bind, connection.blocked).
"""

from __future__ import annotations

__all__ = ["BY_CODE", "BY_NAME", "BY_SIGNATURE", "Method", "method_name", "replies_to"]


class Method:
    """One method: `signature` (class id, method id), `code` (both in 32 bits), and its fields."""

    __slots__ = ("code", "fields", "formats", "has_content", "name", "prefix", "runs", "signature")

    def __init__(
        self, signature: tuple[int, int], name: str, fields: str, has_content: bool
    ) -> None:
        self.signature = signature
        self.code = signature[0] << 16 | signature[1]
        self.name = name
        self.fields = tuple(field.split(":")[0] for field in fields.split())
        self.formats = "".join(field.split(":")[1] for field in fields.split())
        #: (type, name, index of the first, index behind the last); up to eight bits in a row
        #: share an octet.
        self.runs: list[tuple[str, str, int, int]] = []
        for index, (field, kind) in enumerate(zip(self.fields, self.formats, strict=True)):
            last = self.runs[-1] if self.runs else ("", "", 0, 0)
            if kind == last[0] == "b" and last[3] - last[2] < 8:
                self.runs[-1] = (*last[:3], index + 1)
            else:
                self.runs.append((kind, field, index, index + 1))
        self.has_content = has_content
        #: The four octets that start the payload of its frame.
        self.prefix = self.code.to_bytes(4, "big")

    def __repr__(self) -> str:
        return f"<Method {self.name} {self.signature}>"


_CONTENT = True

_METHODS = (
    # connection
    (10, 10, "Connection.start", "version_major:o version_minor:o server_properties:F"
     " mechanisms:S locales:S"),
    (10, 11, "Connection.start_ok", "client_properties:F mechanism:s response:S locale:s"),
    (10, 20, "Connection.secure", "challenge:S"),
    (10, 21, "Connection.secure_ok", "response:S"),
    (10, 30, "Connection.tune", "channel_max:B frame_max:l heartbeat:B"),
    (10, 31, "Connection.tune_ok", "channel_max:B frame_max:l heartbeat:B"),
    (10, 40, "Connection.open", "virtual_host:s capabilities:s insist:b"),
    (10, 41, "Connection.open_ok", "known_hosts:s"),
    (10, 50, "Connection.close", "reply_code:B reply_text:s class_id:B method_id:B"),
    (10, 51, "Connection.close_ok", ""),
    (10, 60, "Connection.blocked", "reason:s"),
    (10, 61, "Connection.unblocked", ""),
    (10, 70, "Connection.update_secret", "new_secret:S reason:s"),
    (10, 71, "Connection.update_secret_ok", ""),
    # channel
    (20, 10, "Channel.open", "out_of_band:s"),
    (20, 11, "Channel.open_ok", "channel_id:S"),
    (20, 20, "Channel.flow", "active:b"),
    (20, 21, "Channel.flow_ok", "active:b"),
    (20, 40, "Channel.close", "reply_code:B reply_text:s class_id:B method_id:B"),
    (20, 41, "Channel.close_ok", ""),
    # exchange
    (40, 10, "Exchange.declare", "ticket:B exchange:s type:s passive:b durable:b auto_delete:b"
     " internal:b nowait:b arguments:F"),
    (40, 11, "Exchange.declare_ok", ""),
    (40, 20, "Exchange.delete", "ticket:B exchange:s if_unused:b nowait:b"),
    (40, 21, "Exchange.delete_ok", ""),
    (40, 30, "Exchange.bind", "ticket:B destination:s source:s routing_key:s nowait:b arguments:F"),
    (40, 31, "Exchange.bind_ok", ""),
    (40, 40, "Exchange.unbind", "ticket:B destination:s source:s routing_key:s nowait:b"
     " arguments:F"),
    (40, 51, "Exchange.unbind_ok", ""),
    # queue
    (50, 10, "Queue.declare", "ticket:B queue:s passive:b durable:b exclusive:b auto_delete:b"
     " nowait:b arguments:F"),
    (50, 11, "Queue.declare_ok", "queue:s message_count:l consumer_count:l"),
    (50, 20, "Queue.bind", "ticket:B queue:s exchange:s routing_key:s nowait:b arguments:F"),
    (50, 21, "Queue.bind_ok", ""),
    (50, 30, "Queue.purge", "ticket:B queue:s nowait:b"),
    (50, 31, "Queue.purge_ok", "message_count:l"),
    (50, 40, "Queue.delete", "ticket:B queue:s if_unused:b if_empty:b nowait:b"),
    (50, 41, "Queue.delete_ok", "message_count:l"),
    (50, 50, "Queue.unbind", "ticket:B queue:s exchange:s routing_key:s arguments:F"),
    (50, 51, "Queue.unbind_ok", ""),
    # basic
    (60, 10, "Basic.qos", "prefetch_size:l prefetch_count:B a_global:b"),
    (60, 11, "Basic.qos_ok", ""),
    (60, 20, "Basic.consume", "ticket:B queue:s consumer_tag:s no_local:b no_ack:b exclusive:b"
     " nowait:b arguments:F"),
    (60, 21, "Basic.consume_ok", "consumer_tag:s"),
    (60, 30, "Basic.cancel", "consumer_tag:s nowait:b"),
    (60, 31, "Basic.cancel_ok", "consumer_tag:s"),
    (60, 40, "Basic.publish", "ticket:B exchange:s routing_key:s mandatory:b immediate:b",
     _CONTENT),
    (60, 50, "Basic.return", "reply_code:B reply_text:s exchange:s routing_key:s", _CONTENT),
    (60, 60, "Basic.deliver", "consumer_tag:s delivery_tag:L redelivered:b exchange:s"
     " routing_key:s", _CONTENT),
    (60, 70, "Basic.get", "ticket:B queue:s no_ack:b"),
    (60, 71, "Basic.get_ok", "delivery_tag:L redelivered:b exchange:s routing_key:s"
     " message_count:l", _CONTENT),
    (60, 72, "Basic.get_empty", "cluster_id:s"),
    (60, 80, "Basic.ack", "delivery_tag:L multiple:b"),
    (60, 90, "Basic.reject", "delivery_tag:L requeue:b"),
    (60, 100, "Basic.recover_async", "requeue:b"),
    (60, 110, "Basic.recover", "requeue:b"),
    (60, 111, "Basic.recover_ok", ""),
    (60, 120, "Basic.nack", "delivery_tag:L multiple:b requeue:b"),
    # confirm
    (85, 10, "Confirm.select", "nowait:b"),
    (85, 11, "Confirm.select_ok", ""),
    # transactions
    (90, 10, "Tx.select", ""),
    (90, 11, "Tx.select_ok", ""),
    (90, 20, "Tx.commit", ""),
    (90, 21, "Tx.commit_ok", ""),
    (90, 30, "Tx.rollback", ""),
    (90, 31, "Tx.rollback_ok", ""),
)  # fmt: skip

#: (class id, method id) -> Method
BY_SIGNATURE: dict[tuple[int, int], Method] = {
    (row[0], row[1]): Method((row[0], row[1]), row[2], row[3], len(row) > 4) for row in _METHODS
}

#: class id << 16 | method id -> Method
BY_CODE: dict[int, Method] = {method.code: method for method in BY_SIGNATURE.values()}

#: name -> Method
BY_NAME: dict[str, Method] = {method.name: method for method in BY_SIGNATURE.values()}

# Requests whose reply is not called "<request>_ok", or that have more than one.
_ODD_REPLIES = {"Basic.get": ("Basic.get_ok", "Basic.get_empty")}

# Requests that the broker makes; their "_ok" is ours to send.
_FROM_BROKER = ("Connection.start", "Connection.secure", "Connection.tune")


def method_name(signature: tuple[int, int]) -> str:
    """Return the method's name, or its numbers when it is unknown."""
    method = BY_SIGNATURE.get(signature)
    return method.name if method is not None else f"method {signature[0]}.{signature[1]}"


def _find_replies(name: str) -> frozenset[int]:
    names = _ODD_REPLIES.get(name, (f"{name}_ok",))
    return frozenset(BY_NAME[each].code for each in names if each in BY_NAME)


_REPLIES: dict[int, frozenset[int]] = {
    method.code: _find_replies(method.name)
    for method in BY_NAME.values()
    if method.name not in _FROM_BROKER
}


def replies_to(method: Method) -> frozenset[int]:
    """Return the codes of the methods that answer *method*; empty if none does.

    A request with its field `nowait` set has no answer either way.
    """
    return _REPLIES.get(method.code, frozenset())
