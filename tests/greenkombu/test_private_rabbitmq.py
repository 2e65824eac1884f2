"""The private RabbitMQ that tests and the demo start."""

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

from greenkombu.utils import private_rabbitmq
from greenkombu.utils._private_server import GuardedProcess, PrivateBrokerError, free_ports
from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ, RabbitMQNotInstalledError
from tests.support.patched import ROOT
from tests.support.rabbitmq import Certificates, require_rabbitmq

if TYPE_CHECKING:
    from hub.environment import Environment
    from tests.support.ticker import Ticker

Make = Callable[..., PrivateRabbitMQ]


def answers(port: int) -> bool:
    """Whether something answers the AMQP protocol header within two seconds."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as probe:
            probe.sendall(b"AMQP\x00\x00\x09\x01")
            return probe.recv(1) == b"\x01"
    except OSError:
        return False


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process has ended, or ends within the given time; a zombie has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_free_ports_are_distinct_and_below_the_ephemeral_range() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(20000 <= port < 32768 for port in ports)
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_the_shared_server_answers_and_can_be_controlled(
    rabbitmq: PrivateRabbitMQ, ticker: Ticker
) -> None:
    assert answers(rabbitmq.port)
    ticker.reset()
    for _ in range(3):  # one takes long enough, unless the machine stands still
        assert "guest" in rabbitmq.ctl("list_users")
        if ticker.ticks > 5:
            break
    assert ticker.ticks > 5, "the control command stopped the other tasks"
    with pytest.raises(PrivateBrokerError, match="no-such-command"):
        rabbitmq.ctl("no-such-command")
    assert f":{rabbitmq.port}/%2F" in rabbitmq.url
    assert "Server startup complete" in rabbitmq.logs()


def test_a_virtual_host_comes_and_goes(rabbitmq: PrivateRabbitMQ) -> None:
    url = rabbitmq.add_vhost("a/b c")
    assert url.endswith("/a%2Fb%20c")
    assert "a/b c" in rabbitmq.ctl("list_vhosts").splitlines()
    rabbitmq.delete_vhost("a/b c")
    assert "a/b c" not in rabbitmq.ctl("list_vhosts").splitlines()


@pytest.mark.slow
def test_a_server_survives_every_kind_of_trouble(
    rabbitmq: PrivateRabbitMQ, make_private_rabbitmq: Make
) -> None:
    server = make_private_rabbitmq()
    port, pid = server.port, server.pid
    server.freeze()
    assert "frozen" in repr(server)
    assert server.running
    server.thaw()
    assert answers(port)
    server.stop_app()
    assert not answers(port)
    server.start_app()
    assert answers(port)
    server.close_all_connections("a reason")
    server.block()
    assert "memory" in server.ctl("eval", "rabbit_alarm:get_alarms().")
    server.unblock()
    assert server.ctl("eval", "rabbit_alarm:get_alarms().").strip() == "[]"
    server.kill()
    assert gone(pid)
    assert not server.running
    with pytest.raises(PrivateBrokerError, match="does not run"):
        server.ctl("status")
    server.restart()
    assert server.port == port
    assert answers(port)
    assert answers(rabbitmq.port), "the other private server was disturbed"
    folder = server.folder
    server.freeze()
    server.close()
    assert not folder.exists()
    assert not answers(port)
    with pytest.raises(PrivateBrokerError, match="closed"):
        server.start()


@pytest.mark.slow
def test_tls_with_external_login(make_private_rabbitmq: Make, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    server = make_private_rabbitmq(tls=certificates.server_files(external=True))
    assert certificates.user in server.ctl("list_users")
    context = certificates.client_context(with_certificate=True)
    with (
        socket.create_connection(("127.0.0.1", server.tls_port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(b"AMQP\x00\x00\x09\x01")
        assert b"EXTERNAL" in secure.recv(4096)


@pytest.mark.slow
def test_a_server_ends_with_a_killed_owner(env: Environment) -> None:
    require_rabbitmq()
    program = """
import sys, time
from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ
server = PrivateRabbitMQ().start()
print(server.pid, server.folder, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid, folder = owner.stdout.readline().split()
        os.kill(owner.pid, signal.SIGKILL)
    assert gone(int(pid))
    deadline = time.monotonic() + 10
    while Path(folder).exists() and time.monotonic() < deadline:
        env.sleep(0.05)
    assert not Path(folder).exists()


def test_a_server_that_cannot_start_says_why_and_leaves_nothing() -> None:
    require_rabbitmq()
    server = PrivateRabbitMQ(settings={"no.such.setting": "1"})
    with pytest.raises(PrivateBrokerError, match=r"no\.such\.setting"):
        server.start()
    assert not server.running
    folder = server.folder
    server.close()
    assert not folder.exists()


def test_a_server_that_does_not_stop_in_time_is_killed(env: Environment, tmp_path: Path) -> None:
    program = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid())"
    command = [sys.executable, "-u", "-c", f"{program}; time.sleep(100)"]
    log = tmp_path / "log"
    server = GuardedProcess(command, os.environ, tmp_path, log)
    while not (log.exists() and log.read_text().endswith("\n")):
        env.sleep(0.02)
    pid = int(log.read_text())
    os.kill(pid, signal.SIGTERM)
    assert not server.wait(0.2, env.sleep)
    assert gone(pid)
    assert log.exists(), "the guard removed the folder of an owner that lives"


def test_a_machine_without_rabbitmq_gets_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_rabbitmq, "SCRIPT_FOLDERS", ())
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RabbitMQNotInstalledError, match="apt-get install rabbitmq-server"):
        PrivateRabbitMQ().start()
