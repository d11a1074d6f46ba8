"""A machine behind ssh, on loopback: paramiko's server with files of this disk; renames are OpenSSH's."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paramiko
from paramiko import SFTP_OK, SFTPAttributes, SFTPHandle, SFTPServer, SFTPServerInterface


class Doorman(paramiko.ServerInterface):
    """Lets in whoever holds one key."""

    def __init__(self, key: paramiko.PKey) -> None:
        self.key = key

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.AUTH_SUCCESSFUL if key == self.key else paramiko.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED


def answered(function: Any) -> Any:
    """What the disk refuses is the protocol's error."""

    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except OSError as error:
            return SFTPServer.convert_errno(error.errno)

    return wrapped


class Files(SFTPServerInterface):
    """Operations on files, with the meaning that OpenSSH's server gives them."""

    @answered
    def list_folder(self, path: str) -> Any:
        return [SFTPAttributes.from_stat((Path(path) / one).stat(), one) for one in os.listdir(path)]

    @answered
    def stat(self, path: str) -> Any:
        return SFTPAttributes.from_stat(os.stat(path))

    lstat = stat

    @answered
    def open(self, path: str, flags: int, attributes: Any) -> Any:
        descriptor = os.open(path, flags, 0o666)
        mode = "rb" if flags & (os.O_WRONLY | os.O_RDWR) == 0 else "r+b" if flags & os.O_RDWR else "wb"
        handle = SFTPHandle(flags)
        handle.filename = path
        handle.readfile = handle.writefile = os.fdopen(descriptor, mode)
        return handle

    @answered
    def remove(self, path: str) -> int:
        os.remove(path)
        return SFTP_OK

    @answered
    def rename(self, old: str, new: str) -> int:
        # OpenSSH gives the new name with `link`, which fails where it is taken.
        os.link(old, new)
        os.remove(old)
        return SFTP_OK

    @answered
    def posix_rename(self, old: str, new: str) -> int:
        os.rename(old, new)
        return SFTP_OK

    @answered
    def mkdir(self, path: str, attributes: Any) -> int:
        os.mkdir(path)
        return SFTP_OK


@contextmanager
def ssh_machine(home: Path) -> Iterator[int]:
    """The port of a server that the keys below `home` open and that its `known_hosts` names."""
    host, mine = paramiko.ECDSAKey.generate(), paramiko.ECDSAKey.generate()
    keys = home / ".ssh"
    keys.mkdir(parents=True, exist_ok=True)
    mine.write_private_key_file(str(keys / "id_ecdsa"))
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    (keys / "known_hosts").write_text(f"[127.0.0.1]:{port} {host.get_name()} {host.get_base64()}\n")
    transports: list[paramiko.Transport] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(connection)
            transport.add_server_key(host)
            transport.set_subsystem_handler("sftp", SFTPServer, Files)
            transport.start_server(server=Doorman(mine))
            transports.append(transport)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield port
    finally:
        listener.close()
        for transport in transports:
            transport.close()
