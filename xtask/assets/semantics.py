#!/usr/bin/python3
"""What NBD's specification promises, asked through libnbd: an independent client.

Refused requests must not cost the connection; FUA, flush, zeroing, trimming and multi-conn must
mean what they say; answers may come in any order. Usage: semantics.py URI
"""
import sys

import nbd

uri = sys.argv[1]
disk = nbd.NBD()
disk.add_meta_context("base:allocation")
disk.connect_uri(uri)
size = disk.get_size()


def refused(function, *arguments):
    """The error number with which a request fails."""
    try:
        function(*arguments)
    except nbd.Error as error:
        return error.errno
    raise SystemExit(f"{function.__name__}{arguments} should have been refused")


disk.set_strict_mode(0)  # let impossible requests reach the server
assert refused(disk.pread, 512, size) == "EINVAL"
assert refused(disk.pread, 4096, size - 512) == "EINVAL"
assert refused(disk.pwrite, b"x" * 512, size) in ("ENOSPC", "EINVAL")
assert refused(disk.zero, 512, size) in ("ENOSPC", "EINVAL")
assert refused(disk.trim, 512, size) == "EINVAL"
assert len(disk.pread(512, 0)) == 512, "the connection survives refused requests"

disk.pwrite(b"A" * 65536, 0, nbd.CMD_FLAG_FUA)
disk.flush()
disk.zero(4096, 4096, nbd.CMD_FLAG_NO_HOLE)
assert disk.pread(12288, 0) == b"A" * 4096 + bytes(4096) + b"A" * 4096
disk.trim(65536, 0)

extents = []
disk.block_status(min(size, 1 << 31), 0, lambda c, o, e, error: extents.extend(e) or 0)
assert extents and len(extents) % 2 == 0, extents

chunks = []
disk.pread_structured(1 << 20, 0, lambda b, o, s, error: chunks.append((o, len(b))) or 0)
assert sum(length for _, length in chunks) == 1 << 20, chunks
position = 0
for offset, length in sorted(chunks):
    assert offset == position, chunks
    position += length
if disk.can_df():
    chunks.clear()
    disk.pread_structured(
        1 << 20, 0, lambda b, o, s, error: chunks.append((o, len(b))) or 0, nbd.CMD_FLAG_DF
    )
    assert chunks == [(0, 1 << 20)], chunks

# 64 writes in flight on one connection, then each read back.
buffers = [nbd.Buffer.from_bytearray(bytearray([i]) * 4096) for i in range(64)]
cookies = [disk.aio_pwrite(buffers[i], i * 4096) for i in range(64)]
while disk.aio_in_flight():
    disk.poll(-1)
for cookie in cookies:
    assert disk.aio_command_completed(cookie)
for i in range(64):
    assert disk.pread(4096, i * 4096) == bytes([i]) * 4096, i

# Unaligned, across a block boundary.
disk.pwrite(b"unaligned", 4093)
assert disk.pread(11, 4092) == b"\x00unaligned\x01", disk.pread(11, 4092)

# Written on one connection, flushed on a second, seen on a third.
if disk.can_multi_conn():
    second, third = nbd.NBD(), nbd.NBD()
    second.connect_uri(uri)
    third.connect_uri(uri)
    disk.pwrite(b"Z" * 512, 1 << 20)
    second.flush()
    assert third.pread(512, 1 << 20) == b"Z" * 512

disk.shutdown()
print("ok")
