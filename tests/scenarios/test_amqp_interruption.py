"""Law 3, step by step: give each AMQP operation up at each point where it waits.

A Timeout or a kill is thrown at the first, the second, ... switch of an operation, until it runs
through undisturbed; once at the very moment of the switch, and once after a random time, when the
broker's answer may be there already. After each of them another task goes on on the same
connection, gets the answers that are its own, and everything that the operation held is free.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from greenkombu import exceptions
from greenkombu._amqp import channel as channel_module
from greenkombu._amqp import confirms, consuming, publishing, requests, rpc
from greenkombu._amqp import connection as connection_module
from greenkombu.connection import Connection
from greenkombu.entity import Queue
from greenkombu.messaging import Consumer, Producer
from hub import streams
from hub.environment import Environment, get_environment
from tests.scenarios.broker import QUICK, Broker, pool_of
from tests.scenarios.strikes import Strike, kinds
from tests.support.injection import Injected, Injection
from tests.support.tasks import LONG, until

#: More switches than any operation has.
MANY = 200

CHANNEL_MAX = 12


class World:
    """A connection that an operation shares with a bystander."""

    def __init__(self, env: Environment, broker: Broker, **options: Any) -> None:
        self.env = env
        self.broker = broker
        self.url = broker.url
        self.queue = broker.queue()
        self.own = broker.queue()
        self.connection = self.connect(**options)
        self.channel = self.connection.channel()
        self.bystander = self.connection.channel()
        self.rounds = 0

    def connect(self, **options: Any) -> Connection:
        connection = Connection(
            self.url,
            transport_options={
                **QUICK,
                "confirm_publish": True,
                "channel_max": CHANNEL_MAX,
                "channel_timeout": 2,
                **options,
            },
        )
        connection.connect()
        return connection

    def healthy(self) -> bool:
        """Whether connection and channel live; asserts that nothing is mixed up then."""
        self.rounds += 1
        body = f"{self.rounds}".encode()
        assert self.connection.connected, self.connection._connection
        assert self.bystander.queue_declare(self.own, passive=True).queue == self.own
        Producer(self.bystander, routing_key=self.own).publish(body)
        message = self.bystander.basic_get(self.own, no_ack=True)
        assert message is not None
        assert message.body == body
        assert self.channel.queue_declare(self.queue, passive=True).queue == self.queue
        return True

    def own_numbers(self) -> bool:
        """Whether the numbers of all channels but the two of this world came back."""
        return len(self.connection.connection.table) == 2

    def empty(self) -> list[bytes]:
        """Take all that is in the queue."""
        taken = []
        while True:
            message = self.bystander.basic_get(self.queue, no_ack=True)
            if message is None:
                return taken
            taken.append(message.body)

    def close(self) -> None:
        self.connection.close()


@pytest.fixture
def world(env: Environment, broker: Broker) -> Iterator[World]:
    made = World(env, broker)
    yield made
    made.close()


# -- operations: each returns what is done, and what is asserted after it was given up

Check = Callable[[], object]
Operation = Callable[[World], tuple[Callable[[], object], Check]]


def connect(world: World) -> tuple[Callable[[], object], Check]:
    connection = Connection(world.url, transport_options=QUICK)

    def check() -> None:
        connection.connect()
        assert connection.default_channel.queue_declare(world.queue, passive=True)
        connection.close()

    return connection.connect, check


def open_a_channel(world: World) -> tuple[Callable[[], object], Check]:
    def operation() -> None:
        world.connection.channel().close()

    return operation, lambda: until(world.env, world.own_numbers)


def declare(world: World) -> tuple[Callable[[], object], Check]:
    name = world.broker.queue(declare=False)

    def operation() -> None:
        assert world.channel.queue_declare(name, auto_delete=False).queue == name
        world.channel.queue_bind(name, "amq.direct", name)

    return operation, lambda: world.channel.queue_delete(name)


def consume(world: World) -> tuple[Callable[[], object], Check]:
    channel = world.connection.channel()
    got: list[Any] = []

    def operation() -> None:
        tag = channel.basic_consume(world.queue, callback=got.append)
        channel.basic_cancel(tag)

    def check() -> None:
        # A consumer whose start was given up is stopped, and so is one whose stop was.
        if channel.callbacks:
            for tag in list(channel.callbacks):
                channel.basic_cancel(tag)
        until(world.env, lambda: world.bystander.queue_declare(world.queue, passive=True)[2] == 0)
        channel.close()

    return operation, check


def publish(world: World) -> tuple[Callable[[], object], Check]:
    producer = Producer(world.channel, routing_key=world.queue)

    def operation() -> None:
        producer.publish(b"x" * 1000)
        producer.publish(b"y" * 300_000)

    def check() -> None:
        producer.publish(b"last")
        assert world.empty() in (
            [b"last"],
            [b"x" * 1000, b"last"],
            [b"x" * 1000, b"y" * 300_000, b"last"],
        )

    return operation, check


def get_and_ack(world: World) -> tuple[Callable[[], object], Check]:
    Producer(world.channel, routing_key=world.queue).publish(b"once")
    acked: list[bool] = []

    def operation() -> None:
        message = world.channel.basic_get(world.queue)
        if message is not None:
            assert message.body == b"once"
            message.ack()
            acked.append(True)

    def check() -> None:
        # Taken and acked, or back in its queue.
        if not acked:
            found: list[bytes] = []
            until(world.env, lambda: found.extend(world.empty()) or found)  # type: ignore[func-returns-value]
            assert found == [b"once"]
        world.channel.queue_declare(world.queue, passive=True)
        assert world.empty() == []

    return operation, check


def close_a_channel(world: World) -> tuple[Callable[[], object], Check]:
    channel = world.connection.channel()
    return channel.close, lambda: until(world.env, world.own_numbers)


def close_a_connection(world: World) -> tuple[Callable[[], object], Check]:
    connection = world.connect()
    inner = connection.connection
    sock = inner.sock

    def check() -> None:
        assert not inner.connected
        until(world.env, lambda: sock.fileno() == -1)

    return connection.close, check


def drain(world: World) -> tuple[Callable[[], object], Check]:
    channel = world.connection.channel()
    got: list[Any] = []
    consumer = Consumer(
        channel,
        [Queue(world.queue, no_declare=True)],
        on_message=lambda message: (got.append(message.body), message.ack()),
    )
    consumer.consume()

    def operation() -> None:
        Producer(world.channel, routing_key=world.queue).publish(b"drained")
        world.connection.drain_events(timeout=5)

    def check() -> None:
        world.channel.queue_declare(world.queue, passive=True)
        # Behind the first one, if that was published.
        Producer(world.channel, routing_key=world.queue).publish(b"end")
        while b"end" not in got:
            world.connection.drain_events(timeout=LONG)
        consumer.cancel()
        channel.close()
        assert got in ([b"end"], [b"drained", b"end"])
        assert world.empty() == []

    return operation, check


OPERATIONS: list[Operation] = [
    connect,
    open_a_channel,
    declare,
    consume,
    publish,
    get_and_ack,
    close_a_channel,
    close_a_connection,
    drain,
]


def green(env: Environment) -> None:
    if not env.green:
        pytest.skip("threads have no switch points at which something could be thrown")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("number", [0, 1], ids=["one kind", "other kind"])
def test_s01_an_operation_can_be_given_up_at_each_of_its_switches(
    env: Environment, world: World, operation: Operation, number: int
) -> None:
    green(env)
    kind = kinds(env)[number]
    for at in range(1, MANY):
        run, check = operation(world)
        strike = Strike(env, run, at, kind).run(LONG)
        check()
        assert world.healthy()
        if not strike.struck:
            assert not isinstance(strike.outcome, BaseException), strike.outcome
            break
        assert isinstance(strike.outcome, kind), (at, strike.outcome)
    else:
        pytest.fail("the operation never ends undisturbed")
    assert at > 1, "the operation has no switch point: nothing was tested"
    until(env, world.own_numbers)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_s01_an_operation_can_be_given_up_when_its_answer_is_on_the_way(
    env: Environment, world: World, operation: Operation
) -> None:
    green(env)
    seed = random.randrange(2**32)
    generator = random.Random(seed)
    struck = 0
    for _ in range(30):
        run, check = operation(world)
        kind = generator.choice(kinds(env))
        at = generator.randint(1, 4)
        strike = Strike(env, run, at, kind, generator.uniform(0, 0.0012)).run(LONG)
        try:
            check()
            assert world.healthy()
            assert strike.struck or not isinstance(strike.outcome, BaseException)
        except BaseException as error:
            error.add_note(f"seed {seed}") if hasattr(error, "add_note") else None
            raise
        struck += strike.struck
    until(env, world.own_numbers)


@pytest.mark.parametrize("number", [0, 1], ids=["one kind", "other kind"])
def test_s01_a_pooled_connection_comes_back_wherever_its_user_is_stopped(
    env: Environment, world: World, number: int
) -> None:
    green(env)
    limit = 2
    with pool_of(Connection(world.url, transport_options=QUICK), limit) as pool:

        def use() -> None:
            with pool.acquire(block=True, timeout=5) as connection:
                channel = connection.default_channel
                assert channel.queue_declare(world.own, passive=True).queue == world.own

        for fresh in (True, False):
            for at in range(1, MANY):
                if fresh:
                    pool.force_close_all(close_pool=False)
                strike = Strike(env, use, at, kinds(env)[number]).run(LONG)
                assert pool.stats().held == 0, strike.outcome
                held = [pool.acquire() for _ in range(limit)]
                with pytest.raises(exceptions.LimitExceeded):
                    pool.acquire()
                for connection in held:
                    assert connection.default_channel.queue_declare(world.own, passive=True)
                    connection.release()
                if not strike.struck:
                    assert strike.outcome is None
                    break
            assert at > 1


def get_on_a_channel_of_its_own(world: World) -> tuple[Callable[[], object], Check]:
    Producer(world.channel, routing_key=world.queue).publish(b"once")
    channel = world.connection.channel()
    acked: list[bool] = []

    def operation() -> None:
        message = channel.basic_get(world.queue)
        if message is not None:
            message.ack()
            acked.append(True)

    def check() -> None:
        # Its receiver may have been interrupted with the message in its hand: then the end of the
        # channel brings it back. With the ack on its way, it may be either.
        channel.close()
        found = world.empty()
        assert found == [] if acked else found in ([], [b"once"])

    return operation, check


SIGNALLED = [
    declare,
    *(
        pytest.param(each, marks=pytest.mark.slow)
        for each in (open_a_channel, publish, get_on_a_channel_of_its_own)
    ),
]


@pytest.mark.parametrize("operation", SIGNALLED)
def test_s01_a_signal_handler_that_raises_tears_nothing(
    env: Environment, broker: Broker, operation: Operation
) -> None:
    # Where a request has been entered and its bytes not yet, the connection is given up, as the
    # header of its module says: then it is dead for everybody, at once, with a typed error.
    modules = (
        connection_module,
        channel_module,
        confirms,
        consuming,
        publishing,
        requests,
        rpc,
        streams,
    )
    options = {"rpc_timeout": 2, "confirm_timeout": 2}
    world = World(env, broker, **options)
    given_up = 0
    try:
        for at in range(1, 10 * MANY):
            run, check = operation(world)
            with Injection(modules, at, step="signal") as injection:
                try:
                    run()
                except (Injected, *world.connection.connection_errors):
                    pass
            try:
                if world.connection.connected and not world.channel.closed:
                    check()
                    assert world.healthy()
            except BaseException as error:
                # A stream that was interrupted ends in the hub, a moment later.
                lost = isinstance(error, world.connection.connection_errors)
                if not lost or world.connection.connected:
                    raise AssertionError(f"step {at}, a signal at {injection.where}") from error
            if not injection.fired:
                break
            if not world.connection.connected or world.channel.closed:
                given_up += 1
                world.close()
                world = World(env, broker, **options)
    finally:
        world.close()
    assert at > 20
    assert given_up < at


def test_kinds_are_those_of_the_environment(env: Environment) -> None:
    assert len(kinds(get_environment())) == (2 if env.green else 0)
