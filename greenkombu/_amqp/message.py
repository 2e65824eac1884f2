"""Messages as the ``amqp`` package has them: out, encoded late and once; and in, decoded late."""

from __future__ import annotations

from typing import Any

import amqp

from greenkombu._amqp.frames import property_sets, remember_properties
from greenkombu._amqp.protocol import Delivery
from greenkombu._amqp.values import encode_properties

__all__ = ["Outgoing", "Received"]

# The base class has a slot for the body and a dict for the rest.
_SLOTS = ("_dict", "_extra", "_fields", "_headers")


class Outgoing(amqp.Message):  # type: ignore[misc]
    """A message for `basic_publish`, made by a channel's `prepare_message`.

    It is an `amqp.Message`; `properties` is the usual dict and may be written to.  Until somebody
    asks for that dict there is none: the values go to the wire from where they came.

    Args:
        body: bytes or text.
        priority, content_type, content_encoding, headers: the properties that are given apart.
        properties: the others; copied when the dict is made, not changed.
    """

    __slots__ = _SLOTS

    # What only a received message has.
    delivery_info: Any = None
    channel: Any = None

    def __init__(
        self,
        body: Any,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: dict[str, Any] | None = None,
        properties: dict[str, Any] | None = None,
    ) -> None:
        # Not the base's: it would make the dict and six more attributes for each publish.
        self.body = body
        self._fields = (priority, content_type, content_encoding)
        self._headers = headers
        self._extra = properties
        self._dict: dict[str, Any] | None = None

    @property
    def properties(self) -> dict[str, Any]:
        """The properties with AMQP's names; headers are `application_headers`."""
        known = self._dict
        if known is None:
            known = self._dict = self._make_dict()
        return known

    @properties.setter
    def properties(self, value: dict[str, Any]) -> None:
        self._dict = value

    def _make_dict(self) -> dict[str, Any]:
        priority, content_type, content_encoding = self._fields
        made = {
            "priority": priority,
            "content_type": content_type,
            "content_encoding": content_encoding,
            "application_headers": self._headers,
        }
        if self._extra:
            made.update(self._extra)
        return made

    def property_bytes(self) -> bytes:
        """Encode the properties, from the cache of property sets where that can be.

        Raises:
            ArgumentError: a value does not fit; the text names the property.
        """
        if self._dict is not None:
            return encode_properties(self._dict)
        headers = self._headers
        extra = self._extra
        # More than one property besides the usual four means ids, which do not come again.
        if headers or (extra and len(extra) > 1):
            return encode_properties(self._make_dict())
        # An empty table of headers is sent, None is not.
        key: tuple[Any, ...] = (self._fields, headers is None)
        if extra:
            key = (*key, *extra.items())
        try:
            known = property_sets.get(key)
        except TypeError:  # no value that fits can be unhashable
            return encode_properties(self._make_dict())
        if known is None:
            known = remember_properties(key, self._make_dict())
        return known


class Received(Delivery):
    """A delivery with the attributes that consumers of an `amqp.Channel` know.

    It is also the event that waits in the inbox: calling it calls the consumer.
    """

    __slots__ = ("_properties", "channel", "message_count", "no_ack")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._properties: dict[str, Any] | None = None
        self.channel: Any = None
        self.message_count: int | None = None
        self.no_ack = False

    def __call__(self) -> object:
        return self.channel.run_delivery(self)

    @property
    def properties(self) -> dict[str, Any]:
        """The properties with AMQP's names, decoded once."""
        properties = self._properties
        if properties is None:
            properties = self._properties = super().properties
        return properties

    @property
    def headers(self) -> dict[str, Any] | None:
        """The application headers, None if there are none."""
        return self.properties.get("application_headers")

    @property
    def delivery_info(self) -> dict[str, Any]:
        """Where it came from."""
        return {
            "consumer_tag": self.consumer_tag,
            "delivery_tag": self.delivery_tag,
            "redelivered": self.redelivered,
            "exchange": self.exchange,
            "routing_key": self.routing_key,
        }
