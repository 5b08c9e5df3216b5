"""The wire between the engine and a worker: frames and messages (`values` has what is inside them).

A frame is a 4-byte big-endian length and that many bytes of MessagePack. Messages are tagged arrays, so a
frame says what it is in its first byte or two; new fields go at the end, with defaults. `Start` is sent before
there is a worker; the worker's first frame is `Hello`, with the protocol's version, and it touches no plugin
before `Go`. Nothing that comes from a worker is ever unpickled, and anything that does not decode as one of
`FROM_WORKER` is a protocol breach.

Both sides import this module and it imports nothing of the engine: a worker must stay small.
"""

from __future__ import annotations

import signal
import struct
from typing import Annotated, Literal, TypeAlias, get_args

import msgspec
from msgspec import msgpack

PROTOCOL = 4
UPLOADS = "uploads"  # the folder in the scratch root where the files of calls are
HEADER = struct.Struct("!I")
# Larger values travel through the arena or are refused; no frame may make the other side allocate more.
MAX_FRAME_BYTES = 64 * 1024 * 1024

DUMP_SIGNAL = signal.SIGRTMAX - 3  # asks a worker for its Python stack; few programs use real-time signals
EXIT_BROKEN = 70  # a worker's exit status: Holdfast's own part of it failed
EXIT_CHANNEL_LOST = 71  # likewise: the channel broke while the engine was alive
EXIT_NO_MEMORY = 72  # likewise: the plugin left it no memory to go on with


# What a worker says of itself. Ours sends far less; a longer one is somebody else's.
Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=65_536)]


# Parts of the arena, (offset, length), that the plugin holds on to after a call.
MAX_HELD = 1024
MAX_CHAIN = 32  # modules in a `StartFailed`
Held: TypeAlias = Annotated[tuple[tuple[int, int], ...], msgspec.Meta(max_length=MAX_HELD)]


StageName: TypeAlias = Literal["import", "init", "validate", "tools"]  # of a start, in order
STAGES: tuple[StageName, ...] = get_args(StageName)
_FIRST_STAGE = 1 << 63  # higher than any call's number, for both are noted in the same place


class Message(msgspec.Struct, frozen=True, array_like=True, tag_field="t"):
    """Base of all messages."""


# Engine to worker.


class Sandbox(msgspec.Struct, frozen=True):
    """What the plugin may do outside of its own processes; see `engine.worker.contain`."""

    network: bool = True
    filesystem: str = "open"  # "open" | "read-only" | "listed"
    read: tuple[str, ...] = ()  # absolute
    write: tuple[str, ...] = ()


class Start(Message, frozen=True, tag=1):
    """Everything a worker needs to become a plugin; its answer, after `Go`, is `Ready` or `StartFailed`."""

    name: str
    folder: str
    entry: str  # module:class
    models: dict[str, str]
    settings: bytes  # msgpack
    scratch: str
    tools: dict[str, tuple[str, ...]]  # tool: the exception names that mean bad input
    memory_bytes: int
    max_result_bytes: int
    sandbox: Sandbox = Sandbox()


class Call(Message, frozen=True, tag=2):
    """Run a tool. `encoding` says what `arguments` is: see `engine.worker.tools`."""

    call_id: int
    tool: str
    encoding: str  # "python" (msgpack map) | "json" (JSON object) | "form" (msgpack map of text and files)
    arguments: bytes
    announce: bool = False  # send `Began` once the arguments are accepted
    taken: int = 0  # as `Taken`: when this was sent


class Encoded(msgspec.Struct, frozen=True):
    """Arguments that came encoded: a JSON body, or the msgpack of a form's text and files."""

    encoding: str  # "python" | "json" | "form"
    data: bytes


class Taken(Message, frozen=True, tag=3):
    """What the result of this call had put into the arena was copied: it may be overwritten.

    Said again, it only wakes the worker.
    """

    call_id: int


class Go(Message, frozen=True, tag=4):
    """The answer to `Hello`: the engine is ready, and the plugin may be touched."""


# Worker to engine.


class Hello(Message, frozen=True, tag=16):
    """The first frame of every worker."""

    protocol: int
    pid: int
    main_thread: int  # as faulthandler prints it: the thread that runs the tools


class ToolInfo(msgspec.Struct, frozen=True):
    """What the worker found out about a tool from its signature."""

    parameters: Annotated[str, msgspec.Meta(max_length=1 << 20)]  # JSON Schema of the arguments, as JSON
    streams: bool = False
    progress: bool = False


