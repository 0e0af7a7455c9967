"""Runs a command that may open no internet socket, nor may any process below it: `python offline.py COMMAND ...`.

A seccomp filter refuses `socket` for IPv4 and IPv6 with "permission denied". It needs no rights and no other tool.
"""

import ctypes
import errno
import os
import platform
import socket
import struct
import sys

NUMBERS = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""The audit number of a machine, and its number of the call `socket`."""

LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EACCES
ARCHITECTURE, CALL, DOMAIN = 4, 0, 16  # offsets in what the filter sees; the first argument, low half

NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2


def refuse_sockets() -> None:
    """Install the filter in this process, for itself and all that come from it.

    Raises:
        OSError: The kernel has no such filters.
    """
    audit, call = NUMBERS[platform.machine()]
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 0, 5, audit),
        (LOAD, 0, 0, CALL),
        (EQUAL, 0, 3, call),
        (LOAD, 0, 0, DOMAIN),
        (EQUAL, 2, 0, socket.AF_INET),
        (EQUAL, 1, 0, socket.AF_INET6),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    libc = ctypes.CDLL(None, use_errno=True)
    described = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(SECCOMP, FILTER, ctypes.byref(described), 0, 0):
        raise OSError(ctypes.get_errno(), "no filter of system calls")


if __name__ == "__main__":
    refuse_sockets()
    os.execvp(sys.argv[1], sys.argv[1:])
