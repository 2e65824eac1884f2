"""What a broker, a network or a configuration can get wrong: a typed error that helps.

Each of these errors names the broker and what to do, never the password, and nothing is lost on
other connections and channels.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import amqp
import pytest
import trustme

from greenkombu import exceptions
from greenkombu._amqp import errors
from greenkombu.connection import Connection
from greenkombu.entity import Queue
from greenkombu.messaging import Producer
from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ
from hub.environment import Environment
from hub.errors import TLSError
from tests.greenkombu.amqp.broker import Peer, scripted
from tests.scenarios.broker import QUICK, Broker, took
from tests.support.fault_proxy import FaultProxy
from tests.support.ports import free_port
from tests.support.rabbitmq import Certificates, make_rabbitmq
from tests.support.tasks import LONG

SECRET = "s3cret-pa55word"


def url(port: int, *, scheme: str = "amqp", user: str = "guest", vhost: str = "") -> str:
    return f"{scheme}://{user}:{SECRET}@127.0.0.1:{port}/{vhost}"


@pytest.fixture(autouse=True)
def secrets_stay_secret(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No log record of any level has the password."""
    caplog.set_level(logging.DEBUG)
    yield
    for record in caplog.records:
        assert SECRET not in record.getMessage()
        assert SECRET not in caplog.text


@pytest.fixture
def others(broker: Broker) -> Iterator[Callable[[], None]]:
    """Assert that another connection, with two channels, has noticed nothing."""
    queue = broker.queue()
    with Connection(broker.url, transport_options=QUICK) as connection:
        channels = [connection.channel(), connection.channel()]

        def undisturbed() -> None:
            for channel in channels:
                assert channel.queue_declare(queue, passive=True).queue == queue

        yield undisturbed
        undisturbed()


def refused(connection: Connection, *parts: str, within: float = 5.0) -> BaseException:
    """Return the error of connecting, after looking at everything that it must and must not say."""
    with took() as time_of, pytest.raises(connection.connection_errors) as caught:
        connection.connect()
    assert time_of.seconds < within
    error = caught.value
    chain: BaseException | None = error
    while chain is not None:
        assert SECRET not in f"{chain} {chain!r} {chain.args}"
        chain = chain.__cause__ or chain.__context__
    for part in parts:
        assert part in str(error), f"{part!r} is not in: {error}"
    assert SECRET not in repr(connection)
    assert SECRET not in str(connection.info().get("uri_prefix"))
    assert not connection.connected
    # As it is where no retry can help, wrapped after all retries where one could.
    with pytest.raises((exceptions.OperationalError, errors.ProtocolError)) as caught:
        connection.ensure_connection(max_retries=1, interval_start=0.05)
    assert SECRET not in f"{caught.value} {caught.value!r}"
    connection.close()
    return error


# -- what the configuration gets wrong


def test_wrong_password(broker: Broker, others: Callable[[], None]) -> None:
    connection = Connection(url(broker.server.port), connect_timeout=5)
    with pytest.raises(errors.LoginRefusedError) as caught:
        connection.connect()
    text = f"{caught.value} {caught.value!r}"
    assert f"127.0.0.1:{broker.server.port}" in text
    assert "guest" in text
    assert "Check user name and password" in text
    assert SECRET not in text
    assert isinstance(caught.value, amqp.exceptions.AccessRefused)
    # No retry can help: it is not tried again, and comes as what it is.
    with took() as time_of, pytest.raises(errors.LoginRefusedError):
        connection.ensure_connection(max_retries=3, interval_start=5)
    assert time_of.seconds < 4
    connection.close()
    others()


@pytest.mark.parametrize("login_method", ["AMQPLAIN", "PLAIN"])
def test_unknown_user(broker: Broker, login_method: str) -> None:
    connection = Connection(
        url(broker.server.port, user="nobody"), login_method=login_method, connect_timeout=5
    )
    with pytest.raises(errors.LoginRefusedError, match="nobody") as caught:
        connection.connect()
    assert login_method in str(caught.value)
    assert SECRET not in f"{caught.value} {caught.value!r} {connection!r}"
    connection.close()


def test_virtual_host_that_does_not_exist(broker: Broker, others: Callable[[], None]) -> None:
    address = f"amqp://guest:guest@127.0.0.1:{broker.server.port}/no-such-vhost"
    connection = Connection(address, connect_timeout=5)
    with pytest.raises(errors.VirtualHostError) as caught:
        connection.connect()
    for part in ("no-such-vhost", f"127.0.0.1:{broker.server.port}", "permissions"):
        assert part in str(caught.value)
    assert "guest:guest" not in str(caught.value)
    connection.close()


