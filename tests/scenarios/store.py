"""What a scenario sees of a Redis server without the code under test."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenkombu.utils._private_server import wait_stopped
from hub.environment import get_environment
from tests.support.patched import ROOT
from tests.support.tasks import LONG, until

if TYPE_CHECKING:
    from greenkombu.utils.private_redis import PrivateRedis

__all__ = ["LISTS", "Store", "WorkerProcess", "text_of"]

#: What follows the name of a queue in those of its lists, in the order in which they are served.
LISTS = ("", "\x06\x163", "\x06\x166", "\x06\x169")

PROGRAM = Path(__file__).with_name("programs") / "redis_worker.py"


class Store:
    """The queues of a server that nobody else uses.

    Args:
        server: a running server.
    """

    def __init__(self, server: PrivateRedis) -> None:
        self.server = server
        self._made = 0

    @property
    def url(self) -> str:
        """The URL of the database."""
        return self.server.url

    def queue(self) -> str:
        """Return the name of a new queue."""
        self._made += 1
        return f"scenario-{self._made}"

    def put(self, queue: str, bodies: Iterable[str], priority: int = 0) -> None:
        """Push messages as Kombu does."""
        key = queue + LISTS[priority // 3]
        self.server.commands(
            [("LPUSH", key, _payload(body, queue, priority)) for body in bodies] or [("PING",)]
        )

    def waiting(self, queue: str) -> list[str]:
        """Return what is in a queue, in the order in which it will be served."""
        lists = self.server.commands([("LRANGE", queue + name, 0, -1) for name in LISTS])
        return [_body(payload) for each in lists for payload in reversed(each)]

    def unacked(self) -> list[str]:
        """Return what is registered as unacked, in alphabetical order."""
        values = self.server.command("HVALS", "unacked")
        return sorted(_body(json.loads(value)[0]) for value in values)

    def registered(self) -> tuple[int, int]:
        """Return how many entries `unacked` and its index have."""
        fields, members = self.server.commands([("HLEN", "unacked"), ("ZCARD", "unacked_index")])
        return fields, members

    def age(self, seconds: float = 60.0) -> None:
        """Let it be so much longer ago that what is registered was taken or renewed."""
        members = self.server.command("ZRANGE", "unacked_index", 0, -1)
        self.server.commands(
            [("ZINCRBY", "unacked_index", -seconds, member) for member in members] or [("PING",)]
        )

    def watchers(self, queue: str) -> list[str]:
        """Return the clients that are watchers of a queue."""
        members = self.server.command("ZRANGE", f"_greenkombu.watchers:{queue}", 0, -1)
        return [member.decode().partition("/")[0] for member in members]

    def parked(self, queue: str) -> int:
        """Return how many consumers wait to be woken."""
        return int(self.server.command("ZCARD", f"_greenkombu.parked:{queue}"))

    def calls(self, command: str) -> int:
        """Return how often a command was called."""
        found = self.server.info("commandstats").get(f"cmdstat_{command}", "calls=0")
        return int(found.partition("calls=")[2].partition(",")[0])


def _payload(body: str, queue: str, priority: int) -> str:
    return json.dumps(
        {
            "body": base64.b64encode(body.encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "text/plain",
            "headers": {},
            "properties": {
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": priority,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    )


def _body(payload: Any) -> str:
    message = json.loads(payload) if isinstance(payload, bytes) else payload
    return base64.b64decode(message["body"]).decode()


def text_of(message: Any) -> str:
    """Return the body of a message that was received."""
    body = message.body
    return body.decode() if isinstance(body, bytes) else str(body)


class WorkerProcess:
    """A consumer in a process of its own, to be frozen and killed; see `programs/redis_worker.py`.

    Args:
        url: of the server.
        queue: that it consumes.
        log: a file for what it does.
        options: of the program.
    """

    def __init__(self, url: str, queue: str, log: Path, **options: Any) -> None:
        self._log = log
        self._errors = log.with_suffix(".err")
        name = os.environ["GREENKOMBU_TEST_ENVIRONMENT"]
        command = [sys.executable, "-m", "tests.support.patched", name, str(PROGRAM)]
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [*command, url, queue, str(log), json.dumps(options)],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    @property
    def lines(self) -> list[list[str]]:
        """What it has noted, each as words."""
        if not self._log.exists():
            return []
        text = self._log.read_text()
        return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]

    def noted(self, word: str) -> list[str]:
        """Return the second words of the lines that begin with a word."""
        return [line[1] for line in self.lines if line[0] == word]

    def wait(self, word: str, count: int = 1, timeout: float = 3 * LONG) -> WorkerProcess:
        """Wait until it has noted a word so many times."""

        def there() -> bool:
            assert self._process.poll() is None, self._errors.read_text()
            return len(self.noted(word)) >= count

        until(get_environment(), there, timeout)
        return self

    def freeze(self) -> None:
        """Stop it (SIGSTOP)."""
        self._process.send_signal(signal.SIGSTOP)
        wait_stopped(self._process.pid, get_environment().sleep)

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once (SIGKILL)."""
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
