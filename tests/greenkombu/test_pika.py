"""The pika transport on a real RabbitMQ, beyond the contract of all transports."""

from __future__ import annotations

import gc
import logging
import os
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import amqp
import pytest

from greenkombu import Connection, Consumer, Producer, Queue
from greenkombu._amqp import errors
from greenkombu.deadline import Deadline
from greenkombu.exceptions import (
    ChannelClosedError,
    DeliveryError,
    NotEquivalentError,
    NotFoundError,
    StaleDeliveryError,
    TransportNotFound,
    UnroutableError,
    UnsupportedOperation,
)
from hub.environment import Environment, running_callbacks
from tests.greenkombu.amqp.broker import Peer, scripted
from tests.support.fault_proxy import FaultProxy, Rule
from tests.support.injection import Injected, Injection
from tests.support.patched import ROOT
from tests.support.tasks import in_child, until

pika = pytest.importorskip("pika")

if TYPE_CHECKING:
    from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ


@pytest.fixture
def url(rabbitmq: PrivateRabbitMQ) -> str:
    return rabbitmq.url.replace("amqp://", "pika://", 1)


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    with Connection(url) as made:
        yield made


@pytest.fixture
def proxy(rabbitmq: PrivateRabbitMQ) -> Iterator[FaultProxy]:
    made = FaultProxy(("127.0.0.1", rabbitmq.port))
    yield made
    made.close()


@pytest.fixture
def name() -> str:
    """A name for a queue that goes with the connection that declares it."""
    return f"test-{os.urandom(6).hex()}"


def drain(connection: Connection, got: list[Any], count: int) -> None:
    while len(got) < count:
        connection.drain_events(timeout=10)


def publish(channel: Any, body: Any, queue: str, **options: Any) -> None:
    channel.basic_publish(channel.prepare_message(body), "", queue, **options)


def get(channel: Any, queue: str) -> Any:
    deadline = time.monotonic() + 10
    while (message := channel.basic_get(queue)) is None:
        assert time.monotonic() < deadline
    return message


# -- what it is


@pytest.mark.parametrize("alias", ["pika", "oldpika"])
def test_b191_aliases_are_a_working_amqp_transport(
    rabbitmq: PrivateRabbitMQ, name: str, alias: str
) -> None:
    with Connection(rabbitmq.url.replace("amqp://", f"{alias}://", 1)) as connection:
        queue = Queue(name, durable=False, exclusive=True)(connection.default_channel)
        queue.declare()
        Producer(connection).publish({"a": 1}, routing_key=name)
        assert get(queue.channel, name).payload == {"a": 1}
        assert (connection.transport.driver_type, connection.transport.driver_name) == (
            "amqp",
            "pika",
        )
        assert connection.transport.driver_version() == pika.__version__
        assert connection.connection.server_properties["product"] == "RabbitMQ"
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.05)
        assert time.monotonic() - started < 5


def test_without_pika_the_error_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['pika'] = None\n"
        "from greenkombu import Connection\n"
        "try: Connection('pika://').connect()\n"
        "except ImportError as error: print(type(error).__name__, error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert found.stdout.startswith(TransportNotFound.__name__), found.stderr
    assert "greenkombu[pika]" in found.stdout


def test_no_loop_of_pikas_own_is_used(connection: Connection) -> None:
    connection.connect()
    assert "pika.adapters.gevent_connection" not in sys.modules
    protocol = connection.connection.link.protocol
    assert protocol.ioloop is connection.connection.stream.hub


def test_errors_of_a_channel_are_typed_and_leave_the_connection_alone(
    connection: Connection, name: str
) -> None:
    other = connection.channel()
    with pytest.raises(NotFoundError, match="no queue"):
        connection.channel().queue_declare(name, passive=True)
    channel = connection.channel()
    channel.queue_declare(name, exclusive=True)
    with pytest.raises(NotEquivalentError, match="inequivalent"):
        channel.queue_declare(name, exclusive=True, arguments={"x-max-length": 5})
    with pytest.raises(ChannelClosedError):
        publish(channel, "x", name)
    with pytest.raises(StaleDeliveryError):
        channel.basic_ack(1)
    channel = connection.channel()
    channel.basic_ack(99)
    with pytest.raises(amqp.exceptions.PreconditionFailed, match="unknown delivery tag"):
        channel.queue_declare(name, exclusive=True)
    assert other.queue_declare(name, exclusive=True).queue == name


