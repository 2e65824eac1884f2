"""The process behind `tests.support.fault_proxy`: a TCP proxy that does harm on order.

Run as a file of its own with nothing but the standard library, so that it shares neither the
interpreter lock nor anything patched with the program under test. Orders come as JSON lines on
stdin, one answer line each goes to stdout. It ends when stdin does.

One thread, one selector. A `Link` is one client connection with its own connection to the target;
each of its two `Direction`s reads, cuts the bytes into AMQP frames as long as they are AMQP, and
sends. A frame is always passed on in one piece of the queue, so dropping or holding one never
tears another.
"""

from __future__ import annotations

import errno
import heapq
import json
import os
import selectors
import socket
import struct
import sys
import time
from collections import Counter, deque
from typing import Any

BLOCK = 65536

#: Bytes that may wait in one direction before its source is not read: a slow link has to push
#: back on the sender as a real one does.
BACKLOG = 256 * 1024

UP, DOWN = "up", "down"

HELLO = b"AMQP"

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8

#: A larger frame means that this is no AMQP.
LARGEST_FRAME = 16 * 1024 * 1024

#: Methods that carry content: publish, return, deliver, get-ok.
WITH_CONTENT = {(60, 40), (60, 50), (60, 60), (60, 71)}


class Settings:
    """What is done to one direction of a link."""

    def __init__(self) -> None:
        self.delay = 0.0
        self.rate: float | None = None
        self.stopped = False
        self.cut_after: int | None = None
        self.cut_how = "rst"
        # What bytes end the link, or stop the direction, when they come; those before pass.
        self.pattern = b""
        self.pattern_how = "rst"
        self.pattern_skip = 0

    def copy(self) -> Settings:
        made = Settings()
        made.__dict__.update(self.__dict__)
        return made


class Rule:
    """What is done to the frames of one method."""

    def __init__(self, number: int, order: dict[str, Any]) -> None:
        self.number = number
        self.direction: str = order["direction"]
        # None means every method frame; heartbeats are (0, 0).
        self.methods = {tuple(each) for each in order["methods"]}
        self.action: str = order["action"]
        self.skip: int = order["skip"]
        self.count: int | None = order["count"]
        self.offset: int = order["offset"]
        self.links: list[int] | None = order["links"]
        self.active = True
        self.seen = 0
        self.hits = 0
        self.held: list[tuple[Direction, bytes]] = []

    def takes(self, link: int, direction: str, method: tuple[int, int]) -> bool:
        if not self.active or direction != self.direction or method not in self.methods:
            return False
        if self.links is not None and link not in self.links:
            return False
        self.seen += 1
        if self.seen <= self.skip or (self.count is not None and self.hits >= self.count):
            return False
        self.hits += 1
        return True


