"""What every test starts from: interpreted kernels, few threads, a fixed seed, no network.

`TRITON_INTERPRET=1` counts only before triton is imported for the first time, so it is set here, above everything
else. On a machine with a GPU, `TRITON_INTERPRET=0 pytest -m gpu` runs the compiled kernels instead.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import ipaddress
import random
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # tests are many small tensors: a second thread costs more than it brings


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds every generator before each test, so that none depends on which tests ran before it."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    return 1


def _is_local(host: object) -> bool:
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host)).is_loopback
    except ValueError:
        return False  # a name: looking it up would already be a connection


def _refuse(address: Any) -> None:
    raise RuntimeError(f"a test tried to reach the network at {address!r}; tests use this machine alone")


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Sockets reach this machine only: AF_UNIX and loopback, which process groups need."""
    patch = pytest.MonkeyPatch()

    def guard(name: str, address_at: int) -> None:
        original = getattr(socket.socket, name)

        def guarded(self: socket.socket, *args: Any) -> Any:
            address = args[address_at]
            if self.family != socket.AF_UNIX and not _is_local(address[0]):
                _refuse(address)
            return original(self, *args)

        patch.setattr(socket.socket, name, guarded)

    guard("connect", 0)
    guard("connect_ex", 0)
    guard("sendto", -1)  # the address comes last, after data and optional flags
    look_up = socket.getaddrinfo

    def guarded_look_up(host: Any, *args: Any, **options: Any) -> Any:
        if not _is_local(host):
            _refuse(host)
        return look_up(host, *args, **options)

    patch.setattr(socket, "getaddrinfo", guarded_look_up)
    yield
    patch.undo()