def test_what_pika_cannot_send_harms_nothing(
    connection: Connection, env: Environment, name: str
) -> None:
    channel = connection.channel()
    channel.queue_declare(name, exclusive=True, auto_delete=False)
    long = "é" * 200
    tasks = [
        env.spawn(function, *arguments)
        for function, *arguments in (
            # Behind another request, where pika itself would find out while it reads.
            (channel.queue_declare, name, True),
            (channel.queue_declare, long),
            (channel.basic_get, long),
            (channel.basic_consume, long, "tag", False, False, False, False, print),
            (publish, channel, "x", long),
            (channel.queue_declare, name, True),
        )
    ]
    for task in tasks[1:5]:
        with pytest.raises(errors.ArgumentError):
            task.result(10)
    assert tasks[0].result(10).queue == tasks[5].result(10).queue == name
    with pytest.raises(errors.ArgumentError, match="float"):
        Producer(channel).publish("x", routing_key=name, headers={"pi": 3.14})
    with pytest.raises(errors.ArgumentError, match="delivery tag"):
        channel.basic_ack("1")
    with pytest.raises(UnsupportedOperation, match="pika"):
        publish(channel, "x", name, immediate=True)
    # The same things again, as they can be sent.
    channel.basic_consume(name, "tag", callback=print)
    channel.basic_cancel("tag")
    publish(channel, "x", name)
    assert get(channel, name).body in ("x", b"x")
    channel.close(200, long)
    assert connection.connected


def test_logging_in(rabbitmq: PrivateRabbitMQ, url: str) -> None:
    wrong = Connection(url).clone(password="hunter2")
    with pytest.raises(errors.LoginRefusedError, match="user 'guest'") as caught:
        wrong.connect()
    assert "hunter2" not in str(caught.value) + repr(caught.value)
    with pytest.raises(errors.VirtualHostError, match="'nowhere'"):
        Connection(url).clone(virtual_host="nowhere").connect()
    with pytest.raises(errors.MechanismError, match="EXTERNAL"):
        Connection(url).clone(login_method="EXTERNAL").connect()
    with pytest.raises(UnsupportedOperation, match="PLAIN and EXTERNAL"):
        Connection(url).clone(login_method="AMQPLAIN").connect()
    with Connection(url, transport_options={"connection_name": "pika-7"}) as connection:
        connection.connect()
        assert "pika-7" in rabbitmq.ctl("list_connections", "client_properties")


def test_a_broker_that_keeps_silent_is_given_up(proxy: FaultProxy, url: str) -> None:
    proxy.accept("silent")
    connection = Connection(proxy.url(url), connect_timeout=0.3)
    started = time.monotonic()
    with pytest.raises(connection.connection_errors, match="silent"):
        connection.connect()
    assert time.monotonic() - started < 5


# -- requests and their bounds


def test_a_late_answer_goes_to_nobody(proxy: FaultProxy, url: str, name: str) -> None:
    with Connection(proxy.url(url)) as connection:
        channel = connection.channel()
        channel.queue_declare(name, exclusive=True)
        held = proxy.hold("Queue.declare_ok", "down")
        with pytest.raises(errors.RPCTimeoutError, match=r"Queue\.declare"), Deadline(0.1):
            channel.queue_declare(f"{name}-late", exclusive=True)
        with pytest.raises(errors.RPCTimeoutError), Deadline(0.1):
            channel.queue_purge(name)  # behind the other one: it is not sent any more
        held.release()
        assert channel.queue_declare(name, exclusive=True).queue == name
        assert proxy.count("Queue.purge", "up") == 0


def give_up(held: Rule, request: Callable[[], object]) -> None:
    """Give a request up that the broker has answered, and whose answer is held.

    On a machine that stands still the time is over before it is sent, and it is not sent then.
    """
    while not held.hits:
        with pytest.raises(errors.RPCTimeoutError), Deadline(0.1):
            request()