class Direction:
    """From `source` to `sink`."""

    def __init__(self, link: Link, name: str, settings: Settings) -> None:
        self.link = link
        self.name = name
        self.settings = settings
        self.source: socket.socket | None = None
        self.sink: socket.socket | None = None
        # Bytes read that are no whole frame yet.
        self.partial = bytearray()
        # The protocol header comes before the client's first frame.
        self.header_due = name == UP
        self.opaque = False
        # The last bytes that were searched: what is looked for may come in two pieces.
        self.searched = b""
        # channel -> (rule, payload bytes that are still due; None before the header frame)
        self.following: dict[int, tuple[Rule, int | None]] = {}
        # (when it may go out, bytes)
        self.queue: deque[tuple[float, bytes]] = deque()
        self.queued = 0
        self.next_send = 0.0
        self.ended = False
        self.finished = False
        self.bytes_in = 0
        self.bytes_out = 0
        self.frames = 0
        self.methods: Counter[str] = Counter()

    def accept(self, data: bytes, proxy: Proxy) -> None:
        self.bytes_in += len(data)
        if self.opaque:
            self.accept_opaque(data)
            return
        self.partial += data
        ready = bytearray()
        while True:
            frame = self.next_frame()
            if frame is None:
                break
            rule = self.rule_for(frame, proxy)
            if rule is None:
                ready += frame
                continue
            if ready:
                self.enqueue(bytes(ready))
                ready = bytearray()
            proxy.apply(rule, self, frame)
        if ready:
            self.enqueue(bytes(ready))

    def next_frame(self) -> bytes | None:
        """Take a whole frame off the bytes read; None if there is none (any more)."""
        partial = self.partial
        if self.header_due:
            if not HELLO.startswith(bytes(partial[:4])):
                self.give_up_parsing()
            if self.opaque or len(partial) < 8:
                return None
            self.header_due = False
            frame = bytes(partial[:8])
            del partial[:8]
            return frame
        if not partial:
            return None
        if partial[0] not in (METHOD, HEADER, BODY, HEARTBEAT):
            self.give_up_parsing()
            return None
        if len(partial) < 7:
            return None
        size = int.from_bytes(partial[3:7], "big")
        if size > LARGEST_FRAME:
            self.give_up_parsing()
            return None
        if len(partial) < size + 8:
            return None
        frame = bytes(partial[: size + 8])
        del partial[: size + 8]
        return frame

    def give_up_parsing(self) -> None:
        self.opaque = True
        if self.partial:
            data = bytes(self.partial)
            self.partial.clear()
            self.accept_opaque(data)

    def accept_opaque(self, data: bytes) -> None:
        """Take bytes that are no AMQP, and look for what shall end them."""
        self.enqueue(data)
        settings, pattern = self.settings, self.settings.pattern
        if not pattern:
            return
        window = self.searched + data
        start = window.find(pattern)
        while start >= 0 and settings.pattern_skip:
            settings.pattern_skip -= 1
            start = window.find(pattern, start + len(pattern))
        if start < 0:
            self.searched = window[len(window) - len(pattern) + 1 :] if len(pattern) > 1 else b""
            return
        # What has been passed on cannot be taken back.
        settings.cut_after = self.bytes_out + self.queued - min(len(window) - start, self.queued)
        settings.cut_how, settings.pattern = settings.pattern_how, b""

    def rule_for(self, frame: bytes, proxy: Proxy) -> Rule | None:
        if frame[:4] == HELLO:
            return None
        self.frames += 1
        kind = frame[0]
        channel = int.from_bytes(frame[1:3], "big")
        if kind in (HEADER, BODY):
            followed = self.following.get(channel)
            if followed is None:
                return None
            rule, due = followed
            if kind == HEADER:
                due = int.from_bytes(frame[11:19], "big")
            else:
                assert due is not None
                due -= len(frame) - 8
            if due:
                self.following[channel] = (rule, due)
            else:
                del self.following[channel]
            return rule
        method = (0, 0)
        if kind == METHOD:
            method = struct.unpack_from(">HH", frame, 7)
        self.methods[f"{method[0]},{method[1]}"] += 1
        for rule in proxy.rules:
            if rule.takes(self.link.number, self.name, method):
                if rule.action in ("drop", "hold") and method in WITH_CONTENT:
                    self.following[channel] = (rule, None)
                return rule
        return None

    def enqueue(self, data: bytes) -> None:
        self.queue.append((time.monotonic() + self.settings.delay, data))
        self.queued += len(data)

    def allowed(self, now: float) -> tuple[int, float | None]:
        """Return how many bytes may go out now, and when to look again."""
        if self.settings.stopped or not self.queue or self.sink is None:
            return 0, None
        due = max(self.queue[0][0], self.next_send)
        if due > now:
            return 0, due
        most = BLOCK
        if self.settings.rate:
            most = max(1, int(self.settings.rate / 50))
        if self.settings.cut_after is not None:
            most = min(most, self.settings.cut_after - self.bytes_out)
        return most, None


class Link:
    """One client connection."""

    def __init__(self, number: int, client: socket.socket, settings: dict[str, Settings]) -> None:
        self.number = number
        self.client = client
        self.target: socket.socket | None = None
        self.up = Direction(self, UP, settings[UP].copy())
        self.down = Direction(self, DOWN, settings[DOWN].copy())
        self.up.source = self.down.sink = client
        #: Why it ended; empty while it is open.
        self.closed = ""

    def is_open(self) -> bool:
        return not self.closed

    def report(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "closed": self.closed,
            **{
                direction.name: {
                    "bytes_in": direction.bytes_in,
                    "bytes_out": direction.bytes_out,
                    "queued": direction.queued,
                    "frames": direction.frames,
                    "methods": direction.methods,
                    "ended": direction.ended,
                }
                for direction in (self.up, self.down)
            },
        }


