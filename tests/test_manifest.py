"""Reading `plugin.toml`: every way it can be wrong is a `ManifestInvalid` that names file, line and key."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.errors import HoldfastError
from engine.loader.manifest import Limits, Manifest, ManifestInvalid, Package, Sandbox, Tool, read_manifest
from engine.loader.toml_lines import MAX_DEPTH, KeyPath, TooDeep, key_lines

WHOLE = """\
name = "motion_tracker"
version = "1.0.0"
description = "Finds and tracks moving objects; CPU only."
entry = "plugin:MotionTracker"
requires_gpu = false
packages = [ "numpy", { import = "cv2", install = "opencv-python-headless" }, "torch>=2,<3" ]

[models]
detector = "models/detector.pt2"
other = "${MODELS}/other.onnx"

[settings]
anything = [1, { deep = 2.5 }]

[limits]
timeout_s = 30
memory_mib = 2048
workers = 2
queue = 0

[tools.track]
description = "Track moving objects through a video."
timeout_s = 900
rejects = ["ValueError", "cv2.error"]

[tools.detect]

[sandbox]
network = false
filesystem = "listed"
read = ["/srv/images", "${DATA}/labels.txt"]
write = ["out"]
"""

MINIMAL = 'name = "p"\nversion = "1"\nentry = "plugin:P"\n[tools.run]\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "motion"
    folder.mkdir()
    (folder / "plugin.py").write_text("")
    return folder


def read(folder: Path, text: str | bytes) -> Manifest:
    (folder / "plugin.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_manifest(folder)


def refusal(folder: Path, text: str | bytes) -> ManifestInvalid:
    with pytest.raises(ManifestInvalid) as caught:
        read(folder, text)
    assert str(folder / "plugin.toml") in caught.value.reason
    return caught.value


def test_every_key_of_the_design_is_read(folder: Path) -> None:
    manifest = read(folder, WHOLE)
    assert manifest == Manifest(
        name="motion_tracker",
        version="1.0.0",
        entry="plugin:MotionTracker",
        description="Finds and tracks moving objects; CPU only.",
        packages=("numpy", Package(import_="cv2", install="opencv-python-headless"), "torch>=2,<3"),
        models={"detector": "models/detector.pt2", "other": "${MODELS}/other.onnx"},
        settings={"anything": [1, {"deep": 2.5}]},
        limits=Limits(timeout_s=30.0, memory_mib=2048, workers=2, queue=0),
        sandbox=Sandbox(
            network=False, filesystem="listed", read=("/srv/images", "${DATA}/labels.txt"), write=("out",)
        ),
        tools={
            "track": Tool(
                description="Track moving objects through a video.",
                timeout_s=900.0,
                rejects=("ValueError", "cv2.error"),
            ),
            "detect": Tool(),
        },
    )
    assert manifest.timeout_s("track") == 900.0
    assert manifest.timeout_s("detect") == 30.0


@pytest.mark.contract(6)
def test_the_defaults_are_60_s_and_1_gib(folder: Path) -> None:
    limits = read(folder, MINIMAL).limits
    assert (limits.timeout_s, limits.start_timeout_s, limits.memory_mib) == (60.0, 60.0, 1024)
    assert limits.scratch_mib == 1024


def test_network_and_files_are_open_unless_a_sandbox_says_otherwise(folder: Path) -> None:
    assert read(folder, MINIMAL).sandbox == Sandbox(network=True, filesystem="open", read=(), write=())


@pytest.mark.parametrize(
    ("lines", "key", "words"),
    [
        ("netwrok = false", "sandbox.netwrok", "did you mean `network`?"),
        ("network = 0", "sandbox.network", "must be true or false"),
        ('filesystem = "scratch"', "sandbox.filesystem", "write one of open, read-only, listed"),
        ('read = ["/srv"]', "sandbox.read", 'write filesystem = "listed"'),
        ('filesystem = "read-only"\nread = ["/srv"]', "sandbox.read", 'write filesystem = "listed"'),
        ('write = ["/srv"]', "sandbox.write", 'write filesystem = "read-only" or "listed"'),
        ('filesystem = "listed"\nread = "/srv"', "sandbox.read", "must be an array"),
        ('filesystem = "listed"\nread = ["../x"]', "sandbox.read[0]", "leaves the plugin's folder"),
        ('filesystem = "listed"\nwrite = ["a", "~/x"]', "sandbox.write[1]", "~ is not expanded"),
        ('filesystem = "listed"\nwrite = [""]', "sandbox.write[0]", "is empty"),
    ],
)
def test_a_sandbox_that_would_mislead_is_refused(folder: Path, lines: str, key: str, words: str) -> None:
    reason = refusal(folder, f"{MINIMAL}[sandbox]\n{lines}\n").reason
    assert f"`{key}`" in reason
    assert words in reason


def test_packages_have_one_form_whether_written_as_text_or_table(folder: Path) -> None:
    assert list(read(folder, WHOLE).required_packages()) == [
        Package(import_="numpy"),
        Package(import_="cv2", install="opencv-python-headless"),
        Package(import_="torch", version="<3,>=2"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        WHOLE.replace("\n", "\r\n"),
        "\ufeff" + WHOLE,
        'name = "p"\nversion = "1"\nentry = "plugin:P"\ntools.run = {}\n',
        'tools = { run = { timeout_s = 5 } }\nname = "p"\nversion = "1"\nentry = "plugin:P"\n',
        'name = "p"\nversion = "1"\nentry = "plugin:P"\n[[packages]]\nimport = "json"\n[tools.run]\n',
        MINIMAL.replace("plugin:P", "sub.inner:P"),
        MINIMAL.replace("plugin:P", "package:P"),
        MINIMAL + '[models]\nabove = "/models/x.bin"\nback = "a/../b.bin"\nvar = "${X}/../b.bin"\n',
    ],
    ids=["crlf", "bom", "dotted", "inline", "table-array", "dotted-module", "package", "models"],
)
def test_other_ways_of_writing_it_are_read_too(folder: Path, text: str) -> None:
    for name in ("sub", "package"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("")
    (folder / "sub" / "inner.py").write_text("")
    assert read(folder, text).tools


# what is wrong, in place of what in WHOLE, → line, key, and words of the reason
FAULTS: list[tuple[str, str, int, str, str]] = [
    ("limits", "[limit]", 15, "limit", "did you mean `limits`?"),
    ("timeout_s = 30", "timout_s = 30", 16, "limits.timout_s", "did you mean `timeout_s`?"),
    ("timeout_s = 900", "timeout = 900", 23, "tools.track.timeout", "did you mean `timeout_s`?"),
    (
        "requires_gpu = false",
        "timeout_s = 5",
        5,
        "timeout_s",
        "`timeout_s` belongs in [limits] or in [tools.NAME]",
    ),
    ("requires_gpu = false", "memory = 64", 5, "memory", "`memory_mib` belongs in [limits]"),
    (
        "workers = 2",
        'description = "x"',
        18,
        "limits.description",
        "at the top, above the first [table] or in [to",
    ),
    ("workers = 2", "network = true", 18, "limits.network", "`network` belongs in [sandbox]"),
    ("workers = 2", "models = {}", 18, "limits.models", "`models` belongs in a table of its own"),
    ("timeout_s = 900", "memory_mib = 64", 23, "tools.track.memory_mib", "`memory_mib` belongs in [limits]"),
    ("timeout_s = 900", "version = 'x'", 23, "tools.track.version", "or in an entry of packages"),
    ("[tools.track]", "[tools]", 22, "tools.description", "it belongs in [tools.NAME]"),
    ('"cv2",', '"cv2", url = "x",', 6, "packages[1].url", "known here: import, install, version"),
    ("requires_gpu", "zzz", 5, "zzz", "known here: name, version"),
    ('version = "1.0.0"', "", 1, "version", 'is missing; add version = "1.0.0"'),
    ('import = "cv2", ', "", 6, "packages[1].import", 'is missing; add import = "cv2"'),
    ('"motion_tracker"', '"Motion"', 1, "name", '"Motion", which does not match'),
    ('"motion_tracker"', '"m\\n"', 1, "name", "rename the plugin"),
    ('"motion_tracker"', f'"{"m" * 65}"', 1, "name", "rename the plugin"),
    ('"1.0.0"', '" "', 2, "version", "is empty"),
    ('"1.0.0"', "1.0", 2, "version", "must be text in quotes, got 1.0"),
    ('"1.0.0"', '"1\\u0007"', 2, "version", "cannot be printed"),
    ("plugin:MotionTracker", "plugin", 4, "entry", "not module:Class"),
    ("plugin:MotionTracker", "../plugin:M", 4, "entry", "inside the plugin's folder"),
    ("plugin:MotionTracker", "/etc/x:M", 4, "entry", "inside the plugin's folder"),
    ("plugin:MotionTracker", "a..b:M", 4, "entry", "not module:Class"),
    ("plugin:MotionTracker", "class:M", 4, "entry", "not module:Class"),
    ("plugin:MotionTracker", "plugn:M", 4, "entry", "plugn.py is not in"),
    ("plugin:MotionTracker", "a.b:M", 4, "entry", "a/b.py is not in"),
    ("plugin:MotionTracker", "a" * 300 + ":M", 4, "entry", "file name too long"),
    ("requires_gpu = false", 'requires_gpu = "no"', 5, "requires_gpu", "true or false"),
    ("timeout_s = 30", "timeout_s = 0", 16, "limits.timeout_s", "seconds above 0"),
    ("timeout_s = 30", "timeout_s = nan", 16, "limits.timeout_s", "is nan"),
    ("timeout_s = 30", "timeout_s = inf", 16, "limits.timeout_s", "is inf"),
    ("timeout_s = 30", "timeout_s = true", 16, "limits.timeout_s", "must be a number, got true"),
    ("timeout_s = 30", "start_timeout_s = -1", 16, "limits.start_timeout_s", "is -1"),
    ("= 2048", "= 15", 17, "limits.memory_mib", "MiB from 16"),
    ("= 2048", "= 1e3", 17, "limits.memory_mib", "must be a whole number, got 1000.0"),
    ("= 2048", "= 0x" + "f" * 5000, 17, "limits.memory_mib", "more than 64 bits"),
    ("workers = 2", "scratch_mib = 0", 18, "limits.scratch_mib", "MiB from 1"),
    ("workers = 2", "scratch_mib = 0.5", 18, "limits.scratch_mib", "must be a whole number"),
    ("workers = 2", "workers = 0", 18, "limits.workers", "from 1 to 64"),
    ("workers = 2", "workers = 65", 18, "limits.workers", "from 1 to 64"),
    ("queue = 0", "queue = -1", 19, "limits.queue", "from 0"),
    ("timeout_s = 900", "timeout_s = -0.0", 23, "tools.track.timeout_s", "seconds above 0"),
    ("tools.track]", "tools._track]", 21, "tools._track", "public method"),
    ("tools.track]", "tools.validate]", 21, "tools.validate", "own check"),
    ("tools.track]", 'tools."a b"]', 21, "tools.a b", "public method"),
    ("tools.track]", "tools.class]", 21, "tools.class", "public method"),
    ('"cv2.error"', '"cv2."', 24, "tools.track.rejects[1]", "not the name of an exception"),
    ('["ValueError", "cv2.error"]', '"ValueError"', 24, "tools.track.rejects", "must be an array"),
    ('"ValueError"', "5", 24, "tools.track.rejects[0]", "must be text in quotes, got 5"),
    ('"numpy"', '"opencv-python"', 6, "packages[0]", "cannot be an import name"),
    ('"numpy"', '"numpy>>2"', 6, "packages[0]", "not a name and a version"),
    ('"numpy"', "\"numpy; python_version > '3'\"", 6, "packages[0]", "not a name and a version"),
    ('"numpy"', "7", 6, "packages[0]", "must be text or a table, got 7"),
    ('"cv2",', '"cv 2",', 6, "packages[1].import", "not a module's name"),
    ("opencv-python-headless", "-r evil", 6, "packages[1].install", "not what pip takes"),
    ('"cv2",', '"cv2", version = "2",', 6, "packages[1].version", 'write ">=2.0"'),
    ('"models/detector.pt2"', '"../x.pt2"', 9, "models.detector", "leaves the plugin's folder"),
    ('"models/detector.pt2"', '"a/../../x.pt2"', 9, "models.detector", "leaves the plugin's folder"),
    ('"models/detector.pt2"', '"~/x.pt2"', 9, "models.detector", "write ${HOME}/x.pt2"),
    ('"models/detector.pt2"', '"${}/x"', 9, "models.detector", "not ${NAME}"),
    ('"models/detector.pt2"', '"a\\u0000b"', 9, "models.detector", "cannot be printed"),
    ('"models/detector.pt2"', "{ file = 1 }", 9, "models.detector", "text in quotes, got a table"),
    ("deep = 2.5", "deep = 99999999999999999999", 12, "settings", "more than 64 bits"),
]


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "words"), FAULTS, ids=[f"{f[3]}-{n}" for n, f in enumerate(FAULTS)]
)
def test_a_fault_is_named_with_file_line_key_and_next_step(
    folder: Path, old: str, new: str, line: int, key: str, words: str
) -> None:
    assert old in WHOLE
    text = WHOLE.replace("[limits]" if old == "limits" else old, new, 1)
    error = refusal(folder, text)
    assert f"plugin.toml, line {line}: key `{key}` " in error.reason
    assert words in error.reason
    assert ";" in error.reason or "?" in error.reason  # a next step follows the fact
    assert len(error.reason) < 600
    assert error.name == (None if key == "name" else "motion_tracker")
    assert isinstance(error, HoldfastError)


def test_a_manifest_without_tools_is_refused(folder: Path) -> None:
    assert "names no tool" in refusal(folder, MINIMAL.replace("[tools.run]", "")).reason
    assert "names no tool" in refusal(folder, MINIMAL.replace("[tools.run]", "[tools]")).reason
    assert "must be a table" in refusal(folder, MINIMAL.replace("[tools.run]", "[[tools]]")).reason


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        (b"", ", line 1: ", "the file is empty"),
        (b" \n\n", ", line 1: ", "the file is empty"),
        (b'name = "motion"\n\nversion = \n', ", line 3: ", "not valid TOML"),
        (b'name = "motion"\nversion = "1\n', ", line 2: ", "not valid TOML"),
        (b'name = "motion"\nname = "motion"\n', ", line 2: ", "Cannot overwrite a value"),
        (b'name = "motion"\n[tools', ", line 2: ", "not valid TOML"),
        (b'name = "motion"\nx = "\xff"\n', ", line 2: ", "byte 0xff is not UTF-8"),
        (b'name = "motion"\nx = ' + b"[" * 5000, ", line 2: ", f"more than {MAX_DEPTH} deep"),
        (b'name = "motion"\n' + b"a." * 500_000 + b"a=1", ", line 2: ", f"more than {MAX_DEPTH} deep"),
        (b'name = "motion"\nx = ' + b"9" * 5000, ", line 1: ", "not readable as TOML"),
        (b'name = "motion"\n' + b"#" * 1_100_000, "plugin.toml ", "is larger than 1048576 bytes"),
    ],
    ids=["empty", "blank", "no-value", "string", "twice", "header", "utf-8", "brackets", "dots", "digits", "huge"],
)
def test_what_is_no_toml_is_refused_at_its_line(folder: Path, text: bytes, place: str, words: str) -> None:
    error = refusal(folder, text)
    assert place in error.reason
    assert words in error.reason
    readable = text.strip() and b"\xff" not in text and len(text) < 1_100_000
    assert error.name == ("motion" if readable else None)


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "socket-like device", "dangling link", "loop"])
def test_a_manifest_that_is_no_file_is_refused_without_blocking(folder: Path, kind: str) -> None:
    path = folder / "plugin.toml"
    match kind:
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "socket-like device":
            path.symlink_to("/dev/zero")
        case "dangling link":
            path.symlink_to("nowhere")
        case "loop":
            path.symlink_to(path)
    with pytest.raises(ManifestInvalid) as caught:
        read_manifest(folder)
    assert str(path) in caught.value.reason
    assert caught.value.name is None


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without root's right to read everything, where the tests run as root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_manifest_without_permission_is_refused(folder: Path) -> None:
    (folder / "plugin.toml").write_text(MINIMAL)
    (folder / "plugin.toml").chmod(0)
    with (
        unprivileged(),
        pytest.raises(ManifestInvalid, match=r"cannot be read \(permission denied\); make it readable"),
    ):
        read_manifest(folder)


FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
FRAGMENTS = [
    *WHOLE.splitlines(keepends=True), '"""', "'''", "[[packages]]\n", "{", "}", "[", "]", "=", ".", ",",
    '"', "'", "\\", "\n", "#", "\u0000", "\ufeff", "é", "9" * 400, "-inf", "1979-05-27T07:32:00Z", "\\uD800",
    "[tools.", "a" * 300, "limits = ", "models.x = ",
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """WHOLE with pieces cut out and fragments put in."""
    text = WHOLE
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 30)))
        text = text[:start] + draw(st.sampled_from(FRAGMENTS)) + text[stop:]
    return text


