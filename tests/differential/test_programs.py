"""The same programs on Kombu 5.7 and on greenkombu: on memory and on RabbitMQ, the same results.

The programs are in `tests.differential.programs`.  Each side runs all of them in one process, ours
in the environment under test, both on virtual hosts of their own.  What differs on purpose stands
in `INTENDED`, with the reason; every line of that table must be seen, or it has to go.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ
from tests.differential.compare import differences
from tests.differential.programs import connections, consume, entities, helpers, publish
from tests.differential.programs.lab import PROGRAMS
from tests.differential.reference import kombu_python
from tests.run import VARIABLE

ROOT = Path(__file__).parents[2]
MODULES = (connections, consume, entities, helpers, publish)

ANY: Any = object()


class Intended(NamedTuple):
    """A difference on purpose.

    Args:
        transport: "memory", "amqp", or "" for both.
        program: its name.
        path: a regular expression for the place in the transcript.
        kombus, ours: what is seen there; `ANY` where the reason says enough.
        reason: why ours is as it is.
    """

    transport: str
    program: str
    path: str
    kombus: Any
    ours: Any
    reason: str


QUERY = (
    "b9: options in the query of a URL that Kombu's constructor does not know reach the transport"
)
TYPED = "b9: options in the query of a URL get the types that they have as keyword arguments"
PORT = "b13, b14: host is host:port, with the transport's default port; memory has none"
NO_PASSWORD = "b8: nothing is masked where there is no password"
IPV6 = "b7: a URI can be parsed again"
OS_ERRORS = "as on AMQP, OSError is a connection error on memory: b42-b47 hold on every transport"
RESTORED = (
    "issue 3: the contract of every transport: what a closed channel had unsettled comes back"
)
NO_RESULT = "an AMQP method without a result returns None"
DROPPED = "as on AMQP, delete() returns how many messages it dropped"
TEXT = "b118: decode() gives back what was published, also when it is empty"
LIKE_AMQP = "as on AMQP, it is a channel error with a reply code (b128, b158)"
CLOSED_CHANNEL = "a closed channel is an error of the channel: the connection lives"
UNBOUND = "b122: an operation on an unbound entity is NotBoundError"

INTENDED = [
    Intended("memory", "parameters_of_urls", r"/9/1/ssl", "1", True, TYPED),
    Intended("memory", "parameters_of_urls", r"/10/1", "raises TypeError", ANY, QUERY),
    Intended("memory", "parameters_of_urls", r"/13/1/connect_timeout", "3", 3.0, TYPED),
    Intended("memory", "hosts_of_urls", r"/[0-2]/1", ANY, "localhost", PORT),
    Intended("memory", "hosts_of_urls", r"/(3|5|6|18|19|20)/1", ANY, "localhost:5672", PORT),
    Intended("memory", "hosts_of_urls", r"/(4|8|10|11|12|13|15|17)/1", ANY, "h:5672", PORT),
    Intended("memory", "hosts_of_urls", r"/14/1", "h:None", "h:5671", PORT),
    Intended("memory", "keyword_arguments", r"/(18|19|20)/1", "raises TypeError", ANY, QUERY),
    Intended("memory", "uris", r"/[0235]/1", ANY, "memory://localhost//", NO_PASSWORD),
    Intended("memory", "uris", r"/[68]/1", ANY, "memory://localhost/name", NO_PASSWORD),
    Intended("memory", "uris", r"/3[0-2]/1", "raises TypeError", ANY, QUERY),
    Intended(
        "memory",
        "uris",
        r"/48/1",
        "amqp://guest:**@%3A%3A1:5672//v",
        "amqp://guest:**@[::1]:5672//v",
        IPV6,
    ),
    Intended("memory", "uris", r"/(49|50)/1", ANY, ANY, IPV6),
    Intended("memory", "information", r"/18/1/ssl", "1", True, TYPED),
    Intended("memory", "information", r"/2[01]/1", "raises TypeError", ANY, QUERY),
    Intended("memory", "information", r"/26/1/connect_timeout", "3", 3.0, TYPED),
    Intended("memory", "error_tuples", r"/([1-4]|17|18|19|20)/2", False, True, OS_ERRORS),
    Intended(
        "memory",
        "finding_transports",
        r"/3/1",
        "raises AttributeError",
        "Transport",
        "b224: None is the default transport",
    ),
    Intended("memory", "ensuring", r"/[246]/1", "raises OSError", ANY, OS_ERRORS),
    Intended("memory", "ensuring", r"/[3579]/[01]", ANY, ANY, OS_ERRORS),
    Intended("memory", "ensuring", r"/8/1/error", ANY, ANY, OS_ERRORS),
    Intended("memory", "autoretrying", r"/0", ANY, ANY, OS_ERRORS),
    Intended("memory", "insured_calls", r"/[01]/[01]", ANY, ANY, OS_ERRORS),
    *(
        Intended("memory", name, path, False, True, OS_ERRORS)
        for name, path in (
            ("connecting_to_nothing", r"/(1/0/[01]/0|2/1)/is_connection_error"),
            ("draining_nothing", r"/[01]/1/is_connection_error"),
            ("the_event_loop", r"/3/1/is_connection_error"),
            ("a_mixin_consumes", r"/2/1/is_connection_error"),
        )
    ),
    Intended("memory", "pools_by_connection", r"/6/1", ANY, "memory://localhost//", NO_PASSWORD),
    Intended(
        "",
        "decode_errors",
        r"/4/0/3",
        "called",
        ANY,
        "b96: an empty body of a type that has no empty value goes to on_decode_error",
    ),
    Intended(
        "memory", "queues_without_acknowledgement", r"/(1|5|11|13|17)/0", False, True, RESTORED
    ),
    Intended("memory", "unsettled_messages_of_a_closed_channel", r"/1/[01]", None, ANY, RESTORED),
    Intended(
        "memory",
        "requeued_messages",
        r"/1/1",
        False,
        True,
        "b117: what was requeued says that it is redelivered",
    ),
    Intended(
        "memory",
        "decoding_and_its_cache",
        r"/1/1",
        "dict",
        "DeliveryInfo",
        "a dict that is equal to Kombu's, in which 'redelivered' is found as over AMQP",
    ),
    Intended(
        "memory",
        "equality_and_hashing",
        r"/1[23]/1",
        False,
        True,
        "things of different kinds are unequal; in Kombu they are neither equal nor unequal",
    ),
    Intended("memory", "declaring", r"/3/0", None, 0, DROPPED),
    Intended("memory", "unbinding_and_deleting", r"/4/0", None, 0, DROPPED),
    Intended(
        "memory", "declaring_what_is_missing", r"/4/1", None, "raises NotFoundError", LIKE_AMQP
    ),
    Intended("memory", "declaring_otherwise", r"/[01]/1/is_channel_error", False, True, LIKE_AMQP),
    Intended("memory", "declaring_otherwise", r"/[01]/1/reply_code", None, ANY, LIKE_AMQP),
    Intended(
        "memory",
        "declaring_otherwise",
        r"/3/1",
        None,
        "raises UnsupportedOperation",
        "issue 3: what a transport cannot do is a typed error",
    ),
    Intended("memory", "routing", r"/(7|9|10)/2/5", {"bytes": ""}, "", TEXT),
    Intended("memory", "bodies", r"/6/1/payload/0", "bytes", "str", TEXT),
    Intended("memory", "bodies", r"/6/1/payload/1", "b''", "''", TEXT),
    Intended("amqp", "bodies", r"/8/1/(body|payload/[01])", ANY, ANY, TEXT),
    Intended(
        "memory",
        "topics_with_no_word_for_the_hash",
        r"/0/0",
        ["eur.stock.db"],
        ["usd.stock", "eur.stock.db"],
        "b125: # matches zero words, as the manual says",
    ),
    Intended(
        "",
        "declaring_once",
        r"/3/0",
        False,
        True,
        "b137: a queue with a binding that was not declared yet is not the same entity",
    ),
    Intended("", "declaring_once", r"/5/1/error", ANY, ANY, UNBOUND),
    Intended("", "declaring_once", r"/5/1/is_channel_error", True, False, UNBOUND),
    Intended("", "declaring_once", r"/5/1/reply_code", ANY, None, UNBOUND),
    Intended("memory", "exceptions", r"/31/0", False, True, "b34: all errors are KombuError"),
    Intended(
        "",
        "an_exchange_publishes",
        r"/1/0/(properties/)?content_type",
        ANY,
        "text/plain",
        "b135: without a content type the library sets it",
    ),
    Intended("", "a_revived_producer", r"/0/1/error", ANY, ANY, CLOSED_CHANNEL),
    Intended("", "a_revived_producer", r"/0/1/is_connection_error", True, False, CLOSED_CHANNEL),
    Intended("", "a_revived_producer", r"/0/1/is_channel_error", False, True, CLOSED_CHANNEL),
    Intended(
        "memory",
        "messages_by_priority",
        r"/0/0/[0-5]",
        ANY,
        ANY,
        "b81: priorities are honoured, as on AMQP: the higher comes first",
    ),
    Intended(
        "memory",
        "messages_that_expire",
        r"/0/0",
        "short",
        "long",
        "b87: an expired message is not delivered, as on AMQP",
    ),
    Intended("amqp", "channels", r"/2/1", [], None, NO_RESULT),
    Intended("amqp", "prefetch", r"/[34]/1", [], None, NO_RESULT),
    Intended("amqp", "declaring", r"/[13]/1", [], None, NO_RESULT),
    Intended("amqp", "unbinding_and_deleting", r"/[02]/0", [], None, NO_RESULT),
    Intended("amqp", "exchanges_bound_to_exchanges", r"/[02]/0", [], None, NO_RESULT),
    Intended("amqp", "cancelling_an_unknown_tag", r"/0/1", "none", None, NO_RESULT),
    Intended(
        "amqp",
        "error_tuples",
        r"/32/1",
        False,
        True,
        "OperationalError is what a publish with retry ends in; except connection_errors has it",
    ),
    Intended(
        "amqp",
        "ensuring",
        r"/8/1/is_connection_error",
        False,
        True,
        "OperationalError is what a retry ends in; except connection_errors has it",
    ),
    Intended(
        "amqp",
        "wrong_credentials",
        r"/0/1/is_connection_error",
        False,
        True,
        "a refused login is an error of the connection; it is not among the recoverable ones",
    ),
    Intended(
        "amqp",
        "iterating_messages",
        r"/1/0",
        [0, 1],
        [0, 1, 2],
        "what arrives for a cancelled consumer goes back to its queue at once",
    ),
]


def start(python: str, package: str, environment: str, *urls: str) -> subprocess.Popen[str]:
    arguments = [python, "-W", "ignore", "-m", "tests.differential.programs"]
    # Not PYTHONPATH of this run: Kombu's process must not find what ours has installed.
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))}
    return subprocess.Popen(
        [*arguments, package, environment, *urls],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


Transcripts = dict[str, dict[str, list[Any]]]


def finish(process: subprocess.Popen[str]) -> Transcripts:
    try:
        out, err = process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        process.kill()
        _, err = process.communicate()
        pytest.fail(f"a program hangs, the last of these:\n{err[-500:]}")
    assert process.returncode == 0, err[-2000:]
    transcripts: Transcripts = json.loads(out)
    return transcripts


@pytest.fixture(scope="module")
def both(request: pytest.FixtureRequest) -> Iterator[tuple[Transcripts, Transcripts]]:
    python = kombu_python()
    rabbitmq: PrivateRabbitMQ = request.getfixturevalue("rabbitmq")
    environment = os.environ[VARIABLE].partition("-")[0]
    hosts = [f"programs-{os.urandom(4).hex()}" for _ in range(2)]
    theirs, ours = (rabbitmq.add_vhost(name) for name in hosts)
    processes = [
        start(python, "kombu", "default", "memory://", theirs),
        start(sys.executable, "greenkombu", environment, "memory://", ours),
    ]
    try:
        yield finish(processes[0]), finish(processes[1])
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for name in hosts:
            rabbitmq.delete_vhost(name)


CASES = [(transport, name) for name, (_, on) in PROGRAMS.items() for transport in on]


def matches(line: Intended, transport: str, name: str, path: str) -> bool:
    return (
        line.transport in ("", transport)
        and line.program == name
        and re.fullmatch(line.path, path) is not None
    )


# What the two fixtures start is started once for all of these.
pytestmark = pytest.mark.allow_leaks("the fixture of the module runs two processes")


@pytest.mark.parametrize(("transport", "name"), CASES)
def test_a_program_sees_the_same(
    both: tuple[Transcripts, Transcripts], transport: str, name: str
) -> None:
    theirs, ours = both
    wrong = []
    for path, left, right in differences(theirs[transport][name], ours[transport][name]):
        lines = [line for line in INTENDED if matches(line, transport, name, path)]
        for line in lines:
            if not (line.kombus is ANY or line.kombus == left):
                wrong.append(f"{path}: Kombu {left!r}, not {line.kombus!r}")
            if not (line.ours is ANY or line.ours == right):
                wrong.append(f"{path}: greenkombu {right!r}, not {line.ours!r}")
        if not lines:
            wrong.append(f"{path}: Kombu {left!r}, greenkombu {right!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("line", INTENDED, ids=lambda line: f"{line.transport}{line.program}")
def test_an_intended_difference_is_there(
    both: tuple[Transcripts, Transcripts], line: Intended
) -> None:
    theirs, ours = both
    for transport in [line.transport] if line.transport else ["memory", "amqp"]:
        found = [
            path
            for path, _, _ in differences(
                theirs[transport][line.program], ours[transport][line.program]
            )
            if matches(line, transport, line.program, path)
        ]
        assert found, f"{line} is no difference any more on {transport}: take it off the table"


def test_there_are_enough_programs() -> None:
    assert len(PROGRAMS) >= 60
    assert len({name for transport, name in CASES if transport == "amqp"}) >= 60
