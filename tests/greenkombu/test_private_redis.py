"""The private Redis servers that tests, the soak and the demo start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from greenkombu.utils import private_redis
from greenkombu.utils.private_redis import (
    PrivateBrokerError,
    PrivateRedis,
    RedisCommandError,
    RedisNotInstalledError,
)
from tests.support.patched import ROOT
from tests.support.rabbitmq import Certificates
from tests.support.redis import end_loading, make_sentinel, require_redis, start_loading
from tests.support.tasks import until

if TYPE_CHECKING:
    from greenkombu.utils.private_redis_cluster import PrivateRedisCluster
    from greenkombu.utils.private_redis_sentinel import PrivateSentinel
    from hub.environment import Environment

Make = Callable[..., PrivateRedis]


def answers(port: int) -> bool:
    """Whether something on that port answers a PING within ten seconds."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as probe:
            probe.sendall(b"PING\r\n")
            return probe.recv(1) in b"+-"
    except OSError:
        return False


def gone(pid: int, env: Environment) -> bool:
    """Whether a process ends within half a minute; a zombie has ended."""
    for _ in range(1500):
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        env.sleep(0.02)
    return False


def test_the_shared_server_answers_commands_with_values(redis: PrivateRedis) -> None:
    key = f"test-{os.urandom(6).hex()}"
    assert redis.command("RPUSH", key, "a", b"\xff\r\n", 3) == 3
    assert redis.command("LRANGE", key, 0, -1) == [b"a", b"\xff\r\n", b"3"]
    assert redis.commands([("GET", "no such key"), ("DEL", key), ("DEL", key)]) == [None, 1, 0]
    assert redis.command("EVAL", "return {1, {'x', false}}", 0) == [1, [b"x", None]]
    assert redis.command("EXISTS", key, database=3) == 0
    assert redis.url == f"redis://127.0.0.1:{redis.port}/0"
    assert "Ready to accept connections" in redis.logs()


def test_an_error_of_the_server_is_raised_with_its_text(redis: PrivateRedis) -> None:
    with pytest.raises(RedisCommandError, match="unknown command"):
        redis.command("NO-SUCH-COMMAND")
    with pytest.raises(RedisCommandError, match="DB index"):
        redis.command("PING", database=10_000)


def test_a_password_is_asked_for_and_not_shown(make_private_redis: Make) -> None:
    password = 'a "b\\c" ü@/:'
    server = make_private_redis(password=password)
    assert server.command("PING") == b"PONG"
    assert server.url == f"redis://:a%20%22b%5Cc%22%20%C3%BC%40%2F%3A@127.0.0.1:{server.port}/0"
    assert password not in repr(server)
    other = PrivateRedis()
    other.port = server.port
    with pytest.raises(RedisCommandError, match="NOAUTH"):
        other.command("PING")
    assert (server.folder / "redis.conf").stat().st_mode & 0o077 == 0


def test_a_killed_server_has_its_data_again_if_it_appends(
    redis: PrivateRedis, make_private_redis: Make, env: Environment
) -> None:
    server = make_private_redis(append_only=True)
    port, pid = server.port, server.pid
    server.command("SET", "kept", "1")
    server.kill()
    assert gone(pid, env)
    assert not server.running
    with pytest.raises(PrivateBrokerError, match="PING: no answer from <PrivateRedis"):
        server.command("PING")
    server.start()
    assert server.port == port
    assert server.command("GET", "kept") == b"1"
    server.restart()
    assert server.command("GET", "kept") == b"1"
    assert answers(redis.port), "the other private server was disturbed"


def test_a_restart_forgets_everything_by_default(make_private_redis: Make) -> None:
    server = make_private_redis()
    server.command("SET", "lost", "1")
    server.restart(pause=0.01)
    assert server.command("EXISTS", "lost") == 0


def test_a_frozen_server_does_not_answer_until_it_is_thawed(make_private_redis: Make) -> None:
    server = make_private_redis()
    server.freeze()
    assert "frozen" in repr(server)
    assert server.running
    with pytest.raises(PrivateBrokerError, match="timed out"):
        server.command("PING", timeout=0.1)
    server.thaw()
    assert server.command("PING") == b"PONG"
    folder = server.folder
    server.freeze()
    server.close()
    assert not folder.exists()
    with pytest.raises(PrivateBrokerError, match="closed"):
        server.start()