def read_or_refuse(folder: Path, text: str | bytes) -> None:
    try:
        manifest = read(folder, text)
    except ManifestInvalid as error:
        reason = error.reason
    else:
        assert manifest.tools
        list(manifest.required_packages())
        return
    assert reason.isprintable()
    assert 0 < len(reason) < 2000


@FUZZ
@given(raw=st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda t: t.encode("utf-8", "replace"))))
@example(raw=b"\xff\xfe\x00")
@example(raw=b"\xef\xbb\xbfname = 1")
@example(raw=b"a = " + b"[" * 3000)
@example(raw=b"a = 1" + b"0" * 5000)
@example(raw=b"." * 300)
def test_any_bytes_give_a_manifest_or_a_refusal(folder: Path, raw: bytes) -> None:
    read_or_refuse(folder, raw)


@FUZZ
@given(text=st.one_of(mutated(), st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)))
@example(text='name = "a\\ud800"')
@example(text="[limits]\ntimeout_s = nan\nmemory_mib = 1e400\n")
@example(text="[limits]\nworkers = 99999999999999999999\n")
@example(text="tools = [1, 2]\n[tools.a]\n")
def test_any_mutation_gives_a_manifest_or_a_refusal_with_a_reason(folder: Path, text: str) -> None:
    read_or_refuse(folder, text)