class Ready(Message, frozen=True, tag=18):
    """`validate()` passed: calls may come."""

    tools: dict[str, ToolInfo]


class StartFailed(Message, frozen=True, tag=19):
    """The start broke in Python."""

    stage: Text
    kind: (
        Text  # "exception" | "missing" | "memory" | "returned_false" | "no_validate" | "no_tool" | "no_class" | …
    )
    error_type: Text
    message: Text
    where: Text  # "plugin.py:17 in `detect`", or ""
    chain: Annotated[
        tuple[Text, ...], msgspec.Meta(max_length=MAX_CHAIN)
    ] = ()  # the modules whose import led to what is missing


class Began(Message, frozen=True, tag=20):
    """The arguments were accepted; plugin code runs now."""

    call_id: int


class Progress(Message, frozen=True, tag=21):
    """The tool called its `progress`."""

    call_id: int
    done: float
    total: float


class Item(Message, frozen=True, tag=22):
    """One item of a streaming tool."""

    call_id: int
    value: msgspec.Raw


class Result(Message, frozen=True, tag=23):
    """The tool returned."""

    call_id: int
    value: msgspec.Raw
    held: Held = ()


class Failed(Message, frozen=True, tag=24):
    """The call has no result."""

    call_id: int
    kind: Text  # one of HARMLESS, or "exception" | "memory" | "invalid" | "too_large"
    error_type: Text
    message: Text
    where: Text = ""
    held: Held = ()


# Kinds of `Failed` after which the plugin is as it was. After any other the worker runs nothing more.
HARMLESS = frozenset({"bad_input", "input_too_large", "rejected"})


class LogLine(Message, frozen=True, tag=25):
    """The plugin wrote to `context.log`."""

    level: Text
    message: Text


# Engine to fork server and back, one message per SEQPACKET datagram.


class Fork(Message, frozen=True, tag=40):
    """Make a worker. Carries the descriptors of `engine.worker.serve.Descriptors`, in that order."""

    token: int
    scratch: str
    cgroup: bool = False  # one more descriptor, of the `cgroup.procs` through which the worker enters its own


class Forked(Message, frozen=True, tag=41):
    """It exists. Carries its pidfd."""

    token: int
    pid: int


class NotForked(Message, frozen=True, tag=46):
    """The kernel gave no process for it."""

    token: int
    errno: int


class Exited(Message, frozen=True, tag=42):
    """It is dead, and so is everything it started. `status` is as from `waitpid`."""

    token: int
    status: int


class Serving(Message, frozen=True, tag=44):
    """The reaper's first message: it has forked the fork server. Carries that one's pidfd."""

    pid: int


class Lost(Message, frozen=True, tag=45):
    """The reaper's last: the fork server is dead, and so is everything that was below it; the engine is not."""

    status: int  # as from `waitpid`


class Isolated(Message, frozen=True, tag=43):
    """The fork server's first message."""

    exposed: str  # why what is private to the engine is not hidden from plugins; "" if it is


FROM_WORKER: TypeAlias = Hello | Ready | StartFailed | Began | Progress | Item | Result | Failed | LogLine

_encoder = msgpack.Encoder()
start_request = msgpack.Decoder(Start)
go_ahead = msgpack.Decoder(Go)
from_engine = msgpack.Decoder(Call | Taken)
from_worker = msgpack.Decoder(FROM_WORKER)
fork_request = msgpack.Decoder(Fork)
from_fork_server = msgpack.Decoder(Isolated | Forked | NotForked | Exited | Serving | Lost)
encode = _encoder.encode


def note_of(stage: StageName) -> int:
    """What a worker notes in its arena when it enters a stage; the engine looks once the worker is dead."""
    return _FIRST_STAGE + STAGES.index(stage)


def noted_stage(note: int) -> StageName | None:
    """The stage, where it is one that was noted."""
    number = note - _FIRST_STAGE
    return STAGES[number] if 0 <= number < len(STAGES) else None


def frame(message: Message) -> bytes:
    """A message as a frame.

    Raises:
        ValueError: it is larger than `MAX_FRAME_BYTES`.
    """
    content = bytearray()  # not `encode`: where no memory is left for the output, msgspec 0.22 crashes there
    _encoder.encode_into(message, content)
    length = len(content)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} fit")
    return HEADER.pack(length) + content
