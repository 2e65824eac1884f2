"""Nothing follows the Channel.close of a channel, wherever a native thread is at that moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import amqp
import pytest

from greenkombu._amqp import channel as channel_module
from greenkombu._amqp import consuming, publishing, requests
from greenkombu._amqp.channel import Channel
from greenkombu.exceptions import StaleDeliveryError
from hub import streams
from hub.environment import Environment
from tests.support.injection import Injection

from .broker import Peer, connected

USES: dict[str, Callable[[Channel], object]] = {
    "publish": lambda channel: channel.basic_publish(channel.prepare_message(b"x"), "", "q"),
    "ack": lambda channel: channel.basic_ack(1),
    "declare": lambda channel: channel.queue_declare("q", nowait=True),
}


@pytest.mark.parametrize("how", ["close", "collect", "broker"])
@pytest.mark.parametrize("what", sorted(USES))
def test_channel_close_at_any_step_of_a_write_is_its_last_word(
    env: Environment, what: str, how: str
) -> None:
    """RabbitMQ ends the connection (504) when anything follows."""
    if env.green:
        pytest.skip("green threads do not switch there")
    peers: list[Peer] = []

    def declare(peer: Peer, channel_id: int, values: tuple[Any, ...]) -> None:
        if not values[6]:  # nowait
            peer.method(channel_id, "Queue.declare_ok", values[1], 0, 0)

    def script(peer: Peer) -> None:
        peers.append(peer)
        peer.serve(Queue_declare=declare)

    with connected(script) as connection:
        other = connection.channel()
        step, fired, refused = 0, True, 0
        while fired:
            step += 1
            used = connection.channel()
            closers: list[Any] = []

            def last_words(used: Channel = used) -> list[str]:
                mine = [name for number, name, _ in peers[0].received if number == used.channel_id]
                # The number may have been another channel's before.
                return mine[len(mine) - mine[::-1].index("Channel.open") :]

            def close(used: Channel = used, closers: list[Any] = closers) -> None:
                """Let another thread close the channel, as far as it gets."""
                if how == "broker":
                    text = "PRECONDITION_FAILED"
                    peers[0].method(used.channel_id, "Channel.close", 406, text, 60, 80)
                else:
                    closers.append(env.spawn(getattr(used, how)))
                # It stays in the out-buffer while the interrupted thread is the one that sends.
                deadline = time.monotonic() + 0.03
                while (
                    not _closed(last_words())
                    and not (used._writers is not None and used._writers.closing)
                    and time.monotonic() < deadline
                ):
                    time.sleep(0.0005)

            modules = (requests, consuming, publishing, channel_module, streams)
            with Injection(modules, step, step="signal", action=close) as injection:
                try:
                    USES[what](used)
                except (amqp.exceptions.ChannelError, StaleDeliveryError):
                    refused += 1
            fired = injection.fired
            for closer in closers:
                closer.result(5)
            if fired:
                deadline = time.monotonic() + 5
                while not _closed(last_words()) and time.monotonic() < deadline:
                    time.sleep(0.0005)
                other.queue_declare("behind")
                words = last_words()
                assert words[-1].startswith("Channel.close"), f"{injection.where}: {words}"
                assert not getattr(used._writers, "closing", None)
        assert step > 3
        assert refused
        assert connection.connected


def _closed(names: list[str]) -> bool:
    return any(name.startswith("Channel.close") for name in names)
