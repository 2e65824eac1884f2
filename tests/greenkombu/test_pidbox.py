"""greenkombu.pidbox: behaviours 194-198 and what is on the wire."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from greenkombu.connection import Connection
from greenkombu.entity import Queue
from greenkombu.pidbox import Mailbox, Node
from hub.environment import Environment


@pytest.fixture
def connection() -> Iterator[Connection]:
    from greenkombu import pools

    with Connection("memory://") as made:
        yield made
    pools.reset()


class Running:
    """A node that answers in a task of its own."""

    def __init__(self, env: Environment, mailbox: Mailbox, hostname: str) -> None:
        self.connection = Connection("memory://")
        self.node = mailbox(self.connection).Node(
            hostname, state={"me": hostname}, channel=self.connection.default_channel
        )
        self.seen: list[Any] = []
        self.stopping = False

        @self.node.handler
        def add(state: Any, x: int = 0, y: int = 0) -> int:
            self.seen.append((x, y))
            return x + y

        @self.node.handler
        def fail(state: Any) -> None:
            raise ValueError(state["me"])

        self.consumer = self.node.listen()
        self.task = env.spawn(self._run)

    def _run(self) -> None:
        while not self.stopping:
            try:
                self.connection.drain_events(timeout=0.05)
            except TimeoutError:
                pass

    def stop(self) -> None:
        self.stopping = True
        assert self.task.join(10)
        self.consumer.cancel()
        self.connection.close()


@pytest.fixture
def mailbox(request: pytest.FixtureRequest) -> Mailbox:
    return Mailbox(request.node.name, type="fanout")


@pytest.fixture
def nodes(env: Environment, mailbox: Mailbox) -> Iterator[dict[str, Running]]:
    running = {name: Running(env, mailbox, name) for name in ("one", "two")}
    yield running
    for node in running.values():
        node.stop()


# -- what is declared


def test_b194_names_on_the_wire() -> None:
    mailbox = Mailbox("app", type="fanout")
    assert mailbox.exchange is not None
    assert mailbox.reply_exchange is not None
    assert (mailbox.exchange.name, mailbox.exchange.type) == ("app.pidbox", "fanout")
    assert (mailbox.reply_exchange.name, mailbox.reply_exchange.type) == (
        "reply.app.pidbox",
        "direct",
    )
    for exchange in (mailbox.exchange, mailbox.reply_exchange):
        assert (exchange.durable, exchange.auto_delete, exchange.delivery_mode) == (False, False, 1)
    queue = mailbox.get_queue("host")
    assert queue.name == "host.app.pidbox"
    assert (queue.durable, queue.exclusive, queue.auto_delete) == (False, True, True)
    reply = mailbox.get_reply_queue()
    assert reply.name == f"{mailbox.oid}.reply.app.pidbox"
    assert (reply.routing_key, reply.expires) == (mailbox.oid, 10.0)
    assert Mailbox("app").type == "direct"


def test_b194_a_bound_copy(connection: Connection) -> None:
    mailbox = Mailbox("app")
    bound = mailbox(connection)
    assert bound is not mailbox
    assert bound.connection is connection
    assert mailbox.connection is None
    assert bound.clock is mailbox.clock


def test_durable_and_exclusive_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclusive"):
        Mailbox("app", queue_durable=True)
    queue = Mailbox("app", queue_durable=True, queue_exclusive=False).get_queue("h")
    assert (queue.durable, queue.auto_delete) == (True, False)


# -- nodes alone


def test_b195_handlers_by_name() -> None:
    mailbox = Mailbox("app")

    @mailbox.handler
    def everywhere(state: Any) -> str:
        return "everywhere"

    node = mailbox.Node("h", state={"s": 1})

    @node.handler
    def own(state: Any, x: int = 0) -> Any:
        return state, x

    assert node.handle("own", {"x": 3}) == ({"s": 1}, 3)
    assert node.handle("everywhere") == "everywhere"
    assert mailbox.Node("other").handlers == {"everywhere": everywhere}
    assert mailbox.Node().hostname == socket.gethostname()
    assert mailbox.Node("h", handlers={"own": own}).handle_call("own", {}) == (None, 0)
    with pytest.raises(KeyError):
        node.handle("nosuch")


def test_b197_errors_are_answers(caplog: pytest.LogCaptureFixture) -> None:
    def fail(state: Any) -> None:
        raise ValueError("broken")

    node = Mailbox("app").Node("h", handlers={"fail": fail})
    with caplog.at_level(logging.ERROR):
        assert node.dispatch("fail") == {"error": "ValueError('broken')"}
        assert node.dispatch("nosuch") == {"error": "KeyError('nosuch')"}
    assert "fail" in caplog.text


@pytest.mark.parametrize(
    ("body", "meant"),
    [
        ({}, True),
        ({"destination": ["one", "h"]}, True),
        ({"destination": ["one"]}, False),
        ({"pattern": "h*", "matcher": "glob"}, True),
        ({"pattern": "x*", "matcher": "glob"}, False),
        ({"pattern": "^h$", "matcher": "pcre"}, True),
        ({"destination": ["one"], "pattern": "h*", "matcher": "glob"}, False),
    ],
)
def test_b196_who_is_meant(body: dict[str, Any], meant: bool) -> None:
    node = Mailbox("app").Node("h", handlers={"ping": lambda state: "pong"})
    assert node.handle_message({"method": "ping", **body}) == ("pong" if meant else None)


def test_the_clock_follows_the_messages() -> None:
    class Message:
        headers = {"clock": 33}  # noqa: RUF012

    mailbox = Mailbox("app")
    node = mailbox.Node("h", handlers={"ping": lambda state: None})
    node.handle_message({"method": "ping"}, Message())
    assert mailbox.clock.value == 34


def test_an_undecodable_command_is_logged(
    connection: Connection, caplog: pytest.LogCaptureFixture, mailbox: Mailbox
) -> None:
    from greenkombu.messaging import Producer

    node = mailbox(connection).Node("h", channel=connection.default_channel)
    consumer = node.listen()
    assert consumer.no_ack is True
    producer = Producer(connection)
    producer.publish({"method": "x"}, exchange=mailbox.exchange, serializer="pickle")
    with caplog.at_level(logging.ERROR):
        connection.drain_events(timeout=10)
    assert "Cannot decode message" in caplog.text
    consumer.cancel()


# -- commands


def test_b196_call(connection: Connection, mailbox: Mailbox, nodes: dict[str, Running]) -> None:
    started = time.monotonic()
    seen: list[Any] = []
    answers = mailbox(connection).call(
        ["one"], "add", {"x": 1, "y": 2}, timeout=10, callback=seen.append
    )
    assert answers == [{"one": 3}]
    assert seen == answers
    assert time.monotonic() - started < 8, "it ends with the last answer that is expected"
    assert nodes["two"].seen == []
    assert mailbox(connection).call(["two"], "fail", timeout=10) == [
        {"two": {"error": "ValueError('two')"}}
    ]


def test_b196_multi_call(
    connection: Connection, mailbox: Mailbox, nodes: dict[str, Running]
) -> None:
    bound = mailbox(connection)
    answers: list[Any] = []
    for timeout in (0.5, 5):  # it always takes that long: more only for who was late
        if len(answers) < 2:
            answers = bound.multi_call("add", {"x": 2, "y": 2}, timeout=timeout) or []
    assert sorted(name for answer in answers for name in answer) == ["one", "two"]
    assert len(bound.multi_call("add", timeout=10, limit=2) or []) == 2
    assert (
        len(
            bound._broadcast("add", reply=True, timeout=10, limit=1, pattern="t*", matcher="glob")
            or []
        )
        == 1
    )


def test_b196_cast_and_abcast(
    env: Environment, connection: Connection, mailbox: Mailbox, nodes: dict[str, Running]
) -> None:
    bound = mailbox(connection)
    assert bound.cast(["one"], "add", {"x": 1}) is None
    assert bound.abcast("add", {"x": 2}) is None
    deadline = time.monotonic() + 10
    wanted = {"one": [(1, 0), (2, 0)], "two": [(2, 0)]}
    while time.monotonic() < deadline:
        if {name: node.seen for name, node in nodes.items()} == wanted:
            break
        env.sleep(0.01)
    assert {name: node.seen for name, node in nodes.items()} == wanted


def test_nobody_answers(connection: Connection, mailbox: Mailbox) -> None:
    started = time.monotonic()
    assert mailbox(connection).call(["nobody"], "add", timeout=0.1) == []
    assert time.monotonic() - started < 5


def test_answers_to_other_tickets_are_kept(connection: Connection, mailbox: Mailbox) -> None:
    bound = mailbox(connection)
    channel = connection.default_channel
    bound.reply_queue.declare(channel=channel)
    for ticket, body in (("late", {"a": 1}), ("mine", {"b": 2})):
        bound._publish_reply(
            body, "reply." + str(bound.namespace) + ".pidbox", bound.oid, ticket, channel=channel
        )
    assert bound._collect("mine", limit=1, timeout=10, channel=channel) == [{"b": 2}]
    assert bound._collect("late", limit=1, timeout=10, channel=channel) == [{"a": 1}]


def test_late_answers_are_bounded() -> None:
    mailbox = Mailbox("app")
    for number in range(500):
        mailbox._keep_for(f"ticket {number}", number)
    assert len(mailbox.unclaimed) <= 100
    assert "ticket 499" in mailbox.unclaimed


def test_the_message_on_the_wire(connection: Connection, mailbox: Mailbox) -> None:
    bound = mailbox(connection)
    channel = connection.default_channel
    spy = Queue("spy", bound.exchange)(channel)
    spy.declare()
    bound.call(["h"], "ping", {"x": 1}, timeout=0.05)
    message = spy.get(no_ack=True)
    body = message.payload
    ticket = body.pop("ticket")
    assert len(ticket) == 36
    assert body == {
        "method": "ping",
        "arguments": {"x": 1},
        "destination": ["h"],
        "pattern": None,
        "matcher": None,
        "reply_to": {"exchange": f"reply.{bound.namespace}.pidbox", "routing_key": bound.oid},
    }
    assert message.headers["clock"] == 1
    assert abs(message.headers["expires"] - time.time()) < 60
    channel.queue_delete("spy")


def test_a_destination_is_a_list(connection: Connection, mailbox: Mailbox) -> None:
    with pytest.raises(ValueError, match="list/tuple"):
        mailbox(connection).call("one", "ping")


def test_two_nodes_of_one_name_are_told(
    mailbox: Mailbox, caplog: pytest.LogCaptureFixture, connection: Connection
) -> None:
    node = mailbox(connection).Node("h", channel=connection.default_channel)
    consumer = node.Consumer(auto_declare=False)
    (queue,) = consumer.queues
    assert queue.on_declared is not None
    with caplog.at_level(logging.WARNING):
        queue.on_declared(queue.name, 0, 0)
        assert caplog.text == ""
        queue.on_declared(queue.name, 0, 1)
    assert "already using this process mailbox" in caplog.text
    with pytest.raises(ValueError, match="mailbox"):
        Node("h").listen()