@pytest.mark.slow
def test_virtual_host_that_the_user_may_not_use(broker: Broker, rabbitmq: PrivateRabbitMQ) -> None:
    user = f"visitor-{os.urandom(4).hex()}"
    rabbitmq.ctl("add_user", user, SECRET)
    try:
        connection = Connection(url(rabbitmq.port, user=user), connect_timeout=5)
        with pytest.raises(errors.VirtualHostError, match=user) as caught:
            connection.connect()
        assert SECRET not in f"{caught.value} {caught.value!r}"
        connection.close()
    finally:
        rabbitmq.ctl("delete_user", user)


def test_nobody_listens(others: Callable[[], None]) -> None:
    port = free_port()
    connection = Connection(url(port), connect_timeout=2)
    error = refused(connection, f"127.0.0.1:{port}", "refused")
    assert isinstance(error, OSError)
    others()


def test_host_that_does_not_exist() -> None:
    connection = Connection(f"amqp://guest:{SECRET}@no-such-host.invalid//", connect_timeout=3)
    error = refused(connection, "no-such-host.invalid", within=8.0)
    assert isinstance(error, OSError)


def test_host_that_swallows_everything(proxy: FaultProxy) -> None:
    proxy.accept("silent")
    error = refused(Connection(url(proxy.port), connect_timeout=0.5), str(proxy.port), "silent")
    assert isinstance(error, TimeoutError)


def test_several_brokers_of_which_one_works(broker: Broker, proxy: FaultProxy) -> None:
    proxy.accept("rst")
    brokers = f"{url(free_port())};{url(proxy.port)};{broker.url}"
    with Connection(brokers, connect_timeout=2, transport_options=QUICK) as connection:
        connection.ensure_connection(max_retries=5, interval_start=0.05)
        assert connection.default_channel.queue_declare("", exclusive=True)


# -- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def tls_rabbitmq(certificates: Certificates) -> Iterator[PrivateRabbitMQ]:
    with make_rabbitmq(tls=certificates.server_files()) as server:
        yield server


def test_tls_to_a_plain_port(broker: Broker, others: Callable[[], None]) -> None:
    port = broker.server.port
    error = refused(
        Connection(url(port, scheme="amqps"), connect_timeout=3), f"127.0.0.1:{port}", "TLS"
    )
    assert isinstance(error, TLSError)
    others()


def test_plain_to_a_tls_port(tls_rabbitmq: PrivateRabbitMQ) -> None:
    port = tls_rabbitmq.tls_port
    refused(Connection(url(port), connect_timeout=3), f"127.0.0.1:{port}", "TLS")


def test_certificate_of_an_authority_that_nobody_trusts(tls_rabbitmq: PrivateRabbitMQ) -> None:
    port = tls_rabbitmq.tls_port
    error = refused(
        Connection(url(port, scheme="amqps"), connect_timeout=3), f"127.0.0.1:{port}", "certificate"
    )
    assert isinstance(error, TLSError)


def test_the_right_certificate_is_accepted(
    tls_rabbitmq: PrivateRabbitMQ, certificates: Certificates
) -> None:
    address = tls_rabbitmq.vhost_url("/", tls=True)
    with Connection(address, ssl={"ca_certs": str(certificates.authority)}) as connection:
        assert connection.default_channel.queue_declare("", exclusive=True)


class TLSServer:
    """Accepts one TLS handshake after the other with a certificate."""

    def __init__(self, env: Environment, certificate: Any, folder: Path) -> None:
        key_file = folder / "chain.pem"
        certificate.private_key_and_cert_chain_pem.write_to_path(key_file)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(key_file)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self.port: int = self._listener.getsockname()[1]
        self._stopped = False
        self._task = env.spawn(self._serve)

    def _serve(self) -> None:
        while not self._stopped:
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            # Not at once: eventlet would leave the socket open when the handshake fails.
            wrapped = self._context.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False
            )
            wrapped.settimeout(5)
            try:
                wrapped.do_handshake()
            except OSError:
                pass
            finally:
                wrapped.close()

    def close(self) -> None:
        self._stopped = True
        self._task.join(LONG)
        self._listener.close()


