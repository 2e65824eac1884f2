"""A TCP proxy between the program under test and a broker, that does harm on order.

The proxy is a process of its own (`_fault_proxy_process`), so that it goes on whatever the program
under test does to its interpreter, and is the same in every environment. `FaultProxy` gives the
orders; each takes effect before its method returns.

Every order is for the links (client connections) named by number, or without numbers for all that
are open and all to come. "up" is from the client to the broker, "down" from the broker to the
client.

Frames are known where the bytes are AMQP 0-9-1; anything else, TLS for instance, is passed on as
it is and can be delayed, stopped and cut, also at chosen bytes (`cut_at`), but not filtered.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from greenkombu._amqp.methods import BY_CODE, BY_NAME
from greenkombu.utils._private_server import wait_exit
from hub.environment import get_environment

__all__ = ["Both", "FaultProxy", "FaultProxyError", "Link", "Rule", "Side", "Toward"]

Toward = Literal["up", "down"]
Both = Literal["up", "down", "both"]

#: Seconds; an order takes well under a millisecond.
PATIENCE = 20.0


class FaultProxyError(Exception):
    """The proxy's process refused an order, or has ended."""


@dataclass(frozen=True)
class Side:
    """One direction of a link, at the time of the report.

    Args:
        bytes_in: taken from the sender.
        bytes_out: handed to the receiver.
        queued: taken and not handed over yet.
        frames: whole AMQP frames taken.
        methods: how many of each AMQP method ("Basic.ack"), and of "heartbeat".
        ended: the sender has closed.
    """

    bytes_in: int
    bytes_out: int
    queued: int
    frames: int
    methods: dict[str, int]
    ended: bool


@dataclass(frozen=True)
class Link:
    """One client connection, at the time of the report.

    Args:
        number: counted from 1 in the order of connecting.
        closed: why it ended; empty while it is open.
    """

    number: int
    closed: str
    up: Side
    down: Side


class Rule:
    """What happens to the frames of some methods; made by `FaultProxy`."""

    def __init__(self, proxy: FaultProxy, number: int) -> None:
        self._proxy = proxy
        self.number = number

    @property
    def hits(self) -> int:
        """How many messages of the method it was applied to."""
        return int(self._proxy._report()["rules"][str(self.number)])

    def wait(self, hits: int = 1, timeout: float = PATIENCE) -> None:
        """Wait until it was applied so many times; AssertionError after `timeout` seconds."""
        self._proxy.wait_until(lambda: self.hits >= hits, timeout)

    def release(self) -> int:
        """End the rule and pass on what was held; return how many frames."""
        return int(self._proxy._order("release", rule=self.number))

    def remove(self) -> None:
        """End the rule; what was held is lost."""
        self._proxy._order("remove", rule=self.number)