def test_writes_can_be_refused(make_private_redis: Make) -> None:
    server = make_private_redis(max_memory="20mb")
    server.fill()
    with pytest.raises(RedisCommandError, match="OOM "):
        server.command("SET", "x", "1")
    server.empty()
    assert server.command("CONFIG", "GET", "maxmemory")[1] == str(20 * 1024**2).encode()
    server.demote()
    with pytest.raises(RedisCommandError, match="READONLY "):
        server.command("SET", "x", "1")
    server.promote()
    assert server.command("SET", "x", "1") == b"OK"


def test_a_paused_server_answers_when_the_pause_ends(make_private_redis: Make) -> None:
    server = make_private_redis()
    server.pause(100, writes_only=True)
    assert server.command("GET", "x") is None
    with pytest.raises(PrivateBrokerError, match="timed out"):
        server.command("SET", "x", "1", timeout=0.1)
    server.unpause()
    assert server.command("SET", "x", "2") == b"OK"
    started = time.monotonic()
    server.pause(0.3)
    assert server.command("GET", "x") == b"2"
    assert time.monotonic() - started > 0.25


def test_all_clients_can_be_seen_and_kicked(make_private_redis: Make) -> None:
    server = make_private_redis()
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as one,
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as subscriber,
    ):
        one.sendall(b"CLIENT SETNAME somebody\r\n")
        assert one.recv(100) == b"+OK\r\n"
        subscriber.sendall(b"SUBSCRIBE x\r\n")
        assert subscriber.recv(100).startswith(b"*3")
        assert {client["name"] for client in server.clients()} == {"somebody", ""}
        server.kick()
        assert one.recv(100) == b""
        assert subscriber.recv(100) == b""
    server.until("nobody is there", lambda: not server.clients())


def test_a_server_that_loads_its_data_says_so(make_private_redis: Make) -> None:
    server = make_private_redis()
    server.command("SET", "kept", "1")
    start_loading(server)
    with pytest.raises(RedisCommandError, match="LOADING "):
        server.command("GET", "kept")
    end_loading(server)
    assert server.command("GET", "kept") == b"1"