@pytest.mark.parametrize("fault", ["expired", "other host"])
def test_certificate_that_is_not_valid(
    env: Environment, tmp_path: Path, fault: str, others: Callable[[], None]
) -> None:
    authority = trustme.CA()
    past = datetime.now(timezone.utc) - timedelta(days=1)
    certificate = (
        authority.issue_cert("127.0.0.1", not_after=past)
        if fault == "expired"
        else authority.issue_cert("somewhere-else.example")
    )
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    server = TLSServer(env, certificate, tmp_path)
    try:
        connection = Connection(
            url(server.port, scheme="amqps"),
            ssl={"ca_certs": str(tmp_path / "authority.pem")},
            connect_timeout=3,
        )
        error = refused(
            connection,
            f"127.0.0.1:{server.port}",
            "expired" if fault == "expired" else "127.0.0.1",
            "certificate",
        )
        assert isinstance(error, TLSError)
        others()
    finally:
        server.close()


# -- what is asked of the broker


def test_a_queue_with_other_arguments_closes_its_channel_only(broker: Broker) -> None:
    name = broker.queue(durable=True)
    with Connection(broker.url, transport_options=QUICK) as connection:
        other = connection.channel()
        unacked = broker.queue()
        broker.put(unacked, ["held"])
        held = other.basic_get(unacked)
        with pytest.raises(exceptions.NotEquivalentError, match=name) as caught:
            Queue(name, durable=False)(connection.channel()).declare()
        assert "127.0.0.1" in str(caught.value)
        with pytest.raises(exceptions.NotEquivalentError, match=name):
            Queue(name, durable=True, message_ttl=5)(connection.channel()).queue_declare()
        with pytest.raises(connection.channel_errors, match=r"amq\.direct"):
            connection.channel().exchange_declare("amq.direct", "topic")
        with pytest.raises(exceptions.NotFoundError, match="nowhere"):
            connection.channel().queue_bind(name, "nowhere")
        # Nothing happened to the other channel, not even to what it holds.
        assert other.queue_declare(name, passive=True).queue == name
        held.ack()
        assert other.queue_declare(unacked, passive=True).queue == unacked
    assert broker.has(unacked, 0)


@pytest.mark.parametrize("name", ["q" * 256, "é" * 128])
def test_a_name_that_is_too_long_is_refused_before_it_is_sent(broker: Broker, name: str) -> None:
    queue = broker.queue()
    with Connection(broker.url, transport_options=QUICK) as connection:
        channel = connection.channel()
        for request in (
            lambda: channel.queue_declare(name),
            lambda: channel.basic_consume(name, callback=print),
            lambda: channel.exchange_declare(name, "direct"),
            lambda: Producer(channel).publish("x", routing_key=name),
            lambda: Producer(channel).publish("x", routing_key=queue, correlation_id=name),
            lambda: Producer(channel).publish("x", routing_key=queue, headers={name: 1}),
        ):
            with pytest.raises(errors.ArgumentError):
                request()
        assert channel.queue_declare(queue, passive=True).message_count == 0
        assert not channel.callbacks


def test_values_that_amqp_cannot_carry_harm_nothing(broker: Broker) -> None:
    queue = broker.queue()
    with Connection(broker.url, transport_options=QUICK) as connection:
        channel = connection.channel()
        producer = Producer(channel)
        for options in (
            {"headers": {"x": object()}},
            {"headers": {"x": 2**70}},
            {"priority": 300},
            {"headers": {"x": {"y": [object()]}}},
        ):
            with pytest.raises(exceptions.ArgumentError):
                producer.publish("x", routing_key=queue, **options)
        for request in (
            lambda: channel.basic_ack(-1),
            lambda: channel.basic_qos(0, 70_000, False),
            lambda: channel.basic_qos(0, -1, False),
        ):
            with pytest.raises(exceptions.ArgumentError):
                request()
        producer.publish("fine", routing_key=queue)
        assert broker.bodies(queue, 1) == ["fine"]


# -- what a peer sends (S27)

FRAME_END = b"\xce"


def frame(kind: int, channel: int, payload: bytes, end: bytes = FRAME_END) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + end


