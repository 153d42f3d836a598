# SPDX-License-Identifier: Apache-2.0
"""A network namespace for servers that listen on more than they are told to."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 1


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """Within, this thread, and the threads and processes that it starts, have a network of their
    own with the loopback device alone.

    Raises OSError where that is not permitted.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: str, *arguments: int) -> None:
        if getattr(libc, function)(*arguments):
            code = ctypes.get_errno()
            raise OSError(code, f"{function}: {os.strerror(code)}")

    with Path("/proc/thread-self/ns/net").open("rb") as home:
        call("unshare", CLONE_NEWNET)
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
            yield
        finally:
            call("setns", home.fileno(), CLONE_NEWNET)