def test_what_was_given_up_takes_no_effect_for_long(
    proxy: FaultProxy, url: str, name: str, env: Environment
) -> None:
    with Connection(proxy.url(url)) as connection:
        channel = connection.channel()
        channel.queue_declare(name, exclusive=True)
        publish(channel, "x", name)
        until(env, lambda: channel.queue_declare(name, exclusive=True).message_count == 1)
        held = proxy.hold("Basic.get_ok", "down")
        give_up(held, lambda: channel.basic_get(name))
        held.release()
        message = get(channel, name)  # put back
        assert message.redelivered
        message.ack()
        held = proxy.hold("Basic.consume_ok", "down")
        give_up(held, lambda: channel.basic_consume(name, "tag", callback=print))
        held.release()
        until(env, lambda: proxy.count("Basic.cancel", "up") == 1)
        assert channel.queue_declare(name, exclusive=True).consumer_count == 0


def test_timeouts_thrown_anywhere_leave_a_clean_connection(
    connection: Connection, name: str, env: Environment
) -> None:
    if not env.green:
        pytest.skip("native threads cannot be interrupted")
    channel = connection.channel()

    def declare() -> Any:
        return channel.queue_declare(name, exclusive=True, auto_delete=False)

    declare()
    interrupted = 0
    for step in range(40):
        try:
            with env.timeout(step * 0.0001):
                for _ in range(50):
                    declare()
                    publish(channel, b"x" * 1000, name)
                    channel.basic_cancel(channel.basic_consume(name, callback=print))
                    channel.basic_get(name, no_ack=True)
        except env.timeout_types:
            interrupted += 1
    assert interrupted > 20
    until(env, lambda: declare().consumer_count == 0)
    channel.queue_purge(name)
    publish(channel, "last", name)
    assert get(channel, name).body in ("last", b"last")


@pytest.mark.parametrize("operation", ["declare", "publish", "get", "consume"])
def test_a_signal_handler_that_raises_tears_nothing(
    connection: Connection, name: str, env: Environment, operation: str
) -> None:
    """Nothing of pika's runs in the task, so the connection survives an exception anywhere."""
    if env.green:
        pytest.skip("the tracer follows the switches into the hub's own greenlet")
    from greenkombu.transport.pika import _channel, _connection, _consuming, _publishing, _requests

    modules = (_channel, _connection, _consuming, _publishing, _requests)
    channel = connection.channel()
    channel.queue_declare(name, exclusive=True, auto_delete=False)
    operations = {
        "declare": lambda: channel.queue_declare(name, exclusive=True, auto_delete=False),
        "publish": lambda: publish(channel, "x", name),
        "get": lambda: channel.basic_get(name, no_ack=True),
        "consume": lambda: channel.basic_cancel(channel.basic_consume(name, callback=print)),
    }
    for at in range(1, 2000):
        with Injection(modules, at, step="signal") as injection:
            try:
                operations[operation]()
            except Injected:
                pass
        assert channel.queue_purge(name) is not None, injection.where
        if not injection.fired:
            break
    assert at > 10
    for tag in list(channel.callbacks):
        channel.basic_cancel(tag)
    until(env, lambda: channel.queue_declare(name, passive=True).consumer_count == 0)


def test_a_consumer_that_was_given_up_can_be_started_again_with_its_tag(
    proxy: FaultProxy, url: str, name: str, env: Environment
) -> None:
    first, second = name, f"{name}-2"
    with Connection(proxy.url(url)) as connection:
        channel = connection.channel()
        for queue in (first, second):
            channel.queue_declare(queue, exclusive=True, auto_delete=False)
            publish(channel, queue, queue)
        got: list[Any] = []
        held = proxy.hold("Basic.consume_ok", "down")
        give_up(held, lambda: channel.basic_consume(first, "own", callback=got.append))
        retry = env.spawn(channel.basic_consume, second, "own", callback=got.append)
        env.sleep(0.05)
        held.release()
        assert retry.result(10) == "own"
        drain(connection, got, 1)
        assert got[0].body in (second, second.encode())
        got[0].ack()
        message = get(channel, first)  # it was put back
        assert message.redelivered
        assert len(got) == 1


