"""Deltas of files: what turns one version's weights into a later one's, for whoever has the earlier ones.

Two files of equal length are read as rows of words, 2 bytes each in bfloat16 and 4 in float32. For each word that
differs a delta says where it is and by how much its bit pattern, read as an integer, differs: a small step of the
optimizer moves a weight by one unit in its last place or a few, so that both are small numbers. A delta is one zstd
frame (little endian throughout):

    delta := head block*
    head  := "HRLD"  word: u8 (2, 4)  3 zero bytes  size: u64                       of the files, in bytes
    block := changes: u32  gaps: u32  before: u32  after: u32  gap bytes  plane*    of the next 4 Mi words

Gaps are the numbers of unchanged words before each changed one, in bytes: 255 means 255 and what follows. Planes are
the lowest bytes of all differences, then the next ones; a difference d is zigzag coded (0, -1, 1, -2 ... become 0, 1,
2, 3 ...), so the high planes are empty. `before` and `after` are the CRC-32 of the changed words: a block that was
changed already stays as it is, and one of other weights is refused. So applying a delta twice is applying it once.

Memory is bounded by a few blocks, whatever the size of the model or of one tensor.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
import zstandard
from numpy.typing import NDArray

from heterorl.errors import CorruptFile

BLOCK_WORDS = 4 << 20
_HEAD = struct.Struct("<4sB3xQ")
_BLOCK = struct.Struct("<IIII")
_MAGIC = b"HRLD"
_ESCAPE = 255
_LEVEL = 1
_Words = NDArray[Any]
"""uint16 or uint32."""


def encode(base: Path, target: Path, out: Path, *, word: int, limit: int) -> bool:
    """Write what turns `base` into `target` to `out`, in words of 2 or 4 bytes.

    False, with `out` of no use, where the files differ in length, as when tensors came or went, or the delta would
    take more than `limit` bytes.
    """
    size = target.stat().st_size
    if base.stat().st_size != size:
        return False
    compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
    with open(base, "rb") as old, open(target, "rb") as new, open(out, "wb") as file:
        file.write(compressor.compress(_HEAD.pack(_MAGIC, word, size)))
        for before, after in zip(_blocks(old, word), _blocks(new, word)):
            for part in _changes(before, after):
                file.write(compressor.compress(part))
                file.write(compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))  # each kind of bytes has its own code
            if file.tell() > limit:
                return False
        file.write(compressor.flush())
        return file.tell() <= limit


def apply(base: Path, deltas: Sequence[Path], out: Path, check: Callable[[], None] = lambda: None) -> str:
    """Write what the deltas, one after the other, make of `base` to `out`; returns the SHA-256 of `out`.

    `check` is called between blocks; what it raises ends it. CorruptFile for a delta that is damaged or not of these
    weights.
    """
    digest = hashlib.sha256()
    with ExitStack() as stack:
        file = stack.enter_context(open(base, "rb"))
        readers = [_Reader(stack.enter_context(open(path, "rb")), path.name) for path in deltas]
        writer = stack.enter_context(open(out, "wb"))
        size = base.stat().st_size
        word = max((reader.begin(size) for reader in readers), default=4)
        for words in _blocks(file, word):
            words = words.copy()
            for reader in readers:
                reader.change(words)
            data = words.data.cast("B")[: size - writer.tell()]
            digest.update(data)
            writer.write(data)
            check()
        for reader in readers:
            reader.end()
    return digest.hexdigest()


def _blocks(file: BinaryIO, word: int) -> Iterator[_Words]:
    """The words of a file; the last one is filled up with zeros."""
    while data := file.read(BLOCK_WORDS * word):
        yield np.frombuffer(data + bytes(-len(data) % word), f"<u{word}")


def _changes(before: _Words, after: _Words) -> Iterator[bytes]:
    places = np.flatnonzero(before != after)
    before, after = before[places], after[places]
    gaps = np.diff(places, prepend=-1) - 1
    escapes = gaps // _ESCAPE
    coded = np.full(len(places) + int(escapes.sum()), _ESCAPE, np.uint8)
    coded[np.cumsum(escapes + 1) - 1] = gaps % _ESCAPE
    yield _BLOCK.pack(len(places), len(coded), crc32(before.data), crc32(after.data)) + coded.tobytes()
    difference = (after - before).view(f"<i{after.itemsize}")
    zigzag = (difference << 1) ^ (difference >> (8 * after.itemsize - 1))
    yield zigzag.view(np.uint8).reshape(-1, after.itemsize).T.tobytes()


class _Reader:
    """A delta, read from its beginning to its end."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._stream = zstandard.ZstdDecompressor().stream_reader(file)
        self._name, self._word = name, 0

    def begin(self, size: int) -> int:
        """Read the head; returns the bytes of a word. `size`: of the base."""
        magic, self._word, expected = _HEAD.unpack(self._read(_HEAD.size))
        if magic != _MAGIC or self._word not in (2, 4):
            raise CorruptFile(f"{self._name} is not a delta of weights")
        if expected != size:
            raise CorruptFile(f"{self._name} changes weights of {expected} bytes; these have {size}")
        return int(self._word)

    def change(self, words: _Words) -> None:
        """Change the next block of words, unless it was changed before."""
        if words.itemsize != self._word:
            raise CorruptFile(f"{self._name} has words of {self._word} bytes, another delta of {words.itemsize}")
        count, num_gaps, crc_before, crc_after = _BLOCK.unpack(self._read(_BLOCK.size))
        if count > len(words) or num_gaps > len(words) + count:
            raise CorruptFile(f"{self._name}: a block of {len(words)} words has {count} changes")
        coded = np.frombuffer(self._read(num_gaps), np.uint8)
        unchanged = np.cumsum(coded, dtype=np.int64)[coded != _ESCAPE]
        if len(unchanged) != count or (count and unchanged[-1] + count > len(words)):
            raise CorruptFile(f"{self._name}: the places of {count} changes are not in its block")
        places = unchanged + np.arange(count)
        planes = np.frombuffer(self._read(count * self._word), np.uint8).reshape(self._word, count)
        before = words[places]
        zigzag = np.ascontiguousarray(planes.T).view(f"<u{self._word}")[:, 0]
        after = before + ((zigzag >> 1) ^ -(zigzag & 1))
        if (crc32(before.data), crc32(after.data)) == (crc_before, crc_after):
            words[places] = after
        elif crc32(before.data) != crc_after:
            raise CorruptFile(f"{self._name} does not fit the weights that it is to change")

    def end(self) -> None:
        """CorruptFile if there is more."""
        try:
            if self._stream.read(1):
                raise CorruptFile(f"{self._name} is longer than the weights that it changes")
        except zstandard.ZstdError as error:
            raise CorruptFile(f"{self._name}: {error}") from error

    def _read(self, size: int) -> bytes:
        try:
            data: bytes = self._stream.read(size)
        except zstandard.ZstdError as error:
            raise CorruptFile(f"{self._name}: {error}") from error
        if len(data) != size:
            raise CorruptFile(f"{self._name} ends too early")
        return data
