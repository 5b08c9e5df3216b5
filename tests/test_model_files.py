"""Model files: what each fault is called, and that no file can block or break the check."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.loader.manifest import Manifest
from engine.loader.model_files import check_models, resolve_models
from engine.loader.model_formats import FORMATS, HEAD_BYTES


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"weights" * 50)
        archive.writestr("archive/version", b"3")
    return buffer.getvalue()


def safetensors(data: int = 64, header: bytes | None = None) -> bytes:
    tensor = {"dtype": "F32", "shape": [data // 4], "data_offsets": [0, data]}
    raw = json.dumps({"__metadata__": {"a": "b"}, "w": tensor}).encode() if header is None else header
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def manifest(**models: str) -> Manifest:
    return Manifest(name="p", version="1", entry="p:P", models=models)


def verdict(folder: Path, file: str, env: dict[str, str] | None = None) -> tuple[str, str]:
    """Code and reason of the one finding; two empty texts if there is none."""
    findings = check_models(manifest(m=file), folder, env)
    assert len(findings) <= 1
    for finding in findings:
        assert finding.check == "models"
        assert finding.reason.startswith("model `m` ")
        assert finding.reason.isprintable()
        return finding.reason_code.value, finding.reason
    return "", ""


def content(folder: Path, name: str, data: bytes) -> tuple[str, str]:
    (folder / name).write_bytes(data)
    code, reason = verdict(folder, name)
    if code:
        assert str(folder / name) in reason
        assert ";" in reason
    return code, reason


PAD = bytes(range(1, 64))

GOOD: dict[str, bytes] = {
    "a.pt2": zipped(),
    "a.pt": zipped(),
    "a.PTH": zipped(),
    "a.keras": zipped(),
    "a.npz": zipped(),
    "old.pt": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + PAD,
    "a.pkl": pickle.dumps(list(range(20)), protocol=4),
    "b.joblib": gzip.compress(PAD),
    "a.safetensors": safetensors(),
    "none.safetensors": safetensors(0),
    "a.gguf": b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + PAD,
    "a.onnx": b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x80" + PAD,
    "b.onnx": b"\x08\x0a:\x80\x01" + PAD,
    "a.h5": b"\x89HDF\r\n\x1a\n" + PAD,
    "a.tflite": b"\x1c\x00\x00\x00TFL3" + PAD,
    "a.npy": b"\x93NUMPY\x01\x00v\x00" + PAD,
    "a.engine": b"ftrt" + PAD,
    "b.engine": struct.pack("<I", 300) + b'{"imgsz": 640' + PAD,
    "a.caffemodel": b"\x0a\x09CaffeNet\xa2\x06" + PAD,
    "a.pb": b"\x0a\x3a\n\x05input" + PAD,
    "saved_model.pb": b"\x08\x01\x12\x80\x01" + PAD,
    "yolo.weights": struct.pack("<iiiq", 0, 2, 5, 32013312) + PAD,
    "cascade.xml": b'<?xml version="1.0"?>\n<opencv_storage>\n<cascade></cascade></opencv_storage>',
    "net.xml": b'<net name="x" version="11"><layers></layers></net>',
    "a.json": b' {"learner": {"attributes": {}}}',
    "a.yaml": b"%YAML:1.0\n---\nopencv_ml_svm:\n   format: 3\n",
    "yolo.cfg": b"[net]\nbatch=64\nsubdivisions=16\n",
    "deploy.prototxt": b'name: "CaffeNet"\nlayer {\n}\n',
    "coco.names": b"person\nbicycle\ncar\nmotorbike\n",
    "raw.bin": os.urandom(8) + PAD,  # no mark, and an extension that promises none
    "none": b"\xff" * 16,
    "zip.unknown": zipped(),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_sound_file_gives_no_finding(tmp_path: Path, name: str) -> None:
    assert content(tmp_path, name, GOOD[name]) == ("", "")


def test_every_format_of_the_table_is_tried() -> None:
    heads = [data[:HEAD_BYTES] for data in GOOD.values()]
    assert [entry.name for entry in FORMATS if not any(map(entry.mark.match, heads))] == []
    promised = {extension for entry in FORMATS for extension in entry.extensions}
    assert all(extension.startswith(".") and extension == extension.lower() for extension in promised)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
S3 = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>'

BAD: dict[str, tuple[str, bytes, str]] = {
    "lfs": ("a.pt2", LFS, "is a Git LFS pointer, not the file itself"),
    "lfs-unknown": ("a.bin", LFS, "; run `git lfs pull`"),
    "lfs-text": ("a.txt", LFS, "is a Git LFS pointer"),
    "empty": ("a.pt2", b"", "is empty"),
    "empty-unknown": ("a.bin", b"", "is empty"),
    "short": ("a.bin", b"\x80\x02" * 7 + b"x", "is 15 bytes long, too short for a model"),
    "zeros": ("a.pt2", bytes(4096), "begins with zeros"),
    "zeros-unknown": ("a.bin", bytes(4096), "begins with zeros"),
    "html": ("a.pt2", b"<!DOCTYPE html>\n<html><body>404</body></html>", "is a web page (HTML)"),
    "html-unknown": ("a.bin", b"\n\n <HTML lang='en'>Sign in</HTML>", "is a web page (HTML)"),
    "html-comment": ("a.xml", b"<!-- x -->\n<!-- y -->\n<html></html>   ", "is a web page (HTML)"),
    "xhtml": ("a.xml", b"<?xml version='1.0'?>\n<!DOCTYPE html PUBLIC>", "is a web page (HTML)"),
    "s3": ("a.xml", S3, "is a file store's error message (AccessDenied)"),
    "json-error": ("a.pt2", b'{"error": "Not Found"}', "is JSON, but a .pt2 file is zip archive"),
    "text": ("a.pt2", b"Repository not found.", "is text, but a .pt2 file is zip archive"),
    "noise": ("a.pt", b"\xde\xad\xbe\xef" * 8, "begins with de ad be ef de ad be ef, but a .pt file is"),
    "other": ("a.onnx", zipped(), "is zip archive, but a .onnx file is ONNX"),
    "zip-cut": ("a.pt2", zipped()[:-30], "is a zip archive cut short"),
    "zip-half": ("a.unknown", zipped()[: len(zipped()) // 2], "is a zip archive cut short"),
    "zip-more": ("a.pt2", zipped() + b"tail", "bytes by its own account, but has"),
    "zip-hole": ("a.pt2", zipped()[:40] + zipped()[60:], "is a damaged zip archive"),
    "st-cut": ("a.safetensors", safetensors()[:-1], "bytes by its own account, but has"),
    "st-more": ("a.safetensors", safetensors() + b"x", "bytes by its own account, but has"),
    "st-header-cut": ("a.safetensors", safetensors()[:40], "its header ends at byte"),
    "st-json": ("a.safetensors", safetensors(header=b'{"w": {"dtype": "F32"'), "with a damaged header"),
    "st-offsets": ("a.safetensors", safetensors(header=b'{"w": {"dtype": "F32"}}'), "with a damaged header"),
    "st-utf8": ("a.safetensors", safetensors(header=b'{"\xff": 1        }'), "with a damaged header"),
    "st-huge": ("a.safetensors", b"\x01\xe1\xf5\x05\x00\x00\x00\x00{" + PAD, "is more than its loader takes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_whole_model_is_corrupt_with_the_exact_fact(tmp_path: Path, case: str) -> None:
    name, data, words = BAD[case]
    code, reason = content(tmp_path, name, data)
    assert code == "model_corrupt"
    assert words in reason


def test_a_zip64_archive_is_read_by_its_own_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)  # makes zipfile write what 65536 entries would
    data = zipped()
    assert b"PK\x06\x06" in data
    data = data[:-6] + b"\xff" * 4 + data[-2:]  # "the directory's offset is in the zip64 record"
    assert content(tmp_path, "a.pt2", data) == ("", "")
    assert content(tmp_path, "a.pt2", data.replace(b"PK\x06\x06", b"PK\x06\x00"))[0] == "model_corrupt"
    assert content(tmp_path, "a.pt2", data[:40] + data[60:])[0] == "model_corrupt"


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    assert verdict(tmp_path, "models/a.pt2") == (
        "model_missing",
        f"model `m` is missing: {tmp_path}/models/a.pt2; put the file there, or correct the path in plugin.toml",
    )
    (tmp_path / "file").write_bytes(PAD)
    assert verdict(tmp_path, "file/a.pt2")[0] == "model_missing"
    (tmp_path / "link.pt2").symlink_to("nowhere.pt2")
    code, reason = verdict(tmp_path, "link.pt2")
    assert code == "model_missing"
    assert "is a link to nowhere.pt2, which does not exist" in reason


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "directory": (Path.mkdir, "is a directory, not a file"),
    "pipe": (os.mkfifo, "is a named pipe, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a character device, not a file"),
    "loop": (lambda path: path.symlink_to(path), "too many levels of symbolic links"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_file_is_unreadable_and_does_not_block(tmp_path: Path, kind: str) -> None:
    make, words = UNREADABLE[kind]
    make(tmp_path / "a.pt2")
    code, reason = verdict(tmp_path, "a.pt2")
    assert (code, words in reason) == ("model_unreadable", True)


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


def test_a_file_without_permission_is_unreadable() -> None:
    with TemporaryDirectory() as name:  # one that another user may reach; pytest's own are private
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "a.pt2").write_bytes(zipped())
        (folder / "a.pt2").chmod(0)
        with unprivileged():
            code, reason = verdict(folder, "a.pt2")
    assert code == "model_unreadable"
    assert "cannot be read (permission denied)" in reason
    assert "make it readable for the engine's user" in reason


def test_a_path_that_no_file_can_have_is_unreadable(tmp_path: Path) -> None:
    assert verdict(tmp_path, "a" * 300)[0] == "model_unreadable"
    assert verdict(tmp_path, "${X}", {"X": "a\0b"})[0] == "model_unreadable"


def test_paths_are_relative_to_the_folder_or_absolute_or_have_variables(tmp_path: Path) -> None:
    models = manifest(
        relative="models/a.pt2", absolute="/m/a.pt2", whole="${FILE}", part="${DIR}/x/${NAME}.pt2",
        inside="${NAME}/../b.bin", unset="${NOT_SET}/a.pt2", out="${UP}/a.pt2",
    )  # fmt: skip
    env = {"FILE": "/m/b.pt2", "DIR": "/m", "NAME": "n", "UP": ".."}
    assert resolve_models(models, tmp_path, env) == {
        "relative": tmp_path / "models/a.pt2",
        "absolute": Path("/m/a.pt2"),
        "whole": Path("/m/b.pt2"),
        "part": Path("/m/x/n.pt2"),
        "inside": tmp_path / "n/../b.bin",
    }


def test_a_variable_comes_from_the_engines_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODELS", str(tmp_path))
    (tmp_path / "a.pt2").write_bytes(zipped())
    assert verdict(Path("/nowhere"), "${HF_MODELS}/a.pt2") == ("", "")


@pytest.mark.parametrize("env", [{}, {"HF_MODELS": ""}])
def test_a_variable_that_is_not_set_is_named(tmp_path: Path, env: dict[str, str]) -> None:
    code, reason = verdict(tmp_path, "${HF_MODELS}/a.pt2", env)
    assert code == "model_missing"
    assert "the variable HF_MODELS is not set; set it in the engine's environment" in reason


def test_a_variable_does_not_lead_a_relative_path_out_of_the_folder(tmp_path: Path) -> None:
    code, reason = verdict(tmp_path, "${UP}/a.pt2", {"UP": "../.."})
    assert code == "model_unreadable"
    assert "leaves the plugin's folder; use an absolute path" in reason


def test_each_model_has_its_own_finding_in_the_manifests_order(tmp_path: Path) -> None:
    (tmp_path / "b.pt2").write_bytes(LFS)
    (tmp_path / "c.pt2").write_bytes(zipped())
    findings = check_models(manifest(a="a.pt2", b="b.pt2", c="c.pt2"), tmp_path)
    assert [(finding.reason_code.value, finding.reason[:9]) for finding in findings] == [
        ("model_missing", "model `a`"),
        ("model_corrupt", "model `b`"),
    ]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["a.pt2", "a.safetensors", "a.onnx", "a.engine", "a.bin"]),
    start=st.sampled_from([b"", b"PK\x03\x04", b"PK\x05\x06", b"\x40\0\0\0\0\0\0\0{", b"<"]),
    data=st.binary(max_size=120),
    end=st.sampled_from([b"", zipped()[-22:], zipped()[-60:], b"PK\x06\x07" + b"\xff" * 38]),
)
@example(name="a.pt2", start=b"PK\x03\x04", data=b"", end=b"PK\x05\x06" + b"\xff" * 16 + b"\0\0")
def test_no_content_whatever_raises(tmp_path: Path, name: str, start: bytes, data: bytes, end: bytes) -> None:
    content(tmp_path, name, start + data + end)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, len(zipped()) - 1))
def test_a_zip_cut_anywhere_is_corrupt(tmp_path: Path, cut: int) -> None:
    assert content(tmp_path, "a.pt2", zipped()[:cut])[0] == "model_corrupt"
    data = safetensors()
    assert content(tmp_path, "a.safetensors", data[: cut % len(data)])[0] == "model_corrupt"
