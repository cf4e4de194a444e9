# SPDX-License-Identifier: GPL-2.0
"""The server's side of NBD, one request at a time, for disks that misbehave.

A disk has read(offset, length), which returns bytes; write(offset, data, is_fua); flush(); and
trim(offset, length). What raises OSError fails with its errno.
"""
import struct

HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM = 1, 1 << 2, 1 << 3, 1 << 5
READ, WRITE, DISCONNECT, FLUSH, TRIM = range(5)
FUA = 1
REQUEST, REPLY = struct.Struct(">IHHQQI"), struct.Struct(">IIQ")
REPLY_MAGIC = 0x67446698

OPTION, OPTION_REPLY = struct.Struct(">QII"), struct.Struct(">QIII")
OPTION_MAGIC, OPTION_REPLY_MAGIC = 0x49484156454F5054, 0x3E889045565A9
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
ABORT, GO = 2, 7
ACK, INFO, UNSUPPORTED = 1, 3, 1 << 31 | 1


class Gone(Exception):
    """The client has left."""


def receive(sock, size):
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise Gone
        data += part
    return data


def agree(sock, size, flags):
    """The newstyle handshake, for a disk of so many bytes."""
    sock.sendall(b"NBDMAGIC" + struct.pack(">QH", OPTION_MAGIC, FIXED_NEWSTYLE | NO_ZEROES))
    receive(sock, 4)
    while True:
        _, option, length = OPTION.unpack(receive(sock, OPTION.size))
        receive(sock, length)

        def answer(kind, data=b""):
            sock.sendall(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

        if option == ABORT:
            raise Gone
        if option == GO:
            answer(INFO, struct.pack(">HQH", 0, size, HAS_FLAGS | flags))
            answer(ACK)
            return
        answer(UNSUPPORTED)


def serve(sock, disk):
    """Serves until the client has left."""
    while True:
        _, flags, what, cookie, offset, length = REQUEST.unpack(receive(sock, REQUEST.size))
        data, error = receive(sock, length) if what == WRITE else b"", 0
        try:
            if what == DISCONNECT:
                raise Gone
            if what == READ:
                data = disk.read(offset, length)
            elif what == WRITE:
                disk.write(offset, data, bool(flags & FUA))
            elif what == FLUSH:
                disk.flush()
            elif what == TRIM:
                disk.trim(offset, length)
        except OSError as failed:
            error = failed.errno
        sock.sendall(REPLY.pack(REPLY_MAGIC, error, cookie))
        if what == READ and not error:
            sock.sendall(data)