class Proxy:
    """The listener, the links, the rules."""

    def __init__(self, host: str, port: int, target: tuple[str, int]) -> None:
        self.address = (host, port)
        self.target = target
        self.selector = selectors.DefaultSelector()
        self.links: dict[int, Link] = {}
        self.numbers = 0
        self.rules: list[Rule] = []
        self.settings = {UP: Settings(), DOWN: Settings()}
        self.greeting = "forward"
        self.listener: socket.socket | None = None
        self.wake: list[tuple[float, int, str]] = []
        self.orders = bytearray()
        os.set_blocking(0, False)
        self.selector.register(0, selectors.EVENT_READ, None)
        self.listen()

    # -- the listener

    def listen(self) -> None:
        if self.listener is None:
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(self.address)
            listener.listen(1024)
            listener.setblocking(False)
            self.address = listener.getsockname()
            self.selector.register(listener, selectors.EVENT_READ, None)
            self.listener = listener

    def refuse(self) -> None:
        if self.listener is not None:
            self.selector.unregister(self.listener)
            self.listener.close()
            self.listener = None

    def accept(self) -> None:
        assert self.listener is not None
        while True:
            try:
                client, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ECONNABORTED):
                    return
                raise
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.numbers += 1
            link = Link(self.numbers, client, self.settings)
            self.links[link.number] = link
            if self.greeting == "rst":
                self.end(link, "rst", "order")
            elif self.greeting == "fin":
                self.end(link, "fin", "order")
            elif self.greeting == "forward":
                target = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
                target.setblocking(False)
                target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                target.connect_ex(self.target)  # its result shows at the first read or write
                link.target = target
                link.up.sink = link.down.source = target
                self.pump(link)
            # "silent": accepted and never answered.

    # -- moving bytes

    def pump(self, link: Link) -> None:
        """Send what may go out, and ask the selector for what can happen next."""
        if not link.is_open():
            return
        interest = {link.client: 0}
        if link.target is not None:
            interest[link.target] = 0
        now = time.monotonic()
        for direction in (link.up, link.down):
            self.send(direction, now)
            if not link.is_open():
                return
            most, again = direction.allowed(now)
            if again is not None:
                heapq.heappush(self.wake, (again, link.number, direction.name))
            elif most > 0 and direction.sink is not None:
                interest[direction.sink] |= selectors.EVENT_WRITE
            if (
                direction.source is not None
                and not direction.ended
                and not direction.settings.stopped
                and direction.queued < BACKLOG
            ):
                interest[direction.source] |= selectors.EVENT_READ
        for sock, events in interest.items():
            self.watch(sock, events, link)

    def watch(self, sock: socket.socket, events: int, link: Link) -> None:
        known = self.selector.get_map().get(sock)
        if known is None:
            if events:
                self.selector.register(sock, events, link)
        elif not events:
            self.selector.unregister(sock)
        elif known.events != events:
            self.selector.modify(sock, events, link)

    def send(self, direction: Direction, now: float) -> None:
        link = direction.link
        while True:
            most, _ = direction.allowed(now)
            cut = direction.settings.cut_after
            if cut is not None and direction.bytes_out >= cut and not link.closed:
                how, direction.settings.cut_after = direction.settings.cut_how, None
                if how == "stop":
                    direction.settings.stopped = True
                else:
                    self.end(link, how, "cut")
                return
            if most <= 0:
                break
            assert direction.sink is not None
            due, data = direction.queue[0]
            piece = data[:most]
            try:
                sent = direction.sink.send(piece)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                if error.errno == errno.ENOTCONN:
                    break  # the connection to the target is still being made
                self.end(link, "rst", f"sending {direction.name}: {error.strerror}")
                return
            direction.bytes_out += sent
            direction.queued -= sent
            if sent == len(data):
                direction.queue.popleft()
            else:
                direction.queue[0] = (due, data[sent:])
            if direction.settings.rate:
                direction.next_send = now + sent / direction.settings.rate
        if (
            direction.ended
            and not direction.queue
            and not direction.partial
            and not direction.finished
            and not direction.settings.stopped
            and direction.sink is not None
        ):
            direction.finished = True
            try:
                direction.sink.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            if link.up.finished and link.down.finished:
                self.end(link, "fin", "both sides ended")

    def read(self, direction: Direction) -> None:
        link = direction.link
        assert direction.source is not None
        try:
            data = direction.source.recv(BLOCK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            # A reset, or a target that does not exist: the other side is told the same way.
            self.end(link, "rst", f"reading {direction.name}: {error.strerror}")
            return
        if data:
            direction.accept(data, self)
        else:
            direction.ended = True
            direction.give_up_parsing()

    def end(self, link: Link, how: str, why: str) -> None:
        if link.closed:
            return
        link.closed = why
        for sock in (link.client, link.target):
            if sock is None:
                continue
            if sock in self.selector.get_map():
                self.selector.unregister(sock)
            if how == "rst":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif sock is link.client:
                # Unread bytes would make a reset of the close.
                try:
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(BLOCK):
                        pass
                except OSError:
                    pass
            sock.close()

    # -- rules

    def apply(self, rule: Rule, direction: Direction, frame: bytes) -> None:
        if rule.action == "drop":
            return
        if rule.action == "hold":
            rule.held.append((direction, frame))
            return
        if rule.action == "stop":
            # Part of the frame goes out, the rest and all that follows when the link goes on.
            direction.enqueue(frame)
            self.stop_after(direction, len(frame) - rule.offset)
            return
        if rule.action in ("rst", "fin"):
            direction.enqueue(frame)
            direction.settings.cut_after = (
                direction.bytes_out + direction.queued - (len(frame) - rule.offset)
            )
            direction.settings.cut_how = rule.action
            return
        raise AssertionError(rule.action)

    def stop_after(self, direction: Direction, left_over: int) -> None:
        direction.settings.cut_after = direction.bytes_out + direction.queued - left_over
        direction.settings.cut_how = "stop"

    # -- orders

    def chosen(self, order: dict[str, Any]) -> list[Link]:
        numbers = order.get("links")
        if numbers is None:
            return [link for link in self.links.values() if not link.closed]
        return [self.links[number] for number in numbers if not self.links[number].closed]

    def order(self, order: dict[str, Any]) -> Any:
        do = order["do"]
        if do == "report":
            return {
                "links": [link.report() for link in self.links.values()],
                "rules": {rule.number: rule.hits for rule in self.rules},
            }
        if do == "listen":
            self.greeting = order["greeting"]
            self.listen()
        elif do == "refuse":
            self.refuse()
        elif do == "target":
            self.target = tuple(order["target"])
        elif do == "set":
            directions = order["directions"]
            changed = [
                direction.settings
                for link in self.chosen(order)
                for direction in (link.up, link.down)
                if direction.name in directions
            ]
            if order.get("links") is None:
                changed += [self.settings[name] for name in directions]
            if "pattern" in order["settings"]:
                order["settings"]["pattern"] = order["settings"]["pattern"].encode("latin-1")
                for link in self.chosen(order):
                    link.up.searched = link.down.searched = b""
            for settings in changed:
                settings.__dict__.update(order["settings"])
            for link in self.chosen(order):
                if "cut_after" in order["settings"] and order["settings"]["cut_after"] is not None:
                    for direction in (link.up, link.down):
                        if direction.name in directions:
                            direction.settings.cut_after = (
                                direction.bytes_out + order["settings"]["cut_after"]
                            )
                self.pump(link)
        elif do == "end":
            ended = self.chosen(order)
            for link in ended:
                self.end(link, order["how"], "order")
            return [link.number for link in ended]
        elif do == "rule":
            self.rules.append(Rule(len(self.rules) + 1, order))
            return self.rules[-1].number
        elif do in ("release", "remove"):
            rule = self.rules[order["rule"] - 1]
            rule.active = False
            held, rule.held = rule.held, []
            if do == "release":
                for direction, frame in held:
                    direction.enqueue(frame)
                for direction, _ in held:
                    self.pump(direction.link)
            return len(held)
        else:
            raise ValueError(f"unknown order {do!r}")
        return None

    def take_orders(self) -> bool:
        data = os.read(0, BLOCK)
        if not data:
            return False
        self.orders += data
        while b"\n" in self.orders:
            line, _, rest = bytes(self.orders).partition(b"\n")
            self.orders = bytearray(rest)
            try:
                answer = {"answer": self.order(json.loads(line))}
            except Exception as error:
                answer = {"error": repr(error)}
            _write_all(json.dumps(answer).encode() + b"\n")
        return True

    def run(self) -> None:
        _write_all(json.dumps({"answer": self.address[1]}).encode() + b"\n")
        while True:
            timeout = None
            if self.wake:
                timeout = max(0.0, self.wake[0][0] - time.monotonic())
            for key, events in self.selector.select(timeout):
                if key.fd == 0:
                    if not self.take_orders():
                        return
                elif key.fileobj is self.listener:
                    self.accept()
                elif isinstance(key.data, Link):
                    link = key.data
                    if events & selectors.EVENT_READ and not link.closed:
                        self.read(link.up if key.fileobj is link.client else link.down)
                    self.pump(link)
            now = time.monotonic()
            while self.wake and self.wake[0][0] <= now:
                _, number, _ = heapq.heappop(self.wake)
                self.pump(self.links[number])


def _write_all(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


if __name__ == "__main__":
    # host, port (0: any), target host, target port
    Proxy(sys.argv[1], int(sys.argv[2]), (sys.argv[3], int(sys.argv[4]))).run()