def test_many_tasks_ask_get_and_consume_on_one_channel(
    connection: Connection, name: str, env: Environment
) -> None:
    channel = connection.channel()
    channel.queue_declare(name, exclusive=True)

    def work(number: int) -> None:
        own = f"{name}-{number}"
        for _ in range(5):
            assert channel.queue_declare(own, exclusive=True).queue == own
            publish(channel, own, own)
            assert get(channel, own).body in (own, own.encode())
            tag = channel.basic_consume(own, callback=print)
            channel.basic_cancel(tag)

    tasks = [env.spawn(work, number) for number in range(10)]
    for task in tasks:
        task.result(30)
    assert channel.callbacks == {}


# -- confirms and returns


def test_confirms_are_pipelined_and_typed(url: str, name: str, env: Environment) -> None:
    with Connection(url, transport_options={"confirm_publish": True}) as connection:
        channel = connection.channel()
        arguments = {"x-max-length": 100, "x-overflow": "reject-publish"}
        channel.queue_declare(name, exclusive=True, arguments=arguments)
        tasks = [env.spawn(publish, channel, b"%d" % number, name) for number in range(100)]
        for task in tasks:
            task.result(30)
        with pytest.raises(DeliveryError, match=name):
            publish(channel, "one too many", name)
        with pytest.raises(UnroutableError, match="NO_ROUTE"):
            publish(channel, "x", "no-such-queue", mandatory=True)
        returned: list[Any] = []
        producer = Producer(channel, on_return=lambda *given: returned.append(given))
        producer.publish("y", routing_key="no-such-queue", mandatory=True)
        assert isinstance(returned[0][0], UnroutableError)
        assert returned[0][3].body == "y"
        assert channel._confirms.unconfirmed == {}


def test_confirms_on_request_count_from_their_beginning(
    connection: Connection, name: str, env: Environment
) -> None:
    channel = connection.channel()
    channel.queue_declare(name, exclusive=True)
    publish(channel, "not numbered", name)
    tasks = [
        env.spawn(channel.basic_publish_async, channel.prepare_message(b"%d" % n), "", name)
        for n in range(50)
    ]
    for task in tasks:
        task.result(10).result(10)
    assert channel.queue_declare(name, exclusive=True).message_count == 51


# -- deliveries


def test_a_message_that_is_too_large_concerns_nobody_else(url: str, name: str) -> None:
    bad: list[Any] = []
    good: list[Any] = []
    with Connection(url, transport_options={"max_message_size": 1000}) as connection:
        consumer = Consumer(
            connection,
            [Queue(name, durable=False, exclusive=True)],
            callbacks=[lambda body, message: good.append((body, message))],
            on_decode_error=lambda message, error: bad.append((message, error)),
        )
        with consumer:
            Producer(connection).publish("x" * 300_000, routing_key=name)
            Producer(connection).publish("small", routing_key=name)
            drain(connection, good, 1)
        assert good[0][0] == "small"
        message, error = bad[0]
        assert isinstance(error, errors.MessageTooLarge)
        assert message.body is None


LARGE = 1_300_000


def in_frames(channel_id: int, announced: int, fragments: list[bytes]) -> bytes:
    header = struct.pack(">HHQH", 60, 0, announced, 0)
    frames = [(2, header), *((3, fragment) for fragment in fragments)]
    return b"".join(
        struct.pack(">BHI", kind, channel_id, len(payload)) + payload + b"\xce"
        for kind, payload in frames
    )


