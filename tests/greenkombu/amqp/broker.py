"""A broker that does as it is told: one function per connection, frames in and out.

It listens on loopback in a task of the environment under test, and speaks AMQP through py-amqp's
serialization, so that a mistake of our own codec is not made twice.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from struct import pack, unpack
from typing import Any

from amqp.serialization import dumps, loads

from greenkombu._amqp.connection import Connection
from greenkombu._amqp.methods import BY_NAME, BY_SIGNATURE
from hub.environment import get_environment

__all__ = ["QUICK", "SERVER_PROPERTIES", "Closed", "Peer", "connected", "scripted", "serve"]

#: Bounds of a client that tests do not have to wait for.
QUICK: dict[str, Any] = {
    "connect_timeout": 5,
    "rpc_timeout": 5,
    "confirm_timeout": 5,
    "close_timeout": 5,
}

SERVER_PROPERTIES = {
    "product": "RabbitMQ",
    "version": "3.10.0",
    "capabilities": {
        "authentication_failure_close": True,
        "basic.nack": True,
        "connection.blocked": True,
        "consumer_cancel_notify": True,
        "exchange_exchange_bindings": True,
        "publisher_confirms": True,
    },
}


class Closed(Exception):
    """The client has closed the socket."""


class Peer:
    """The broker's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = b""
        #: Every method that came, as (channel, name, arguments).
        self.received: list[tuple[int, str, tuple[Any, ...]]] = []
        self.heartbeats = 0
        #: Bodies that came, by channel.
        self.bodies: list[tuple[int, bytes]] = []

    # -- out

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def method(self, channel_id: int, name: str, *values: Any) -> None:
        self.send(self.encode(channel_id, name, *values))

    @staticmethod
    def encode(channel_id: int, name: str, *values: Any) -> bytes:
        method = BY_NAME[name]
        payload = method.prefix + (dumps(method.formats, values) if values else b"")
        return pack(">BHI", 1, channel_id, len(payload)) + payload + b"\xce"

    def deliver(
        self, channel_id: int, consumer_tag: str, delivery_tag: int, body: bytes, **kwargs: Any
    ) -> None:
        self.send(self.encode_delivery(channel_id, consumer_tag, delivery_tag, body, **kwargs))

    def encode_delivery(
        self,
        channel_id: int,
        consumer_tag: str,
        delivery_tag: int,
        body: bytes,
        routing_key: str = "queue",
    ) -> bytes:
        head = self.encode(
            channel_id, "Basic.deliver", consumer_tag, delivery_tag, False, "", routing_key
        )
        return head + self.encode_content(channel_id, body)

    @staticmethod
    def encode_content(channel_id: int, body: bytes) -> bytes:
        header = pack(">HHQH", 60, 0, len(body), 0)
        frames = pack(">BHI", 2, channel_id, len(header)) + header + b"\xce"
        if body:
            frames += pack(">BHI", 3, channel_id, len(body)) + body + b"\xce"
        return frames

    # -- in

    def read(self, count: int) -> bytes:
        while len(self._buffer) < count:
            try:
                data = self.sock.recv(65536)
            except OSError:
                data = b""
            if not data:
                raise Closed
            self._buffer += data
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    def next_method(self) -> tuple[int, str, tuple[Any, ...]]:
        """Return the next method; heartbeats are counted, bodies kept on the way."""
        while True:
            kind, channel_id, size = unpack(">BHI", self.read(7))
            payload = self.read(size)
            assert self.read(1) == b"\xce"
            if kind == 8:
                self.heartbeats += 1
            elif kind == 3:
                self.bodies.append((channel_id, payload))
            elif kind == 1:
                method = BY_SIGNATURE[unpack(">HH", payload[:4])]
                values = tuple(loads(method.formats, payload, 4)[0]) if method.formats else ()
                self.received.append((channel_id, method.name, values))
                return channel_id, method.name, values

    def expect(self, name: str) -> tuple[int, tuple[Any, ...]]:
        """Read up to the next method, which must be *name*; return channel and arguments."""
        channel_id, found, values = self.next_method()
        assert found == name, f"{found} instead of {name}"
        return channel_id, values

    # -- whole dialogues

    def start(self, mechanisms: str = "PLAIN AMQPLAIN", **changes: Any) -> tuple[Any, ...]:
        """Take the protocol header, send Connection.start; return the arguments of start_ok."""
        assert self.read(8) == b"AMQP\0\0\x09\x01"
        properties = {**SERVER_PROPERTIES, **changes}
        self.method(0, "Connection.start", 0, 9, properties, mechanisms, "en_US")
        return self.expect("Connection.start_ok")[1]

    def tune(self, channel_max: int = 2047, frame_max: int = 131072, heartbeat: int = 60) -> None:
        self.method(0, "Connection.tune", channel_max, frame_max, heartbeat)
        self.expect("Connection.tune_ok")
        self.expect("Connection.open")

    def handshake(self, **tuning: int) -> None:
        self.start()
        self.tune(**tuning)
        self.method(0, "Connection.open_ok", "")

    def open_channel(self) -> int:
        channel_id, _ = self.expect("Channel.open")
        self.method(channel_id, "Channel.open_ok", "")
        return channel_id

    def serve(self, **answers: Callable[[Peer, int, tuple[Any, ...]], object]) -> None:
        """Answer requests until the client closes; `answers` by name with _ for the dot."""
        while True:
            try:
                channel_id, name, values = self.next_method()
            except Closed:
                return
            answer = answers.get(name.replace(".", "_"))
            if answer is not None:
                answer(self, channel_id, values)
            elif name == "Connection.close":
                self.method(0, "Connection.close_ok")
                return
            elif name in _PLAIN_ANSWERS:
                self.method(channel_id, *_PLAIN_ANSWERS[name](values))