def test_a_unix_socket_and_tls(make_private_redis: Make, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    server = make_private_redis(unix_socket=True, tls=certificates.server_files())
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(30)
        link.connect(str(server.socket_path))
        link.sendall(b"PING\r\n")
        assert link.recv(100) == b"+PONG\r\n"
    assert server.socket_url == f"redis+socket://{server.socket_path}"
    context = certificates.client_context()
    with (
        socket.create_connection(("127.0.0.1", server.tls_port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(b"PING\r\n")
        assert secure.recv(100) == b"+PONG\r\n"
    assert server.database_url(2, tls=True) == f"rediss://127.0.0.1:{server.tls_port}/2"


def test_tls_with_a_certificate_of_the_client(make_private_redis: Make, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    server = make_private_redis(tls=certificates.server_files(external=True))
    context = certificates.client_context(with_certificate=True)
    with (
        socket.create_connection(("127.0.0.1", server.tls_port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(b"PING\r\n")
        assert secure.recv(100) == b"+PONG\r\n"


def test_a_server_ends_with_a_killed_owner(env: Environment) -> None:
    require_redis()
    program = """
import sys, time
from greenkombu.utils.private_redis import PrivateRedis
server = PrivateRedis().start()
print(server.pid, server.folder, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid, folder = owner.stdout.readline().split()
        os.kill(owner.pid, signal.SIGKILL)
    assert gone(int(pid), env)
    for _ in range(1500):
        if not Path(folder).exists():
            break
        env.sleep(0.02)
    assert not Path(folder).exists()


def test_a_server_that_cannot_start_says_why_and_leaves_nothing() -> None:
    require_redis()
    server = PrivateRedis(settings={"no-such-setting": "1"})
    with pytest.raises(PrivateBrokerError, match="no-such-setting"):
        server.start()
    assert not server.running
    folder = server.folder
    server.close()
    assert not folder.exists()


def test_a_port_that_somebody_else_has_taken_is_not_insisted_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_redis()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = [other.getsockname()[1]]
        free = private_redis.free_ports
        monkeypatch.setattr(
            private_redis, "free_ports", lambda count: [taken.pop()] if taken else free(count)
        )
        with PrivateRedis() as server:
            assert not taken
            assert server.command("PING") == b"PONG"


def test_a_machine_without_redis_gets_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_redis, "PLACES", ())
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RedisNotInstalledError, match="apt-get install redis-server"):
        PrivateRedis().start()


def test_sentinels_tell_the_master_and_change_it(
    env: Environment, redis_sentinel: PrivateSentinel
) -> None:
    old = redis_sentinel.master
    old.command("SET", "before", "1")
    (replica,) = redis_sentinel.replicas
    until(env, lambda: replica.command("GET", "before"))  # what it has not got is lost
    assert redis_sentinel.url.count("sentinel://127.0.0.1:") == 3
    assert redis_sentinel.transport_options == {"master_name": "main"}
    new = redis_sentinel.failover()
    assert new is not old
    assert redis_sentinel.replicas == [old]
    assert new.command("GET", "before") == b"1"
    with pytest.raises(RedisCommandError, match="READONLY "):
        old.command("SET", "after", "1")


@pytest.mark.slow
def test_a_killed_master_is_replaced_and_comes_back_as_a_replica(
    redis_sentinel: PrivateSentinel,
) -> None:
    old = redis_sentinel.kill_master()
    new = redis_sentinel.wait_failover(old)
    assert new.command("SET", "x", "1") == b"OK"
    redis_sentinel.sentinels[0].kill()
    redis_sentinel.restore()
    assert redis_sentinel.master is new
    assert old.command("GET", "x") == b"1"


@pytest.mark.slow
def test_sentinels_and_their_servers_may_ask_for_passwords() -> None:
    with make_sentinel(password="secret", sentinel_password="other") as servers:
        assert servers.url.startswith("sentinel://:secret@127.0.0.1:")
        assert servers.transport_options["sentinel_kwargs"] == {"password": "other"}
        assert servers.failover().command("PING") == b"PONG"


def test_a_cluster_has_each_key_on_one_node(redis_cluster: PrivateRedisCluster) -> None:
    assert len(redis_cluster.masters) == 3
    key = "{cluster-test}1"
    assert redis_cluster.command(key, "SET", key, "1") == b"OK"
    holder = redis_cluster.master_of(key)
    other = next(node for node in redis_cluster.masters if node is not holder)
    slot = redis_cluster.slot_of(key)
    with pytest.raises(RedisCommandError, match=f"MOVED {slot} 127.0.0.1:{holder.port}"):
        other.command("GET", key)
    redis_cluster.start_moving(slot, other)
    with pytest.raises(RedisCommandError, match=f"ASK {slot} 127.0.0.1:{other.port}"):
        holder.command("GET", "{cluster-test}2")
    redis_cluster.move_keys(slot, other)
    redis_cluster.finish_moving(slot, other)
    assert redis_cluster.master_of(key) is other
    assert redis_cluster.command(key, "GET", key) == b"1"
    redis_cluster.move_slot(slot, holder)
    assert redis_cluster.command(key, "GET", key) == b"1"


def test_a_replica_of_a_cluster_takes_over(redis_cluster: PrivateRedisCluster) -> None:
    old = redis_cluster.master_of("x")
    new = redis_cluster.failover_of("x")
    assert new is not old
    assert redis_cluster.replicas_of("x") == [old]
    assert redis_cluster.command("x", "SET", "x", "1") == b"OK"


@pytest.mark.slow
def test_a_killed_master_of_a_cluster_is_replaced(redis_cluster: PrivateRedisCluster) -> None:
    old = redis_cluster.kill_master_of("x")
    new = redis_cluster.wait_failover("x", old)
    assert new is not old
    assert redis_cluster.command("x", "SET", "x", "1") == b"OK"
    redis_cluster.restore()
    assert redis_cluster.replicas_of("x") == [old]
