"""Connections: URLs, parameters, clones, errors, retries, pools."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

from tests.differential.programs.lab import Lab, program

URLS = [
    "memory://",
    "memory:///",
    "memory://localhost/name",
    "amqp://",
    "amqp://h",
    "amqp://localhost//foo",
    "amqp://localhost/foo",
    "amqp://h:5672//",
    "amqp://u%40d:p%2Fw@h/v%2Fh",
    "amqp://u:p@h:1/v?ssl=1",
    "amqp://h/v?visibility_timeout=5&a=b",
    "amqp://h/v?login_method=EXTERNAL",
    "amqp://h/v?heartbeat=10",
    "amqp://h/v?connect_timeout=3",
    "amqps://h/v",
    "pyamqp://u:p@h//",
    "amqp://[::1]:5672//v",
    "amqp://a@h//",
    "localhost",
    "",
    None,
]


@program("memory")
def parameters_of_urls(lab: Lab) -> None:
    for url in URLS:
        lab.attempt(
            url,
            lambda url=url: {
                name: getattr(lab.k.Connection(url), name)
                for name in (
                    *("hostname", "userid", "password", "virtual_host", "port", "ssl", "heartbeat"),
                    *("connect_timeout", "transport_options", "login_method", "transport_cls"),
                    *("insist", "failover_strategy", "declared_entities", "uri_prefix"),
                )
            },
        )


@program("memory")
def hosts_of_urls(lab: Lab) -> None:
    for url in URLS:
        lab.attempt(url, lambda url=url: lab.k.Connection(url).host)


@program("memory")
def keyword_arguments(lab: Lab) -> None:
    for args, kwargs in (
        ((), {"hostname": "h", "userid": "u", "password": "p", "virtual_host": "v", "port": 1}),
        (("amqp://",), {"userid": "x", "virtual_host": "v"}),
        (("amqp://a@h//",), {"userid": "b", "password": "c"}),
        (("h",), {"transport": "memory"}),
        (("h",), {"ssl": True, "connect_timeout": 2, "heartbeat": 5, "login_method": "PLAIN"}),
        (("memory://",), {"transport_options": {"a": 1}}),
        (("memory://?b=2",), {"transport_options": {"a": 1}}),
        ((["amqp://a", "amqp://b"],), {}),
        (("amqp://a;amqp://b",), {"failover_strategy": "shuffle"}),
        ((), {"alternates": ["amqp://b"]}),
    ):
        make = functools.partial(lab.k.Connection, *args, **kwargs)
        lab.attempt(
            [args, kwargs],
            lambda make=make: [
                getattr(make(), name)
                for name in (
                    *("hostname", "userid", "password", "virtual_host", "port", "ssl"),
                    *("transport_options", "alt"),
                )
            ],
        )
        lab.attempt("info", lambda make=make: make().info())
        lab.attempt("uri", lambda make=make: make().as_uri(include_password=True))


@program("memory")
def uris(lab: Lab) -> None:
    for url in URLS:
        make = functools.partial(lab.k.Connection, url)
        lab.attempt(url, lambda make=make: make().as_uri())
        lab.attempt("with password", lambda make=make: make().as_uri(include_password=True))
        lab.attempt("masked", lambda make=make: make().as_uri(mask="##"))
    several = lab.k.Connection("amqp://u:secret@a//;amqp://u:secret@b//")
    lab.note(several.as_uri(), several.as_uri(include_password=True))


@program("memory")
def information(lab: Lab) -> None:
    for url in URLS:
        lab.attempt(url, lambda url=url: lab.k.Connection(url).info())
        lab.attempt("keys", lambda url=url: list(lab.k.Connection(url).info()))


@program("memory")
def words(lab: Lab) -> None:
    connection = lab.k.Connection("amqp://u:secret@h:1/v")
    text = repr(connection)
    lab.note(text.partition(" at ")[0], "secret" in text, "secret" in str(connection))


@program("memory")
def equality_and_hashing_of_connections(lab: Lab) -> None:
    make = lab.k.Connection
    one = make("amqp://u:p@h:1/v", transport_options={"a": 1})
    for other in (
        make("amqp://u:p@h:1/v", transport_options={"a": 1}),
        make("amqp://u:p@h:1/v"),
        make("amqp://u:x@h:1/v", transport_options={"a": 1}),
        make("amqp://u:p@h:2/v", transport_options={"a": 1}),
        make("memory://"),
    ):
        lab.note(one.__eqhash__() == other.__eqhash__())
    clone = one.clone()
    lab.note(clone.__eqhash__() == one.__eqhash__(), clone is one)
    lab.note(one.clone(virtual_host="w").virtual_host, one.clone(hostname="i").hostname)
    for again in (pickle.loads(pickle.dumps(one)), copy.copy(one)):
        lab.note(again.info() == one.info(), again.transport_options, type(again).__name__)
        lab.note(again.__eqhash__() == one.__eqhash__())


@program()
def life(lab: Lab) -> None:
    connection = lab.k.Connection(lab.url)
    lab.note(connection.connected)
    connection.connect()
    lab.note(connection.connected, connection.connection is connection.connect())
    channel = connection.default_channel
    lab.note(channel is connection.default_channel, channel.connection.client is connection)
    lab.note(connection.supports_heartbeats in (True, False))
    lab.note(connection.transport is connection.transport)
    connection.close()
    lab.note(connection.connected)
    connection.close()
    connection.release()
    lab.note(connection.default_channel is not channel, connection.connected)
    connection.release()
    with lab.k.Connection(lab.url) as connection:
        lab.note(connection.connected)
        connection.connect()
    lab.note(connection.connected)
    lab.note(lab.k.Connection is lab.k.BrokerConnection)


@program()
def channels(lab: Lab) -> None:
    one, two = lab.connection.channel(), lab.connection.channel()
    lab.note(one.channel_id != two.channel_id, type(one.channel_id).__name__)
    lab.note(one.connection.client is lab.connection)
    lab.attempt("close", one.close)
    lab.attempt("again", one.close)
    lab.connection.maybe_close_channel(two)
    with lab.connection.channel() as three:
        lab.note(hasattr(three, "basic_publish"))


@program()
def error_tuples(lab: Lab) -> None:
    connection = lab.connection
    connection.connect()
    for name in (
        *("connection_errors", "channel_errors"),
        *("recoverable_connection_errors", "recoverable_channel_errors"),
    ):
        found = getattr(connection, name)
        lab.note(name, isinstance(found, tuple), all(issubclass(e, Exception) for e in found))
        for error in (
            OSError,
            TimeoutError,
            ConnectionResetError,
            IOError,
            ValueError,
            KeyError,
            AttributeError,
        ):
            lab.note(name, error.__name__, issubclass(error, found))
    exceptions = lab.module("exceptions")
    for error in ("OperationalError", "ConnectionError", "ChannelError", "InconsistencyError"):
        lab.note(
            error,
            issubclass(getattr(exceptions, error), connection.connection_errors),
            issubclass(getattr(exceptions, error), connection.channel_errors),
        )


@program()
def what_a_transport_says(lab: Lab) -> None:
    transport = lab.connection.transport
    lab.note(transport.driver_type, transport.driver_name, transport.default_port)
    lab.note(sorted(transport.implements.exchange_type & {"direct", "topic", "fanout"}))
    lab.note(transport.implements.heartbeats, bool(transport.implements.asynchronous))
    lab.note(lab.connection.supports_exchange_type("direct"))
    lab.note(lab.connection.supports_exchange_type("no-such"), transport.can_parse_url)
    lab.note(lab.connection.get_transport_cls().__name__, transport.client is lab.connection)
    lab.note(lab.connection.get_heartbeat_interval())
    lab.attempt("heartbeat_check", lab.connection.heartbeat_check)
    lab.attempt("qos", lab.connection.qos_semantics_matches_spec.__class__)
    lab.note(transport.verify_connection(lab.connection.connection))


@program("memory")
def finding_transports(lab: Lab) -> None:
    transport = lab.module("transport")
    for name in (
        "amqp",
        "memory",
        "pyamqp",
        None,
        f"{lab.package}.transport.memory.Transport",
        f"{lab.package}.transport.memory:Transport",
    ):
        lab.attempt(
            str(name).replace(lab.package, ""),
            lambda n=name: transport.get_transport_cls(n).__name__,
        )
    lab.attempt("close", lambda: transport.resolve_transport("ampq"))
    lab.attempt("far", lambda: transport.resolve_transport("nothing-like-it"))
    lab.attempt("module", lambda: transport.resolve_transport("no.such.Transport"))
    lab.attempt("connection", lambda: lab.k.Connection("nosuch://").connect())


class Flaky:
    """A callable that fails a number of times first."""

    def __init__(self, error: type[Exception], times: int) -> None:
        self.error, self.left, self.calls = error, times, 0
        self.__name__ = "flaky"

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error("made up")
        return f"done after {self.calls} with {args} {sorted(kwargs)}"


@program()
def ensuring(lab: Lab) -> None:
    queue = lab.queue()
    policy = {"interval_start": 0, "interval_step": 0, "interval_max": 0}
    for retries, failures in ((3, 0), (3, 2), (None, 2), (1, 1), (2, 5), (0, 0)):
        producer = lab.connection.Producer(exchange=queue.exchange)
        work = Flaky(OSError, failures)
        seen: list[Any] = []
        ensured = lab.connection.ensure(
            producer,
            work,
            errback=lambda exc, interval, seen=seen: seen.append([type(exc).__name__, interval]),
            max_retries=retries,
            on_revive=lambda channel, seen=seen: seen.append("revived"),
            **policy,
        )
        lab.attempt([retries, failures], lambda e=ensured: e(1, a=2))
        lab.note(seen[:1], "revived" in seen, ensured.__name__)
    work = Flaky(KeyError, 1)
    lab.attempt(
        "other", lab.connection.ensure(lab.connection.Producer(), work, max_retries=3, **policy)
    )


@program()
def autoretrying(lab: Lab) -> None:
    channels: list[Any] = []
    work = Flaky(OSError, 1)

    def task(value: Any, channel: Any = None) -> Any:
        channels.append(channel)
        return work(value)

    wrapped = lab.connection.autoretry(task, interval_start=0, interval_max=0, max_retries=3)
    result, channel = wrapped("x")
    lab.note(result, channel is channels[-1], len(channels), channels[-1] is not None)


@program("memory")
def connecting_to_nothing(lab: Lab) -> None:
    connection = lab.k.Connection("amqp://127.0.0.1:1//", connect_timeout=1)
    intervals: list[Any] = []
    lab.attempt(
        "ensure",
        lambda: connection.ensure_connection(
            errback=lambda exc, interval: intervals.append([lab.error(exc), interval]),
            max_retries=2,
            interval_start=0.01,
            interval_step=0.01,
            interval_max=0.02,
        ),
    )
    lab.note(intervals, connection.connected)
    lab.attempt("connect", lambda: lab.k.Connection("amqp://127.0.0.1:1//").connect())
    lab.attempt(
        "publish",
        lambda: (
            lab.k.Connection(
                "amqp://127.0.0.1:1//", transport_options={"max_retries": 0, "interval_start": 0}
            )
            .Producer()
            .publish("x", retry=True, retry_policy={"max_retries": 1, "interval_start": 0})
        ),
    )


@program("amqp")
def failing_over(lab: Lab) -> None:
    options = {"interval_start": 0, "interval_step": 0, "interval_max": 0}
    with lab.k.Connection(
        f"amqp://127.0.0.1:1//;{lab.url}", transport_options=options
    ) as connection:
        connection.ensure_connection(max_retries=5, **options)
        lab.note(connection.connected)
    with lab.k.Connection(["amqp://127.0.0.1:1//", lab.url]) as connection:
        connection.ensure_connection(max_retries=5, **options)
        queue = lab.k.Queue(lab.name)(connection.default_channel)
        lab.note(queue.declare())


@program("amqp")
def wrong_credentials(lab: Lab) -> None:
    bad = lab.connection.clone(userid="nobody", password="nothing")
    lab.attempt("user", bad.connect)
    bad = lab.connection.clone(virtual_host="no-such-vhost")
    lab.attempt("virtual host", bad.connect)
    for method in ("PLAIN", "AMQPLAIN"):
        with lab.connection.clone(login_method=method) as connection:
            lab.attempt(method, lambda c=connection: bool(c.connect()))


@program("memory")
def pools_by_connection(lab: Lab) -> None:
    pools = lab.module("pools")
    make = lab.k.Connection
    lab.note(pools.connections[make("memory://")] is pools.connections[make("memory://")])
    lab.note(pools.connections[make("memory://")] is pools.connections[make("memory://x")])
    lab.note(pools.producers[make("memory://")] is pools.producers[make("memory://")])
    pools.set_limit(2)
    lab.note(pools.get_limit(), pools.connections[make("memory://")].limit)
    lab.attempt("shrink", lambda: pools.set_limit(1))
    lab.attempt("shrink by force", lambda: pools.set_limit(1, force=True))
    pools.set_limit(2)
    pool = pools.connections[make("memory://")]
    with pool.acquire() as connection:
        lab.note(connection.connected, connection.as_uri())
        with pool.acquire(block=True):
            lab.attempt("full", lambda: pool.acquire())
            lab.attempt("full, timeout", lambda: pool.acquire(block=True, timeout=0.01))
    with pools.producers[make("memory://")].acquire(block=True) as producer:
        producer.publish("x", routing_key="nobody")
        lab.note(type(producer).__name__, producer.connection is not None)
    with pool.acquire() as again:
        lab.note(again is connection)
    pools.reset()
    lab.note(len(pools.connections), len(pools.producers))


@program()
def pools_of_a_connection(lab: Lab) -> None:
    pool = lab.connection.Pool(2)
    one = pool.acquire()
    two = pool.acquire()
    lab.note(one.connected, one is two, one.transport_cls == lab.connection.transport_cls)
    lab.attempt("third", pool.acquire)
    one.release()
    three = pool.acquire()
    lab.note(three is one)
    lab.attempt("twice", lambda: [two.release(), three.release()])
    with pool.acquire_channel(block=True) as (connection, channel):
        lab.note(channel is connection.default_channel)
    lab.note(pool.limit)
    pool.resize(3)
    lab.note(pool.limit)
    pool.force_close_all()
    channels = lab.connection.ChannelPool(2)
    first = channels.acquire()
    channels.acquire()
    lab.attempt("third channel", channels.acquire)
    channels.release(first)
    lab.note(channels.acquire() is first)
    channels.force_close_all()
    lab.attempt("unlimited", lambda: lab.connection.Pool().acquire().connected)


@program("memory")
def connections_in_manual_order(lab: Lab) -> None:
    connection = lab.k.Connection("h", "u", "p", "v", 1)
    lab.note(
        connection.hostname,
        connection.userid,
        connection.password,
        connection.virtual_host,
        connection.port,
    )
    lab.attempt("switch", lambda: connection.switch("memory://"))
    lab.note(connection.transport_cls, connection.hostname)
    lab.attempt("cycle", lambda: connection.cycle is None)
    several = lab.k.Connection("memory://a;memory://b")
    lab.attempt("next", lambda: several.maybe_switch_next())
    lab.note(several.hostname, several.alt)
    lab.note(sorted(lab.k.Connection.failover_strategies))
