"""Cuts the byte stream of a channel into frames, in a buffer that is used again for every one of them."""

from __future__ import annotations

from engine.sandbox.wire import HEADER, MAX_FRAME_BYTES

# Almost every frame is far smaller. A buffer made anew for each `recv`, as `bytes` would be, costs more than the
# call: past 128 KiB the C library asks the kernel for it and gives it back each time.
_BUFFER_BYTES = 64 * 1024


class FrameTooLong(ValueError):
    """The other side announced a frame that is longer than any may be."""


class Frames:
    """One direction of one channel.

    Invariant: `_buffer[_start:_end]` came and was not taken yet. The buffer is never resized, only replaced.
    """

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._start = 0
        self._end = 0

    def room(self) -> memoryview:
        """Where the next bytes of the stream go; never empty. Frames taken before are no longer valid."""
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._buffer) > _BUFFER_BYTES:
                self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        elif self._end == len(self._buffer):
            left = self._buffer[self._start : self._end]
            # Twice as much, and not at once what a header announces: nobody gets memory for four bytes.
            grown = 2 * len(self._buffer) if len(left) > len(self._buffer) // 2 else len(self._buffer)
            buffer = memoryview(bytearray(grown))
            buffer[: len(left)] = left
            self._buffer, self._start, self._end = buffer, 0, len(left)
        return self._buffer[self._end :]

    def came(self, count: int) -> None:
        """So many bytes were written there."""
        self._end += count

    def take(self) -> memoryview | None:
        """The content of the next frame, valid until `room` is called; None where it has not come whole.

        Raises:
            FrameTooLong: no such frame may come.
        """
        content = self._start + HEADER.size
        if self._end < content:
            return None
        length = HEADER.unpack_from(self._buffer, self._start)[0]
        if length > MAX_FRAME_BYTES:
            raise FrameTooLong(f"it announced a frame of {length} bytes; at most {MAX_FRAME_BYTES} may come")
        if self._end < content + length:
            return None
        self._start = content + length
        return self._buffer[content : self._start]