class FaultProxy:
    """A proxy in front of one broker.

    Args:
        target: host and port of the broker; may be changed by `retarget`.
        port: where to listen on loopback; 0 takes a free one.

    Raises:
        FaultProxyError: the process could not start.
    """

    def __init__(self, target: tuple[str, int], port: int = 0) -> None:
        script = Path(__file__).with_name("_fault_proxy_process.py")
        # Closed as files: gevent replaces os.close() by one that waits for the next loop turn.
        orders, answers = os.pipe(), os.pipe()
        child_in, self._orders = io.FileIO(orders[0]), io.FileIO(orders[1], "w")
        self._answers, child_out = io.FileIO(answers[0]), io.FileIO(answers[1], "w")
        os.set_blocking(self._answers.fileno(), False)
        host, target_port = target
        command = [sys.executable, "-I", "-S", str(script), "127.0.0.1", str(port)]
        try:
            self._process = subprocess.Popen(
                [*command, host, str(target_port)], stdin=child_in, stdout=child_out
            )
        finally:
            child_in.close()
            child_out.close()
        self._turn = get_environment().Lock()
        self._received = b""
        self.port = int(self._answer())

    # -- life

    def close(self) -> None:
        """End the process, and with it every link; idempotent."""
        if self._orders.closed:
            return
        self._orders.close()
        wait_exit(self._process, PATIENCE, get_environment().sleep)
        self._answers.close()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def url(self, url: str) -> str:
        """Return the URL of a broker with this proxy in the place of host and port."""
        parts = urlsplit(url)
        login, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{login}{at}127.0.0.1:{self.port}"))

    # -- what is going on

    def links(self) -> list[Link]:
        """Return all links since the start, ended ones included."""
        return [
            Link(each["number"], each["closed"], _side(each["up"]), _side(each["down"]))
            for each in self._report()["links"]
        ]

    def open_links(self) -> list[Link]:
        """Return the links that are open, the newest last."""
        return [link for link in self.links() if not link.closed]

    def count(self, method: str, toward: Toward) -> int:
        """Return how many of a method went, over all links."""
        return sum(getattr(link, toward).methods.get(method, 0) for link in self.links())

    def wait_until(self, predicate: Callable[[], object], timeout: float = PATIENCE) -> None:
        """Wait until `predicate()` holds; AssertionError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not predicate():
            assert time.monotonic() < deadline, f"{predicate} did not come true in {timeout:g} s"
            get_environment().sleep(0.005)

    # -- the listener

    def refuse(self) -> None:
        """Stop listening: who connects gets ECONNREFUSED. Open links stay."""
        self._order("refuse")

    def accept(self, greeting: Literal["forward", "silent", "rst", "fin"] = "forward") -> None:
        """Listen again, and treat new links so.

        Args:
            greeting: "forward" connects them to the broker; "silent" accepts and never answers;
                "rst" and "fin" close them at once.
        """
        self._order("listen", greeting=greeting)

    def retarget(self, target: tuple[str, int]) -> None:
        """Connect new links to another broker."""
        self._order("target", target=list(target))

    # -- faults of a link

    def delay(
        self, seconds: float, toward: Both = "both", links: Iterable[int] | None = None
    ) -> None:
        """Let bytes that come from now on take so long."""
        self._set(links, toward, delay=seconds)

    def bandwidth(
        self,
        bytes_per_second: float | None,
        toward: Both = "both",
        links: Iterable[int] | None = None,
    ) -> None:
        """Pass on no more than so many bytes per second; None ends the bound."""
        self._set(links, toward, rate=bytes_per_second)

    def black_hole(self, toward: Both = "both", links: Iterable[int] | None = None) -> None:
        """Pass nothing on: the connections stay open, and bytes pile up at the sender."""
        self._set(links, toward, stopped=True)

    def restore(self, toward: Both = "both", links: Iterable[int] | None = None) -> None:
        """Pass everything on at full speed again, what piled up included."""
        self._set(links, toward, stopped=False, delay=0.0, rate=None, cut_after=None, pattern="")

    def reset(self, links: Iterable[int] | None = None) -> list[int]:
        """End open links by RST, on both sides; return their numbers."""
        return self._end("rst", links)

    def finish(self, links: Iterable[int] | None = None) -> list[int]:
        """End open links by FIN, on both sides; return their numbers."""
        return self._end("fin", links)

    def cut(
        self,
        after: int,
        toward: Both,
        how: Literal["rst", "fin", "stop"] = "rst",
        links: Iterable[int] | None = None,
    ) -> None:
        """Pass on exactly so many more bytes, then end the link or stop that direction.

        Args:
            after: bytes; counted per link, for links to come from their beginning.
            how: "stop" is a black hole until `restore`.
        """
        self._set(links, toward, cut_after=after, cut_how=how)

    def cut_at(
        self,
        pattern: bytes,
        toward: Toward,
        how: Literal["rst", "fin", "stop"] = "rst",
        *,
        skip: int = 0,
        links: Iterable[int] | None = None,
    ) -> None:
        """End the link, or stop that direction, when bytes come that are no AMQP.

        Once for each link, and one pattern at a time. What comes before passes, the pattern does
        not: with the name of a command, "up", the broker never sees the command.

        Args:
            pattern: the bytes, which a client has to send in one write for none of them to pass.
            how: "stop" is a black hole until `restore`.
            skip: how many to spare first.
        """
        text = pattern.decode("latin-1")
        self._set(links, toward, pattern=text, pattern_how=how, pattern_skip=skip)

    # -- faults of AMQP methods

    def drop(self, method: str | Iterable[str], toward: Toward, **which: Any) -> Rule:
        """Lose the frames of a method, its content included.

        Args:
            method: one name or several, as "Basic.ack"; "heartbeat" for heartbeat frames.
            which: `skip`: how many to spare first; `count`: how many, None for all;
                `links`: on which links, None for all.
        """
        return self._rule("drop", method, toward, **which)

    def hold(self, method: str | Iterable[str], toward: Toward, **which: Any) -> Rule:
        """Keep the frames of a method back, until `Rule.release()`; others pass them."""
        return self._rule("hold", method, toward, **which)

    def stop_at(
        self, method: str | Iterable[str], toward: Toward, offset: int = 0, **which: Any
    ) -> Rule:
        """Stop the direction when a method comes; `restore` lets it go on.

        Args:
            offset: how many bytes of its frame still go out: a torn frame.
        """
        return self._rule("stop", method, toward, offset=offset, **{"count": 1, **which})

    def end_at(
        self,
        method: str | Iterable[str],
        toward: Toward,
        how: Literal["rst", "fin"] = "rst",
        offset: int = 0,
        **which: Any,
    ) -> Rule:
        """End the link when a method comes; arguments as `stop_at`."""
        return self._rule(how, method, toward, offset=offset, **which)

    # -- orders

    def _rule(
        self,
        action: str,
        method: str | Iterable[str],
        toward: str,
        *,
        skip: int = 0,
        count: int | None = None,
        offset: int = 0,
        links: Iterable[int] | None = None,
    ) -> Rule:
        names = [method] if isinstance(method, str) else list(method)
        number = self._order(
            "rule",
            action=action,
            methods=[(0, 0) if name == "heartbeat" else BY_NAME[name].signature for name in names],
            direction=toward,
            skip=skip,
            count=count,
            offset=offset,
            links=None if links is None else list(links),
        )
        return Rule(self, int(number))

    def _set(self, links: Iterable[int] | None, toward: str, **settings: Any) -> None:
        self._order(
            "set",
            links=None if links is None else list(links),
            directions=["up", "down"] if toward == "both" else [toward],
            settings=settings,
        )

    def _end(self, how: str, links: Iterable[int] | None) -> list[int]:
        numbers: list[int] = self._order(
            "end", how=how, links=None if links is None else list(links)
        )
        return numbers

    def _report(self) -> dict[str, Any]:
        report: dict[str, Any] = self._order("report")
        return report

    def _order(self, do: str, **arguments: Any) -> Any:
        line = json.dumps({"do": do, **arguments}).encode() + b"\n"
        with self._turn:
            try:
                self._orders.write(line)  # far below what a pipe takes at once
            except (BrokenPipeError, ValueError) as error:
                raise FaultProxyError(f"the fault proxy has ended: {do} cannot be done") from error
            return self._answer()

    def _answer(self) -> Any:
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self._received:
            data = self._answers.read(1 << 20)
            if data:
                self._received += data
            elif data is not None:
                raise FaultProxyError("the fault proxy's process has ended")
            elif time.monotonic() > deadline:
                raise FaultProxyError(f"the fault proxy does not answer within {PATIENCE:g} s")
            else:
                # No descriptor of the environment under test is involved, on purpose.
                get_environment().sleep(0.0005)
        line, _, self._received = self._received.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise FaultProxyError(answer["error"])
        return answer["answer"]


def _side(report: dict[str, Any]) -> Side:
    return Side(**{**report, "methods": {_name(k): v for k, v in report["methods"].items()}})


def _name(key: str) -> str:
    class_id, method_id = map(int, key.split(","))
    if not class_id:
        return "heartbeat"
    method = BY_CODE.get(class_id << 16 | method_id)
    return method.name if method is not None else key
