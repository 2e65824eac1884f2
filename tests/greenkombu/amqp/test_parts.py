"""The parts on which channels and connections stand, each alone."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import amqp
import pytest

from greenkombu import Connection
from greenkombu._amqp import confirms, errors, methods
from greenkombu._amqp.gate import Gate
from greenkombu._amqp.heartbeat import Action, Heartbeat
from greenkombu._amqp.inbox import Awaiting, DeliveryInbox, Intake
from greenkombu._amqp.opening import parse_host, socket_options
from greenkombu._amqp.options import AMQPOptions
from greenkombu._amqp.protocol import Confirmation, MethodEvent
from greenkombu._amqp.refusals import check_supported
from greenkombu._amqp.requests import Call
from greenkombu._amqp.rpc import PendingReply, fail_all, fresh, take_reply
from greenkombu.deadline import Deadline
from greenkombu.exceptions import ConfirmTimeoutError, UnsupportedOperation
from greenkombu.transport._loop_bridge import LoopBridge
from hub import BadArgumentError
from hub.environment import Environment
from tests.support.tasks import LONG, run_natively, until

from .broker import Peer, connected, serve

DECLARE = methods.BY_NAME["Queue.declare"]
DECLARE_OK = methods.BY_NAME["Queue.declare_ok"]
BIND_OK = methods.BY_NAME["Queue.bind_ok"]


class Owner:
    where = "channel 1 of broker test"
    blocked: str | None = None


def pending(env: Environment, late: Callable[[Any], object] | None = None) -> PendingReply:
    return PendingReply(DECLARE, methods.replies_to(DECLARE), env.waiter(), late)


def reply(name: str = "q") -> MethodEvent:
    return MethodEvent(1, DECLARE_OK, (name, 0, 0))


# -- replies


def test_replies_go_to_the_requests_in_their_order(env: Environment) -> None:
    queue = [pending(env), pending(env)]
    first, second = queue
    take_reply(queue, reply("first"))
    take_reply(queue, reply("second"))
    assert second.wait(1, Owner).arguments[0] == "second"
    assert first.wait(1, Owner).arguments[0] == "first"
    assert queue == []


def test_replies_of_queues_are_told_apart_by_their_consumer_tag(env: Environment) -> None:
    """RabbitMQ answers later requests before basic.consume and basic.cancel."""
    consume, cancel = methods.BY_NAME["Basic.consume"], methods.BY_NAME["Basic.cancel"]

    def consumer(request: methods.Method, tag: str) -> PendingReply:
        return PendingReply(request, methods.replies_to(request), env.waiter(), None, tag)

    def answer(name: str, tag: str) -> MethodEvent:
        return MethodEvent(1, methods.BY_NAME[name], (tag,))

    first, declared, second = consumer(consume, "a"), pending(env), consumer(consume, "b")
    third = consumer(cancel, "a")
    queue = [first, declared, second, third]
    take_reply(queue, answer("Basic.consume_ok", "b"))
    take_reply(queue, reply("q"))
    take_reply(queue, answer("Basic.cancel_ok", "a"))
    take_reply(queue, answer("Basic.consume_ok", "a"))
    assert queue == []
    assert [each.wait(1, Owner).arguments[0] for each in (first, declared, second, third)] == [
        "a",
        "q",
        "b",
        "a",
    ]
    with pytest.raises(errors.UnexpectedFrameError, match="nobody asked for"):
        take_reply([consumer(consume, "a")], answer("Basic.consume_ok", "other"))
    with pytest.raises(errors.UnexpectedFrameError, match=r"where Queue\.declare_ok was due"):
        take_reply([consumer(consume, "a"), pending(env)], MethodEvent(1, BIND_OK, ()))


def test_tombstone_takes_the_late_reply_and_undoes_it(env: Environment) -> None:
    undone: list[Any] = []
    queue = [pending(env, undone.append), pending(env)]
    first, second = queue
    with pytest.raises(errors.RPCTimeoutError, match=r"Queue\.declare within 0\.01 s on channel 1"):
        first.wait(0.01, Owner)
    late = reply("first")
    take_reply(queue, late)
    take_reply(queue, reply("second"))
    assert undone == [late]
    assert second.wait(1, Owner).arguments[0] == "second"


def test_a_request_that_a_blocked_connection_does_not_answer_says_so(env: Environment) -> None:
    class Blocked(Owner):
        blocked = "low on memory"

    with pytest.raises(errors.RPCTimeoutError, match=r"test, it has blocked publishers \(low on"):
        pending(env).wait(0.01, Blocked)


def test_reply_that_comes_with_the_interruption_is_undone(env: Environment) -> None:
    """A kill may hit a task whose reply has come but which has not run since."""
    if not env.green:
        pytest.skip("native threads cannot be interrupted")
    undone: list[Any] = []
    waiting = pending(env, undone.append)
    begun: list[bool] = []

    def ask() -> None:
        begun.append(True)
        try:
            waiting.wait(None, Owner)
        except BaseException:
            waiting.give_up()
            raise

    task = env.spawn(ask)
    until(env, lambda: begun)
    task.kill()
    event = reply()
    waiting.answer(event)
    assert task.join(5)
    assert undone == [event]


def test_wrong_and_unexpected_replies_are_protocol_errors(env: Environment) -> None:
    with pytest.raises(errors.UnexpectedFrameError, match="nobody asked for"):
        take_reply([], reply())
    queue = [pending(env)]
    with pytest.raises(errors.UnexpectedFrameError, match=r"where Queue\.declare_ok was due"):
        take_reply(queue, MethodEvent(1, BIND_OK, ()))


def test_failure_reaches_all_and_each_gets_its_own_copy(env: Environment) -> None:
    queue = [pending(env) for _ in range(3)]
    all_of_them = list(queue)
    cause = OSError("cable")
    error = errors.ConnectionLostError("gone", (1, 2))
    error.__cause__ = cause
    fail_all(queue, error)
    raised = []
    for each in all_of_them:
        with pytest.raises(errors.ConnectionLostError, match="gone") as caught:
            each.wait(1, Owner)
        raised.append(caught.value)
        assert caught.value.__cause__ is cause
        assert caught.value.method_sig == (1, 2)
    assert len({id(each) for each in (*raised, error)}) == 4


def test_answer_from_another_thread_races_with_giving_up(env: Environment) -> None:
    """Exactly one of the two: an answer, or an undone late answer."""
    undone: list[Any] = []
    answered = 0
    for _ in range(300):
        waiting = pending(env, undone.append)
        if not env.green:
            env.spawn(waiting.answer, reply())
        else:
            run_natively(env, lambda waiting=waiting: waiting.answer(reply()))  # type: ignore[misc]
        try:
            waiting.wait(0.00001, Owner)
            answered += 1
        except errors.RPCTimeoutError:
            pass
    until(env, lambda: answered + len(undone) == 300)


@pytest.mark.parametrize("name", errors.__all__)
def test_copies_of_errors_are_equal_but_not_the_same(name: str) -> None:
    error = getattr(errors, name)("text", (50, 10))
    copy = fresh(error)
    assert copy is not error
    assert type(copy) is type(error)
    assert str(copy) == str(error)


def test_every_request_knows_its_replies() -> None:
    assert methods.replies_to(methods.BY_NAME["Basic.get"]) == {
        methods.BY_NAME["Basic.get_ok"].code,
        methods.BY_NAME["Basic.get_empty"].code,
    }
    assert methods.replies_to(methods.BY_NAME["Exchange.unbind"]) == {
        methods.BY_NAME["Exchange.unbind_ok"].code
    }
    for name in ("Basic.publish", "Basic.ack", "Queue.declare_ok", "Connection.start"):
        assert methods.replies_to(methods.BY_NAME[name]) == frozenset()
    assert methods.method_name((50, 10)) == "Queue.declare"
    assert methods.method_name((9, 9)) == "method 9.9"
    for signature, method in methods.BY_SIGNATURE.items():
        theirs = amqp.exceptions.METHOD_NAME_MAP.get(signature)
        assert theirs in (None, method.name) or method.name.startswith("Exchange")


# -- the gate


def test_gate_lets_through_in_order_of_arrival(env: Environment) -> None:
    gate, room, passed = Gate(), [0], []

    def enter(number: int) -> None:
        assert gate.wait(lambda: room[0] > 0, 5)
        room[0] -= 1
        passed.append(number)

    tasks = []
    for number in range(5):
        tasks.append(env.spawn(enter, number))
        until(env, lambda: len(gate) == len(tasks))
    for expected in range(1, 6):
        room[0] += 1
        gate.open(1)
        until(env, lambda: len(passed) == expected)  # noqa: B023
    for task in tasks:
        task.result(5)
    assert passed == list(range(5))
    assert len(gate) == 0


def test_gate_is_bounded_and_passes_on_what_an_interrupted_task_was_given(
    env: Environment,
) -> None:
    gate = Gate()
    started = time.monotonic()
    assert gate.wait(lambda: False, 0.05) is False
    assert time.monotonic() - started < 10
    assert gate.wait(lambda: True, 0) is True
    if not env.green:
        return
    room = [0]
    killed = env.spawn(gate.wait, lambda: room[0] > 0, 5)
    until(env, lambda: len(gate) == 1)
    other = env.spawn(gate.wait, lambda: room[0] > 0, 5)
    until(env, lambda: len(gate) == 2)
    room[0] = 1
    killed.kill()
    gate.open(1)
    assert other.result(5) is True


# -- back-pressure


class Socket:
    """What an intake tells to read or not."""

    reading = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class CountedInbox(DeliveryInbox):
    counts = 0

    def octets(self) -> int:
        self.counts += 1
        return super().octets()


def filled(count: int, size: int, **options: Any) -> tuple[Intake, CountedInbox, Socket]:
    """An intake whose inbox has taken *count* messages of *size* octets, a block for each."""
    inbox = CountedInbox()
    intake = Intake(inbox, AMQPOptions(**options))
    socket = Socket()
    intake.stream = socket  # type: ignore[assignment]
    arrive(intake, inbox, count, size)
    return intake, inbox, socket


def arrive(intake: Intake, inbox: DeliveryInbox, count: int, size: int) -> None:
    for _ in range(count):
        intake.starts()
        inbox.append(Call(print, SimpleNamespace(size=size)))
        intake.took(size, "test")


def test_a_request_that_was_answered_leaves_the_inbox_as_full_as_it_was() -> None:
    intake, inbox, socket = filled(11, 10, inbox_bytes=100)
    assert not socket.reading
    for _ in range(20):
        with Awaiting(intake):
            assert socket.reading
        # A block was on its way already; it is the last.
        arrive(intake, inbox, 1, 10)
        assert not socket.reading


def test_requests_behind_a_full_inbox_count_up_to_the_hard_bound() -> None:
    intake, inbox, _ = filled(11, 10, inbox_bytes=100, inbox_hard_factor=3)
    with Awaiting(intake), pytest.raises(errors.InboxOverflowError, match="310 octets"):
        arrive(intake, inbox, 100, 10)


def test_a_full_inbox_is_not_counted_for_each_block() -> None:
    _, inbox, socket = filled(1000, 10, inbox_messages=100, inbox_bytes=5000)
    assert not socket.reading
    assert inbox.counts <= 10


def test_what_was_drained_is_seen_when_the_marks_are_reached() -> None:
    intake, inbox, socket = filled(5, 10, inbox_bytes=100)
    for _ in range(1000):
        inbox.popleft()
        arrive(intake, inbox, 1, 10)
    assert socket.reading


def test_what_channels_hold_back_counts_as_well() -> None:
    intake, inbox, socket = filled(1, 10, inbox_bytes=100)
    inbox.popleft()
    held = [SimpleNamespace(size=10) for _ in range(11)]
    for each in held:
        intake.starts()
        intake.hold(each)
        intake.took(10, "test")
    assert not socket.reading
    inbox.extend(held)
    intake.release(held)
    assert socket.reading


# -- confirms


def tracker(window: int = 100) -> confirms.ConfirmTracker:
    return confirms.ConfirmTracker(window)


class Channel:
    """As much of a channel as a result needs."""

    blocked = None

    def __init__(self, env: Environment) -> None:
        self.environment = env
        self.connection = self


def registered(
    env: Environment, tracked: confirms.ConfirmTracker, count: int
) -> list[confirms.PublishResult]:
    made = []
    for number in range(1, count + 1):
        result = confirms.PublishResult(Channel(env), "ex", "key", b"%d" % number)
        tracked.register(result, number)
        made.append(result)
    return made


def test_multiple_confirm_settles_all_below_and_only_these(env: Environment) -> None:
    tracked = tracker()
    results = registered(env, tracked, 10)
    tracked.confirm(Confirmation(1, 2, False, True))
    tracked.confirm(Confirmation(1, 5, True, True))
    assert [result.done for result in results] == [True] * 5 + [False] * 5
    tracked.confirm(Confirmation(1, 99, False, True))  # unknown
    tracked.confirm(Confirmation(1, 0, True, False))  # zero: all
    assert all(result.done for result in results)
    assert results[4].error is None
    assert isinstance(results[5].error, amqp.exceptions.MessageNacked)
    assert tracked.unconfirmed == {}


def test_multiple_confirm_after_many_single_ones_settles_its_own(env: Environment) -> None:
    tracked = tracker(5)
    for number in range(1, 2001):
        result = confirms.PublishResult(Channel(env), "", "q", None)
        tracked.register(result, number)
        tracked.confirm(Confirmation(1, number, number % 7 == 0, True))
        assert result.done


def test_a_window_of_returned_messages_is_looked_through_once(env: Environment) -> None:
    class Counted(dict[int, confirms.PublishResult]):
        looks = 0

        def get(self, *given: Any) -> Any:
            self.looks += 1
            return super().get(*given)

        def values(self) -> Any:
            self.looks += len(self)
            return super().values()

    tracked = tracker(1000)
    tracked.unconfirmed = counted = Counted()
    results = registered(env, tracked, 1000)
    # Half of them reach a queue, and the broker is slow to say so.
    for result in results[1::2]:
        assert tracked.returned("ex", "key", result.body) is result
        result.error = ValueError()
    assert counted.looks <= 1000
    # Not in the order of the publishes, as AMQP does not say it.
    assert tracked.returned("ex", "key", b"1") is results[0]


def test_first_return_after_millions_of_publishes_is_found_at_once(env: Environment) -> None:
    tracked = tracker(1000)
    result = confirms.PublishResult(Channel(env), "ex", "key", b"1")
    # All before it were confirmed.  Looking at each number would take longer than any test may.
    tracked.register(result, 1 << 40)
    assert tracked.returned("ex", "key", b"1") is result
    assert tracked.returned("ex", "key", b"other") is result


def test_returned_message_in_pieces_is_matched_by_the_first(env: Environment) -> None:
    tracked = tracker()
    results = registered(env, tracked, 3)
    for result, body in zip(results, (b"same, but", b"ab...", b"abcde"), strict=True):
        result.body = body
    assert tracked.returned("ex", "key", [b"ab", b"cde"]) is results[1]
    results[1].error = ValueError()
    assert tracked.returned("ex", "key", [b"ab", b"cde"]) is results[2]


def test_result_is_not_waited_for_beyond_the_deadline_of_the_task(env: Environment) -> None:
    [result] = registered(env, tracker(), 1)
    with pytest.raises(ConfirmTimeoutError, match="within 0"), Deadline(0.02):
        result.result()
    with pytest.raises(ConfirmTimeoutError), Deadline(0.02):
        result.result(LONG)


def test_returned_message_is_matched_by_its_body(env: Environment) -> None:
    tracked = tracker()
    results = registered(env, tracked, 3)
    assert tracked.returned("ex", "key", b"2") is results[1]
    results[1].error = ValueError()
    assert tracked.returned("ex", "key", b"other") is results[0]
    assert tracked.returned("ex", "other", b"1") is None
    tracked.confirm(Confirmation(1, 3, True, True))
    with pytest.raises(ValueError):  # noqa: PT011
        results[1].result(1)
    results[0].result(1)


def test_expired_results_are_given_up_and_no_others(env: Environment) -> None:
    tracked = tracker()
    results = registered(env, tracked, 3)
    results[0].deadline = results[1].deadline = time.monotonic() - 1
    results[2].deadline = time.monotonic() + 60
    assert tracked.expire(5.0) == results[:2]
    with pytest.raises(ConfirmTimeoutError, match="within 5 s"):
        results[0].result()
    assert not results[2].done


def test_result_keeps_neither_body_nor_channel_once_it_is_decided(env: Environment) -> None:
    channel = Channel(env)
    seen = weakref.ref(channel)
    result = confirms.PublishResult(channel, "", "q", b"body")
    del channel
    result.decide(None)
    gc.collect()
    assert seen() is None
    assert result.body is None
    assert "taken" in repr(result)


# -- heartbeats


@pytest.mark.parametrize(
    ("interval", "expected"),
    [(1, "SEND SEND SEND SEND"), (10, "SEND NOTHING SEND NOTHING")],
)
def test_heartbeat_is_sent_only_when_nothing_else_was(interval: float, expected: str) -> None:
    heart = Heartbeat(interval)
    assert heart.tick_interval == interval / 2
    sent = 100
    for received in range(3):
        sent += 50  # traffic of ours
        assert heart.tick(sent, received, False) is Action.NOTHING
    actions = []
    for received in range(100, 104):
        action = heart.tick(sent, received, False)
        actions.append(action.name)
        if action is Action.SEND:
            sent += 8
            heart.sent(sent)
    assert " ".join(actions) == expected


def test_silence_of_two_intervals_is_the_end_unless_we_do_not_read() -> None:
    heart = Heartbeat(10)
    for _ in range(10):
        assert heart.tick(0, 5, True) is not Action.GIVE_UP
    actions = [heart.tick(0, 5, False) for _ in range(4)]
    assert Action.GIVE_UP not in actions[:3]
    assert actions[3] is Action.GIVE_UP
    assert heart.tick(0, 6, False) is not Action.GIVE_UP


# -- options and addresses


def test_options_are_converted_shared_and_checked() -> None:
    made = AMQPOptions.from_mapping({"rpc_timeout": "2.5", "coalesce": "false", "other": 1})
    assert made.rpc_timeout == 2.5
    assert made.coalesce is False
    assert AMQPOptions.from_mapping({"rpc_timeout": 2.5, "coalesce": False}) is made
    assert AMQPOptions.from_mapping({"confirm_timeout": None}).confirm_timeout is None
    with pytest.raises(ValueError, match="confirm_window='many'"):
        AMQPOptions.from_mapping({"confirm_window": "many"})
    with pytest.raises(ValueError, match="rpc_timeout=-1"):
        AMQPOptions.from_mapping({"rpc_timeout": -1})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("host", ("host", 5672)),
        ("host:1", ("host", 1)),
        ("[::1]:7", ("::1", 7)),
        ("[::1]", ("::1", 5672)),
        ("fe80::1", ("fe80::1", 5672)),
        (":9", ("localhost", 9)),
    ],
)
def test_hosts_are_split(given: str, expected: tuple[str, int]) -> None:
    assert parse_host(given, 5672) == expected


def test_bad_port_is_named() -> None:
    with pytest.raises(ValueError, match="host:x is no host:port"):
        parse_host("host:x", 5672)


def test_socket_settings_by_name_and_number() -> None:
    made = socket_options({"TCP_KEEPIDLE": 7, 1: 1, "TCP_NOT_HERE": 3}, 5.0)
    assert made.user_timeout == 5.0
    assert sorted(made.extra.values()) == [1, 7]
    with pytest.raises(ValueError, match="SOMETHING"):
        socket_options({"SOMETHING": 1}, None)


def test_a_socket_setting_of_a_wrong_type_is_named() -> None:
    settings = {"socket_settings": {"TCP_KEEPIDLE": "60"}}
    connection = Connection("amqp://127.0.0.1:1//", transport_options=settings)
    with pytest.raises(BadArgumentError, match="TCP_KEEPIDLE is a whole number, not '60'"):
        connection.connect()


# -- a loop of the program's own


class Loop:
    """The least that a foreign loop has: readers."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], object]] = {}

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        self.readers[fd] = callback

    def remove_reader(self, fd: int) -> None:
        self.readers.pop(fd)

    def turn(self, env: Environment, timeout: float = 5) -> bool:
        for fd, callback in list(self.readers.items()):
            if env.wait_readable(fd, timeout):
                callback()
                return True
        return False