@pytest.mark.parametrize("scheme", ["amqp", "pika"])
@pytest.mark.parametrize("fault", ["none", "too long", "mixed up"])
def test_the_frames_of_a_large_body(scheme: str, fault: str) -> None:
    body = bytes(range(256)) * (LARGE // 256)
    fragments = [body[at : at + 130_000] for at in range(0, len(body), 130_000)]

    def answer(peer: Peer, channel_id: int, _values: Any) -> None:
        start = peer.encode(channel_id, "Basic.get_ok", 1, False, "", "q", 0)
        if fault == "mixed up":
            half = in_frames(channel_id, len(body), fragments[:2])
            peer.send(start + half + start + in_frames(channel_id, 1, [b"x"]))
        else:
            announced = len(body) - (1 if fault == "too long" else 0)
            peer.send(start + in_frames(channel_id, announced, fragments))

    def script(peer: Peer) -> None:
        peer.handshake()
        peer.serve(Basic_get=answer, Connection_close=lambda *_: None)

    options = {"close_timeout": 0.2, "rpc_timeout": 10}
    with (
        scripted(script) as host,
        Connection(f"{scheme}://{host}//", transport_options=options) as connection,
    ):
        channel = connection.channel()
        if fault == "none":
            assert channel.basic_get("q").body == body
            assert channel.basic_get("q").body == body
        else:
            with pytest.raises(connection.connection_errors) as caught:
                channel.basic_get("q")
            assert not isinstance(caught.value, TimeoutError)


def test_a_full_inbox_stops_the_reading_but_no_request(url: str, name: str) -> None:
    got: list[Any] = []
    options = {"inbox_messages": 20, "inbox_bytes": 10_000_000}
    with (
        Connection(url, heartbeat=30, transport_options=options) as connection,
        Connection(url) as other,
    ):
        channel = connection.channel()
        channel.queue_declare(name, auto_delete=True)
        channel.basic_consume(name, callback=got.append, no_ack=True)
        for number in range(100):
            publish(other.default_channel, b"%d" % number, name)
        deadline = time.monotonic() + 10
        while not connection.connection.intake.paused:
            assert time.monotonic() < deadline
            get_nothing(other)
        # What is not read on purpose is no missed heartbeat.
        checker = connection.connection.link.protocol._heartbeat_checker
        checker._update_counters()
        assert checker._has_received_data
        assert channel.queue_declare(name, passive=True).queue == name
        drain(connection, got, 100)
        assert [int(message.body) for message in got] == list(range(100))


def get_nothing(connection: Connection) -> None:
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.01)


def test_the_broker_cancels_a_consumer(url: str, name: str) -> None:
    with Connection(url) as connection, Connection(url) as other:
        channel = connection.channel()
        channel.queue_declare(name, auto_delete=False)
        channel.basic_consume(name, "tag", callback=print)
        other.default_channel.queue_delete(name)
        with pytest.raises(amqp.exceptions.ConsumerCancelled):
            connection.drain_events(timeout=10)
        channel.basic_cancel("tag")


def test_flow_holds_deliveries_back(connection: Connection, name: str) -> None:
    got: list[Any] = []
    queue = Queue(name, durable=False, exclusive=True)
    with Consumer(connection, [queue], on_message=got.append, no_ack=True) as consumer:
        consumer.flow(False)
        Producer(connection).publish("x", routing_key=name)
        get_nothing(connection)
        consumer.flow(True)
        drain(connection, got, 1)


# -- the end of connections and channels


def test_a_lost_connection_is_typed_and_a_new_one_works(
    proxy: FaultProxy, url: str, name: str
) -> None:
    with Connection(proxy.url(url)) as connection:
        got: list[Any] = []
        channel = connection.channel()
        channel.queue_declare(name, auto_delete=False)
        channel.basic_consume(name, callback=got.append)
        publish(channel, "x", name)
        drain(connection, got, 1)
        proxy.reset()
        with pytest.raises(errors.ConnectionLostError):
            connection.drain_events(timeout=10)
        with pytest.raises(StaleDeliveryError):
            got[0].ack()
        connection.ensure_connection(max_retries=3, timeout=20)
        channel = connection.channel()
        channel.basic_consume(name, callback=got.append)
        drain(connection, got, 2)
        assert got[1].redelivered
        channel.queue_delete(name)


def test_the_brokers_reason_for_closing_is_told(rabbitmq: PrivateRabbitMQ, url: str) -> None:
    with Connection(url) as connection:
        established = connection.connection
        rabbitmq.close_all_connections("for a test")
        with pytest.raises(amqp.exceptions.ConnectionForced, match="for a test"):
            established.drain_events(timeout=10)