def paths_in(value: Any, at: KeyPath = ()) -> Iterator[KeyPath]:
    if at:
        yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths_in(child, (*at, key))


@FUZZ
@given(text=st.one_of(mutated(), st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)))
@example(text='a = """x""y"""""\n[b."c.d".\'e\']\nf.g = { h = [ 1, { i = 2 } ], "\\u00e9" = 3 }\n')
@example(text="[[a]]\nb = 1\n[[a]]\n[a.c]\nd = 2\n[[a.e]]\nf = 1\n[[a.e]]\n[g]\n")
@example(text="a = [ # comment ]\n1, # more\n'''\n]\n''',\n]\nb = 1979-05-27 07:32:00\n")
def test_the_line_of_every_key_is_known_for_all_valid_toml(text: str) -> None:
    """The scanner that finds lines and `tomllib` see the same keys, so neither bound can be evaded."""
    try:
        data = tomllib.loads(text)
    except ValueError:
        return
    lines = key_lines(text.replace("\r\n", "\n"))
    assert set(paths_in(data)) == set(lines)


def test_the_line_is_where_the_key_stands() -> None:
    text = '[a]\nb = """\n[not]\n"""\nc = [\n 1,\n {d = 2},\n]\n[[e]]\nf = 1\n[[e]]\nf = 2\n'
    lines = key_lines(text)
    found = {path: lines[path] for path in [("a",), ("a", "b"), ("a", "c", 1, "d"), ("e", 0, "f"), ("e", 1, "f")]}
    assert list(found.values()) == [1, 2, 7, 10, 12]


def test_nesting_is_bounded_before_tomllib_sees_it() -> None:
    assert key_lines(".".join("a" * MAX_DEPTH) + " = 1")
    with pytest.raises(TooDeep):
        key_lines(".".join("a" * (MAX_DEPTH + 1)) + " = 1")