def test_foreign_loop_runs_the_events_and_may_ask_the_broker(env: Environment) -> None:
    def script(peer: Peer) -> None:
        channel_id = peer.open_channel()
        tag = peer.expect("Basic.consume")[1][2]
        peer.method(channel_id, "Basic.consume_ok", tag)
        for number in (1, 2):
            peer.deliver(channel_id, tag, number, b"x")
        peer.serve()

    loop = Loop()
    got: list[Any] = []
    with connected(script) as connection:
        channel = connection.channel()

        def consume(message: Any) -> None:
            got.append((message.delivery_tag, channel.queue_declare("q").queue))

        channel.basic_consume("queue", callback=consume, no_ack=True)
        bridge = LoopBridge(connection, loop, lambda: connection.drain_events(timeout=0))
        while len(got) < 2:
            assert loop.turn(env)
        assert got == [(1, "q"), (2, "q")]
        assert not loop.turn(env, timeout=0.05)
        connection.abort(errors.ConnectionLostError("for a test"))
        with pytest.raises(errors.ConnectionLostError, match="for a test"):
            loop.turn(env)
        assert loop.readers == {}
        bridge.close()


def test_bridge_can_be_taken_away(env: Environment) -> None:
    loop = Loop()
    with connected(serve) as connection:
        bridge = LoopBridge(connection, loop, list)
        assert len(loop.readers) == 1
        bridge.close()
        bridge.close()
        assert loop.readers == {}
        connection.inbox.append(list)  # rings nowhere
        connection.drain_events(timeout=10)


def test_other_brokers_may_implement_what_rabbitmq_does_not() -> None:
    connection = SimpleNamespace(server_properties={"product": "qpid"}, broker="b:1")
    check_supported(connection, "publish(immediate=True)")
    connection.server_properties["product"] = "RabbitMQ"
    with pytest.raises(UnsupportedOperation, match="b:1"):
        check_supported(connection, "publish(immediate=True)")