GARBAGE = {
    "wrong frame end": frame(1, 1, struct.pack(">HH", 50, 51), b"\x00"),
    "unknown frame type": frame(7, 1, b""),
    "frame too large": struct.pack(">BHI", 3, 1, 1 << 30),
    "unknown class": frame(1, 1, struct.pack(">HH", 77, 10)),
    "unknown method": frame(1, 1, struct.pack(">HH", 60, 99)),
    "method too short": frame(1, 1, b"\x00\x3c"),
    "cut arguments": frame(1, 1, struct.pack(">HH", 50, 11) + b"\xff"),
    "over-long short string": frame(1, 1, struct.pack(">HHB", 60, 31, 255) + b"x"),
    "body without a header": frame(3, 1, b"x"),
    "header without a method": frame(2, 1, struct.pack(">HHQH", 60, 0, 1, 0)),
    "reply that nobody asked for": frame(1, 1, struct.pack(">HH", 90, 11)),
    "text": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "TLS alert": b"\x15\x03\x01\x00\x02\x02\x46",
    "random bytes": bytes(range(255, 55, -1)),
    "zeroes": bytes(100),
}


@pytest.mark.parametrize("kind", sorted(GARBAGE))
@pytest.mark.parametrize("waits", ["for a reply", "for a delivery", "idle"])
def test_s27_garbage_ends_that_connection_with_a_typed_error(
    env: Environment, kind: str, waits: str, others: Callable[[], None]
) -> None:
    ready = env.Event()

    def script(peer: Peer) -> None:
        peer.handshake()
        peer.open_channel()
        if waits == "for a reply":
            peer.expect("Queue.declare")
        else:
            ready.wait(LONG)
        peer.send(GARBAGE[kind])
        peer.serve()

    with scripted(script) as host:
        connection = Connection(f"amqp://guest:{SECRET}@{host}//", transport_options=QUICK)
        channel = connection.channel()
        if waits == "for a delivery":
            waiting = env.spawn(connection.drain_events, timeout=LONG)
            env.sleep(0)
        ready.set()
        wait: Callable[[], object] = {
            "for a reply": lambda: channel.queue_declare("q"),
            "for a delivery": lambda: waiting.result(LONG),
            "idle": lambda: connection.drain_events(timeout=LONG),
        }[waits]
        with pytest.raises(errors.ProtocolError) as caught, took() as time_of:
            wait()
        assert time_of.seconds < LONG / 2
        assert host in str(caught.value), f"the peer is not named: {caught.value}"
        assert isinstance(caught.value, connection.connection_errors)
        assert not connection.connected
        with pytest.raises(connection.connection_errors):
            channel.queue_declare("q")
        others()
        connection.close()


STEPS = ["accept", "header", "start", "start_ok", "tune", "open", "channel", "declare"]


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("step", STEPS)
def test_a_broker_that_closes_at_a_step_of_the_handshake(
    broker: Broker, proxy: FaultProxy, step: str, how: str
) -> None:
    if step == "accept":
        proxy.accept(how)  # type: ignore[arg-type]
    elif step == "header":
        proxy.cut(8, "up", how)  # type: ignore[arg-type]
    else:
        method, toward = {
            "start": ("Connection.start", "down"),
            "start_ok": ("Connection.start_ok", "up"),
            "tune": ("Connection.tune", "down"),
            "open": ("Connection.open_ok", "down"),
            "channel": ("Channel.open_ok", "down"),
            "declare": ("Queue.declare", "up"),
        }[step]
        proxy.end_at(method, toward, how)  # type: ignore[arg-type]
    address = proxy.url(broker.url)
    connection = Connection(address, connect_timeout=10, transport_options=QUICK)
    with took() as time_of, pytest.raises(connection.connection_errors) as caught:
        connection.default_channel.queue_declare("q", passive=True)
    assert time_of.seconds < 8
    assert str(proxy.port) in str(caught.value), caught.value
    assert "guest:guest" not in f"{caught.value!r} {connection!r}"
    assert not connection.connected
    connection.close()


@pytest.mark.parametrize("after", [1, 3, 7, 8, 20, 100, 400, 530])
def test_a_broker_that_closes_after_some_bytes_of_the_handshake(
    broker: Broker, proxy: FaultProxy, after: int
) -> None:
    proxy.cut(after, "down", "fin")
    connection = Connection(proxy.url(broker.url), connect_timeout=3, transport_options=QUICK)
    with pytest.raises(connection.connection_errors) as caught:
        connection.default_channel.queue_declare("", exclusive=True)
    assert str(proxy.port) in str(caught.value), caught.value
    connection.close()