_PLAIN_ANSWERS: dict[str, Callable[[tuple[Any, ...]], tuple[Any, ...]]] = {
    "Channel.open": lambda _: ("Channel.open_ok", ""),
    "Channel.close": lambda _: ("Channel.close_ok",),
    "Queue.declare": lambda values: ("Queue.declare_ok", values[1], 0, 0),
    "Basic.qos": lambda _: ("Basic.qos_ok",),
    "Basic.consume": lambda values: ("Basic.consume_ok", values[2]),
    "Basic.cancel": lambda values: ("Basic.cancel_ok", values[0]),
}


@contextlib.contextmanager
def scripted(script: Callable[[Peer], object]) -> Iterator[str]:
    """Run *script* for each connection; yield "host:port".

    A failure of the script (an assertion in it) is raised at the end of the block.
    """
    environment = get_environment()
    listener = socket.create_server(("127.0.0.1", 0))
    tasks: list[Any] = []
    peers: list[socket.socket] = []

    def talk(sock: socket.socket) -> None:
        try:
            script(Peer(sock))
        except Closed:
            pass
        finally:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    stopped: list[bool] = []

    def accept() -> None:
        # In short waits: nothing wakes an accept in all three environments.
        listener.settimeout(0.05)
        while not stopped:
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                continue
            sock.settimeout(None)
            # A second answer in a row would wait 40 ms for the client's delayed ACK.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peers.append(sock)
            tasks.append(environment.spawn(talk, sock))

    acceptor = environment.spawn(accept)
    host, port = listener.getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        stopped.append(True)
        acceptor.join(5)
        listener.close()
        for sock in peers:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for task in tasks:
            task.join(5)
    for task in tasks:
        task.result(5)


@contextlib.contextmanager
def connected(script: Callable[[Peer], object], **options: Any) -> Iterator[Connection]:
    """Connect to a scripted broker that has done the handshake; close at the end."""

    def whole(peer: Peer) -> None:
        peer.handshake()
        script(peer)

    with scripted(whole) as host:
        connection = Connection(host, **{**QUICK, **options})
        try:
            connection.connect()
            yield connection
        finally:
            connection.close()


def serve(peer: Peer) -> None:
    peer.serve()
