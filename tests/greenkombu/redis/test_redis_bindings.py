"""Where a message goes: what a publisher knows of bindings, and how it learns of changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from greenkombu import Connection, Exchange, Producer, Queue
from greenkombu.exceptions import BatchPublishError, UnroutableError
from greenkombu.transport.redis._bindings import Bindings
from greenkombu.transport.virtual.tables import BindingTable, DirectTable
from hub.environment import Environment
from tests.greenkombu.redis.support import Database
from tests.support.tasks import LONG, until

#: How often a race is run.
ROUNDS = 40


def commands(database: Database, *names: str) -> Counter[str]:
    """Return how often the server has carried out some commands."""
    found: Counter[str] = Counter()
    for name, text in database.server.info("commandstats").items():
        word = name.removeprefix("cmdstat_").upper()
        if word in names:
            found[word] = int(text.partition("calls=")[2].partition(",")[0])
    return found


def bind_unheard(
    env: Environment, database: Database, member: bytes, change: bytes = b"SADD"
) -> None:
    """Change exchange "e" while, under green threads, no other task can run or read."""
    command = b"SELECT %d\r\n%b _kombu.binding.e %b\r\n" % (database.number, change, member)
    sock = env.original("socket", "socket")()
    try:
        sock.connect(("127.0.0.1", database.server.port))
        sock.sendall(command)
        answer = b""
        while answer.count(b"\r\n") < 2:
            answer += sock.recv(100)
        assert answer == b"+OK\r\n:1\r\n"
    finally:
        sock.close()


def reads(database: Database) -> int:
    """Return how often the server has read from a socket."""
    return int(database.server.info("stats")["total_reads_processed"])


def bound(connection: Connection, queue: str, exchange: Exchange, key: str = "") -> Any:
    made = Queue(queue, exchange, routing_key=key)(connection.default_channel)
    made.declare()
    return made


def test_the_bindings_of_an_exchange_are_read_once(database: Database) -> None:
    exchange = Exchange("e", "topic")
    bound(database.connect(), "q", exchange, "a.#")
    producer = Producer(database.connect(), exchange)
    before = commands(database, "SMEMBERS")
    for _ in range(10):
        producer.publish(1, routing_key="a.b")
    assert commands(database, "SMEMBERS") - before == {"SMEMBERS": 1}
    assert database.command("LLEN", "q") == 10


@pytest.mark.parametrize("kind", ["direct", "topic", "headers"])
def test_a_queue_that_was_just_bound_gets_the_next_message(
    env: Environment, database: Database, kind: str
) -> None:
    """Nobody tells the publisher but the server; what it has read before is out of date."""
    connection = database.connect()
    exchange = Exchange("e", kind)
    bound(connection, "first", exchange, "key")
    [first] = database.command("SMEMBERS", "_kombu.binding.e")
    producer = Producer(connection, exchange)
    for number in range(ROUNDS):
        producer.publish(number, routing_key="key")
        bind_unheard(env, database, first.replace(b"first", b"q%d" % number))
        producer.publish(number, routing_key="key")
        assert database.command("LLEN", f"q{number}") == 1


def test_a_message_without_queues_is_dropped_only_if_that_is_still_true(
    env: Environment, database: Database
) -> None:
    """The publisher has read that there are no bindings, and the news is on its way."""
    producer = Producer(database.connect(), Exchange("e"))
    for number in range(ROUNDS):
        producer.publish(number, routing_key=f"key{number}")
        bind_unheard(env, database, b"key%d\x06\x16\x06\x16q%d" % (number, number))
        producer.publish(number, routing_key=f"key{number}")
        assert database.command("LLEN", f"q{number}") == 1


def test_a_binding_that_comes_while_a_message_is_sent(env: Environment, database: Database) -> None:
    """What is published after the binding was made arrives; each message at most once."""
    exchange = Exchange("e")
    consuming = database.connect()
    bound(consuming, "all", exchange, "key")
    producer = Producer(database.connect(), exchange)
    made = [-1]
    ended: list[None] = []

    def bind() -> None:
        for number in range(ROUNDS):
            bound(consuming, f"q{number}", exchange, "key")
            made[0] = number
        ended.append(None)

    binding = env.spawn(bind)
    expected: Counter[int] = Counter()
    sent = 0
    while not ended:
        there = made[0] + 1
        producer.publish(sent, routing_key="key")
        expected.update(range(there))
        sent += 1
    binding.result(LONG)
    assert database.command("LLEN", "all") == sent
    for number in range(ROUNDS):
        assert expected[number] <= database.command("LLEN", f"q{number}") <= sent


def test_an_unbound_queue_gets_nothing_more(database: Database) -> None:
    exchange = Exchange("e")
    queue = bound(database.connect(), "q", exchange, "key")
    producer = Producer(database.connect(), exchange)
    producer.publish(1, routing_key="key")
    queue.unbind_from(exchange, "key")
    producer.publish(2, routing_key="key")
    assert database.command("LLEN", "q") == 1


@pytest.mark.parametrize("others", [0, 2])
def test_what_went_to_a_queue_that_was_just_unbound_is_taken_back(
    env: Environment, database: Database, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    connection = database.connect()
    for name in ["q", *(f"other{number}" for number in range(others))]:
        bound(connection, name, Exchange("e"), "key")
    publishing = database.connect()
    channel = publishing.channel()
    producer = Producer(channel, Exchange("e"))
    producer.publish(1, routing_key="key")
    assert database.command("LLEN", "q") == 1
    pushes = channel._pushes

    def unbound_meanwhile(queues: list[str], message: Any) -> Any:
        if "q" in queues:
            bind_unheard(env, database, b"key\x06\x16\x06\x16q", b"SREM")
        return pushes(queues, message)

    monkeypatch.setattr(channel, "_pushes", unbound_meanwhile)
    producer.publish(2, routing_key="key")
    assert database.command("LLEN", "q") == 1
    assert [database.command("LLEN", f"other{number}") for number in range(others)] == [2] * others


def test_an_emptied_database_is_noticed(database: Database) -> None:
    exchange = Exchange("e")
    consuming, publishing = database.connect(), database.connect()
    bound(consuming, "q", exchange, "key")
    bound(consuming, "other", exchange, "key")
    producer = Producer(publishing, exchange)
    producer.publish(1, routing_key="key")
    database.command("FLUSHDB")
    bound(consuming, "q", exchange, "key")
    producer.publish(2, routing_key="key")
    assert database.keys() == ["_kombu.binding.e", "_kombu.binding_permanent.e", "q"]


def test_a_new_connection_makes_lost_bindings_again(env: Environment, database: Database) -> None:
    connection = database.connect()
    bound(connection, "q", Exchange("e"), "key")
    database.command("FLUSHDB")
    connection.connection.wire.abort()
    until(env, lambda: not connection.connected)
    connection.ensure_connection()  # and the program does not declare again
    Producer(database.connect(), Exchange("e")).publish(1, routing_key="key")
    assert database.command("LLEN", "q") == 1


def test_tasks_that_read_bindings_at_a_time_share_what_they_read(database: Database) -> None:
    """Each would displace what another one reads, and 50 tasks read for ever, in lockstep."""
    read: list[BindingTable] = []

    class Server:
        keys = database.connect().default_channel.connection.keys
        tracks = True

        def call_many(self, commands: list[Any]) -> list[Any]:
            if len(commands) == 2 and not read:
                # Another task, which begins later and is answered in the same block.
                read.append(None)  # type: ignore[arg-type]
                read[0] = bindings.table("e", DirectTable)
            return [b"OK", [self.keys.member(("key", "", "q"))]]

    server = Server()
    bindings = Bindings(server)  # type: ignore[arg-type]
    table = bindings.table("e", DirectTable)
    assert table.match("key") == ["q"]
    assert bindings.holds("e", table)
    assert bindings.holds("e", read[0])
    bindings.forget(server.keys.binding("e"))
    assert not bindings.holds("e", table)


def test_a_mandatory_message_without_queues_comes_back(database: Database) -> None:
    connection = database.connect(confirm_publish=True)
    with pytest.raises(UnroutableError):
        Producer(connection, Exchange("e")).publish(1, routing_key="key", mandatory=True)


def test_queues_of_one_message_get_it_in_one_write(database: Database) -> None:
    exchange = Exchange("e")
    connection = database.connect()
    for number in range(5):
        bound(connection, f"q{number}", exchange, "key")
    Producer(connection, exchange).publish(1, routing_key="key")
    tags = {database.command("LINDEX", f"q{number}", 0) for number in range(5)}
    assert len(tags) == 5  # each copy has a tag of its own


# -- batches


def test_a_batch_goes_in_few_writes(database: Database) -> None:
    exchange, fanout = Exchange("e"), Exchange("f", "fanout")
    connection = database.connect()
    bound(connection, "q", exchange, "key")
    fanout(connection.default_channel).declare()
    producer = Producer(connection)
    assert producer.supports_batch_publish
    producer.publish("before", exchange=exchange, routing_key="key")
    before = reads(database)
    with producer.batch():
        for number in range(300):
            producer.publish(number, exchange=exchange, routing_key="key")
            producer.publish(number, routing_key="named")
            producer.publish(number, exchange=fanout)
        assert database.command("LLEN", "named") == 0
    assert reads(database) - before < 100  # of the 900 that single messages take at least
    assert database.command("LLEN", "q") == 301
    assert database.command("LLEN", "named") == 300
    assert database.command("LINDEX", "named", -1).startswith(b'{"body": "MA=="')  # 0


def test_a_batch_sees_bindings_as_a_single_message_does(database: Database) -> None:
    exchange = Exchange("e")
    consuming, publishing = database.connect(), database.connect()
    bound(consuming, "first", exchange, "key")
    producer = Producer(publishing, exchange)
    for number in range(ROUNDS):
        producer.publish(0, routing_key="key")
        with producer.batch():
            producer.publish(1, routing_key="key")
            producer.publish(2, routing_key=f"key{number}")
            bound(consuming, f"q{number}", exchange, "key")
            bound(consuming, f"q{number}", exchange, f"key{number}")
        assert database.command("LLEN", f"q{number}") == 2


def test_a_failed_batch_says_so(database: Database) -> None:
    connection = database.connect()
    database.command("SET", "q", "a text")
    producer = Producer(connection)

    def publish_both() -> None:
        with producer.batch():
            producer.publish(1, routing_key="other")
            producer.publish(2, routing_key="q")

    with pytest.raises(BatchPublishError, match="WRONGTYPE"):
        publish_both()
    assert database.command("LLEN", "other") == 1


def test_a_mandatory_message_of_a_batch_comes_back(env: Environment, database: Database) -> None:
    connection = database.connect()
    returned: list[str] = []
    producer = Producer(connection, Exchange("e"), on_return=lambda *args: returned.append(args[2]))
    with producer.batch():
        producer.publish(1, routing_key="nowhere", mandatory=True)

    def came() -> bool:
        try:
            connection.drain_events(timeout=0.05)
        except TimeoutError:
            pass
        return bool(returned)

    until(env, came)
    assert returned == ["nowhere"]