def test_s27_messages_that_nobody_can_decode_are_kept(broker: Broker) -> None:
    queue = broker.queue()
    bad = [
        (b"{no json", {"content_type": "application/json", "content_encoding": "utf-8"}),
        (b"\xff\xfe", {"content_type": "application/json", "content_encoding": "utf-8"}),
        (b"x", {"content_type": "application/x-python-serialize", "content_encoding": "binary"}),
        (b"x", {"content_type": "application/unheard-of", "content_encoding": "binary"}),
    ]
    for body, properties in bad:
        broker.put(queue, [body], **properties)
    broker.put(queue, ["fine"], content_type="text/plain", content_encoding="utf-8")
    undecodable: list[tuple[Any, BaseException]] = []
    got: list[Any] = []
    with Connection(broker.url, transport_options=QUICK) as connection:
        channel = connection.channel()
        with connection.Consumer(
            [Queue(queue, no_declare=True)],
            channel=channel,
            accept=["json", "text/plain"],
            callbacks=[lambda body, message: (got.append(body), message.ack())],
            on_decode_error=lambda message, error: undecodable.append((message, error)),
        ):
            while len(got) + len(undecodable) < len(bad) + 1:
                connection.drain_events(timeout=LONG)
        assert got == ["fine"]
        for message, error in undecodable:
            assert isinstance(error, exceptions.KombuError), repr(error)
            message.requeue()
        channel.close()
    assert broker.has(queue, len(bad)), "a message was lost"


def test_s27_a_body_beyond_the_limit_costs_only_itself(broker: Broker) -> None:
    queue = broker.queue()
    broker.put(queue, [b"x" * (3 << 20)], content_type="application/data")
    broker.put(queue, ["small"], content_type="text/plain", content_encoding="utf-8")
    got: list[Any] = []
    undecodable: list[BaseException] = []
    options = {**QUICK, "max_message_size": 1 << 20}
    with Connection(broker.url, transport_options=options) as connection:
        with connection.Consumer(
            [Queue(queue, no_declare=True)],
            callbacks=[lambda body, message: (got.append(body), message.ack())],
            on_decode_error=lambda message, error: (undecodable.append(error), message.reject()),
            accept=["application/data", "text/plain"],
        ):
            while len(got) + len(undecodable) < 2:
                connection.drain_events(timeout=LONG)
        assert got == ["small"]
        assert isinstance(undecodable[0], exceptions.BodyTooLarge)
        assert connection.connected


def test_s31_a_decompression_bomb_is_refused_with_the_memory_flat(broker: Broker) -> None:
    import resource
    import zlib

    # 256 MiB of zeroes, made without ever having them.
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    bomb = b"".join(packer.compress(block) for _ in range(256)) + packer.flush()
    queue = broker.queue()
    broker.put(
        queue,
        [bomb],
        content_type="text/plain",
        content_encoding="utf-8",
        application_headers={"compression": "application/x-gzip"},
    )
    with Connection(broker.url, transport_options=QUICK) as connection:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        message = connection.default_channel.basic_get(queue)
        with pytest.raises(exceptions.DecompressionBomb) as caught:
            assert message.payload
        assert isinstance(caught.value, exceptions.DecodeError)
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown_kib < 150 * 1024
        message.reject()
        assert connection.default_channel.queue_declare(queue, passive=True).message_count == 0


def test_s31_a_header_nested_100_000_deep_costs_only_its_message(env: Environment) -> None:
    table = b""
    for _ in range(1500):
        table = b"\x01xF" + struct.pack(">I", len(table)) + table
    table = struct.pack(">I", len(table)) + table
    header = struct.pack(">HHQH", 60, 0, 1, 0x2000) + table

    def script(peer: Peer) -> None:
        peer.handshake()
        channel_id = peer.open_channel()

        def consume(peer: Peer, channel_id: int, values: tuple[Any, ...]) -> None:
            peer.method(channel_id, "Basic.consume_ok", values[2])
            deliver = peer.encode(channel_id, "Basic.deliver", values[2], 1, False, "", "q")
            peer.send(deliver + frame(2, channel_id, header) + frame(3, channel_id, b"x"))
            peer.deliver(channel_id, values[2], 2, b"fine")

        del channel_id
        peer.serve(Basic_consume=consume)

    with scripted(script) as host:
        got: list[Any] = []
        undecodable: list[BaseException] = []
        with Connection(f"amqp://{host}//", transport_options=QUICK) as connection:
            with connection.Consumer(
                [Queue("q", no_declare=True)],
                on_decode_error=lambda message, error: undecodable.append(error),
                callbacks=[lambda body, message: got.append(body)],
                accept=None,
            ):
                deadline = time.monotonic() + 5
                while not got and time.monotonic() < deadline:
                    connection.drain_events(timeout=5)
            assert got == ["fine"]
            assert len(undecodable) == 1
            assert connection.connected
