"""The controller's client through SSH, on a server that reads channel-open as OpenSSH's PROTOCOL §2.4 says it is."""

import contextlib
import socket
import threading

import paramiko
import pytest

from cloudfit_orchestrator.controller.agents import AgentClient, StreamlocalTransport
from cloudfit_orchestrator.model.errors import TemporaryError

KIND = "direct-streamlocal@openssh.com"


class Policy(paramiko.ServerInterface):
    def check_auth_password(self, username, password):
        return paramiko.AUTH_SUCCESSFUL

    def get_allowed_auths(self, username):
        return "password"

    def check_channel_request(self, kind, chanid):
        return paramiko.OPEN_SUCCEEDED if kind == KIND else paramiko.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED


class ServerTransport(paramiko.Transport):
    """Reads the part of a channel-open that is our kind's own, which paramiko's server does not."""

    def _parse_channel_open(self, m):
        whole = paramiko.Message(m.asbytes())
        kind = whole.get_text()
        for _ in ("channel", "window", "packet size"):
            whole.get_int()
        if kind == KIND:
            self.asked = (whole.get_text(), whole.get_text(), whole.get_int(), whole.get_remainder())
        super()._parse_channel_open(m)


class SshServer:
    """Forwards each channel to the unix socket that it asks for."""

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.key = paramiko.ECDSAKey.generate()
        self.transport = None
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self):
        connection, _ = self._listener.accept()
        self.transport = ServerTransport(connection)
        self.transport.add_server_key(self.key)
        self.transport.start_server(server=Policy())
        while self.transport.is_active():
            channel = self.transport.accept(0.2)
            if channel is None:
                continue
            path, *reserved = self.transport.asked
            assert reserved == ["", 0, b""]
            target = socket.socket(socket.AF_UNIX)
            try:
                target.connect(path)
            except OSError:
                target.close()
                channel.close()
                continue
            for source, sink in ((channel, target), (target, channel)):
                thread = threading.Thread(target=self._copy, args=(source, sink))
                self._threads.append(thread)
                thread.start()

    @staticmethod
    def _copy(source, sink):
        with contextlib.suppress(OSError, EOFError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (sink, source):
            with contextlib.suppress(OSError, EOFError):
                end.close()

    def close(self):
        self._listener.close()
        if self.transport:
            self.transport.close()
        for thread in self._threads:
            thread.join(10)


@pytest.fixture
def ssh():
    server = SshServer()
    client = paramiko.SSHClient()
    client.get_host_keys().add(f"[127.0.0.1]:{server.port}", server.key.get_name(), server.key)
    client.connect(
        "127.0.0.1",
        port=server.port,
        username="root",
        look_for_keys=False,
        allow_agent=False,
        password="x",
        transport_factory=StreamlocalTransport,
    )
    yield client
    client.close()
    server.close()


def test_an_agent_is_reached_through_ssh_by_a_streamlocal_channel(house, ssh):
    with AgentClient.ssh(ssh, str(house.socket)) as client:
        assert client.status()["agent"] == "a1"
        assert client.reports(0) == ([], 0)


def test_an_agent_that_is_not_there_is_temporary_and_names_its_socket(ssh, house):
    with AgentClient.ssh(ssh, "/nowhere/socket") as client, pytest.raises(TemporaryError, match="/nowhere/socket"):
        client.status()


def test_a_connection_without_streamlocal_support_is_no_accident():
    with pytest.raises(TemporaryError, match="no SSH connection"):
        AgentClient.ssh(paramiko.SSHClient(), "/x").status()
