"""A network of this process alone, in which it has addresses of other hosts: for callers that are not on loopback.

`python -m tests.support.other_hosts FOLDER` is such a process: a receiver on 127.0.0.1, asked by callers of several
addresses; it prints what each was answered.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.raw_peer import VERIFICATION, RawPeer, associate_rq, echo_rq
from tests.support.receiver import running_receiver

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # unshare(2)
ASSOCIATE_AC, ASSOCIATE_RJ = 0x02, 0x03  # PDU types (PS3.8 9.3)
SIOCSIFADDR, SIOCSIFNETMASK, SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8916, 0x891C, 0x8913, 0x8914, 1  # netdevice(7)
WARD, OTHER = "192.0.2.7", "192.0.2.8"  # of a block that no host has (RFC 5737)
CALLERS = (
    ("WARD", WARD),
    ("WARD", OTHER),
    ("STRANGER", WARD),
    ("STRANGER", "127.0.0.1"),
    ("STRANGER", "127.8.9.10"),
)


def leave_network(addresses: Sequence[str]) -> None:
    """Give this process, and those that it starts, a network with loopback and these IPv4 addresses only.

    Raises OSError where the system does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET | (0 if os.geteuid() == 0 else CLONE_NEWUSER)):
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack_from("16sh", fcntl.ioctl(control, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))
        for number, address in enumerate(addresses):
            for what, value in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, "255.255.255.255")):
                named = struct.pack("16sHH4s8x", f"lo:{number}".encode(), socket.AF_INET, 0, socket.inet_aton(value))
                fcntl.ioctl(control, what, named)


def answered(port: int, ae_title: str, address: str) -> str:
    """What a caller of this AE title and address is answered to an association, and to C-ECHO on it.

    Not by pynetdicom: on a busy machine it may miss a rejection behind which the connection is closed.
    """
    peer = RawPeer.connect(port, source=address)
    try:
        peer.send(associate_rq([VERIFICATION], calling=ae_title))
        answer = peer.receive()
        assert answer is not None
        kind, body = answer
        if kind == ASSOCIATE_RJ:
            return "rejected {} {} {}".format(*body[1:4])
        assert kind == ASSOCIATE_AC
        peer.send(echo_rq())
        return f"echo {peer.response()['Status']:#06x}"
    finally:
        peer.close()


def main() -> None:
    """Print the answers to CALLERS as JSON; exit status 77 where there can be no such network."""
    try:
        leave_network((WARD, OTHER))
    except OSError as error:
        print(f"no network of our own: {error}", file=sys.stderr)
        sys.exit(77)
    tables = {"peers": [{"name": "ward", "ae_title": "WARD", "host": WARD, "port": 104}]}
    with running_receiver(Path(sys.argv[1]), tables) as receiver:
        print(json.dumps([answered(receiver.port, *caller) for caller in CALLERS]))


if __name__ == "__main__":
    main()
