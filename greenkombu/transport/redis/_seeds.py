"""A transport that reaches all the servers its client names: sentinels, or nodes of a cluster."""

from __future__ import annotations

from collections.abc import Iterator

from greenkombu._parameters import parse_broker
from greenkombu.transport import resolve_transport
from greenkombu.transport.redis.transport import Transport

__all__ = ["SeededTransport"]


class SeededTransport(Transport):
    """The part that knows what the URLs of a client name."""

    @property
    def reaches_all_brokers(self) -> bool:  # type: ignore[override]
        """Whether all brokers of the client are for this transport."""
        return len(list(self._addresses())) > len(self.client.alt)

    def seeds(self) -> list[tuple[str, int]]:
        """Return (host, port) of each server that the client names, once, in order."""
        return list(dict.fromkeys(self._addresses()))

    def _addresses(self) -> Iterator[tuple[str, int]]:
        client, port = self.client, self.default_port
        assert port is not None
        yield client.hostname or "localhost", client.port or port
        for broker in client.alt:
            parsed = parse_broker(broker, client._given_transport)
            kind = parsed.get("transport") or client.transport_cls
            if isinstance(self, resolve_transport(kind)):
                yield parsed.get("hostname") or "localhost", parsed.get("port") or port