def test_heartbeats_go_out_with_nobody_draining(
    proxy: FaultProxy, url: str, env: Environment
) -> None:
    with Connection(proxy.url(url), heartbeat=1) as connection:
        connection.connect()
        assert connection.get_heartbeat_interval() == 1
        until(env, lambda: proxy.count("heartbeat", "up") >= 2)
        assert connection.connected


@pytest.mark.slow  # pika waits five seconds more than the interval; see the next test
def test_a_silent_broker_is_found(proxy: FaultProxy, url: str) -> None:
    with Connection(proxy.url(url), heartbeat=1) as connection:
        connection.connect()
        proxy.black_hole()
        with pytest.raises(errors.HeartbeatLostError):
            connection.drain_events(timeout=20)


def test_pikas_verdict_on_heartbeats_ends_the_connection(connection: Connection) -> None:
    connection.connect()
    established = connection.connection
    checker = established.link.protocol._create_heartbeat_checker
    established.link.protocol.params.heartbeat = 1

    def missed() -> None:
        made = checker()
        made._check_heartbeat()  # what its timer would do 6 seconds later: nothing came meanwhile

    established.link.post(missed)
    with pytest.raises(errors.HeartbeatLostError):
        established.drain_events(timeout=10)


def test_a_frame_beyond_what_was_agreed_ends_the_connection(connection: Connection) -> None:
    connection.connect()
    established = connection.connection
    frame = struct.pack(">BHI", 3, 0, 1 << 30) + bytes(200_000)
    established.link.post(established.link.data_received, frame)
    with pytest.raises(errors.BadFrameError, match="131072"):
        established.drain_events(timeout=10)


def test_what_pika_cannot_read_ends_the_connection(connection: Connection) -> None:
    connection.connect()
    established = connection.connection
    established.link.post(established.link.data_received, b"\x01\x00\x00\x00\x00\x00\x04" * 3)
    with pytest.raises(errors.MalformedValueError, match="pika cannot read"):
        established.drain_events(timeout=10)


def test_channels_and_connections_that_were_dropped_are_closed(
    rabbitmq: PrivateRabbitMQ, url: str, env: Environment
) -> None:
    with Connection(url, transport_options={"channel_max": 2}) as connection:
        kept = connection.channel()
        for _ in range(5):
            dropped_channel = weakref.ref(connection.channel())
            until(env, lambda gone=dropped_channel: gone() is None, collecting=True)
        assert kept.is_open
        other = connection.channel()
        waiting = env.spawn(connection.channel)
        env.sleep(0.05)
        other.close()
        assert waiting.result(10).is_open
    options = {"channel_max": 2, "channel_timeout": 0.1}
    with Connection(url, transport_options=options) as connection:
        held = [connection.channel() for _ in range(2)]
        with pytest.raises(errors.ChannelLimitError):
            connection.channel()
        assert all(channel.is_open for channel in held)
    dropped = Connection(url, heartbeat=5)
    established = dropped.transport.establish_connection()
    gone = weakref.ref(established)
    stream = established.stream
    del established
    until(env, lambda: gone() is None, collecting=True)
    until(env, lambda: stream.closed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_do_not_disturb_the_parent(url: str, name: str) -> None:
    with Connection(url, heartbeat=5) as connection:
        got: list[Any] = []
        channel = connection.channel()
        with Consumer(channel, [Queue(name, exclusive=True)], on_message=got.append, no_ack=True):
            producer = Producer(connection)

            def child() -> None:
                with pytest.raises(connection.connection_errors):
                    channel.queue_declare(name, passive=True)
                channel.close()
                connection.close()
                gc.collect()
                with Connection(url) as own:
                    own.connect()

            for number in range(3):
                producer.publish(number, routing_key=name)
                in_child(child)
            drain(connection, got, 3)
            assert [message.payload for message in got] == [0, 1, 2]


def test_pikas_log_records_are_not_written_in_the_hub(
    url: str, env: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    inside: list[str] = []
    records: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())
            if running_callbacks.get(env.current()) is not None:
                inside.append(record.getMessage())

    logger = logging.getLogger("pika")
    handler = Handler()
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.DEBUG, "pika"), Connection(url) as connection:
            connection.channel()
            until(env, lambda: any("Creating channel" in record for record in records))
    finally:
        logger.removeHandler(handler)
    assert inside == []
