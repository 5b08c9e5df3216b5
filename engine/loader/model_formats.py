"""Formats of model files as a table: what their first 16 bytes are, and which extensions promise them.

A file whose extension is in the table must be of a format listed for it: a `.pt2` that is JSON is a saved
error message, not a model. A file of any other extension may hold anything (raw weights have no mark),
apart from what is never a model: a pointer, a web page, zeros.
"""

from __future__ import annotations

import re
from typing import NamedTuple

HEAD_BYTES = 16
"""What a format is recognised by. Nothing shorter is a model."""


class Format(NamedTuple):
    """`mark` is matched at the start of the file; `extensions` are those that promise this format."""

    name: str
    mark: re.Pattern[bytes]
    extensions: frozenset[str]


def _format(name: str, mark: bytes, extensions: str) -> Format:
    return Format(name, re.compile(mark, re.DOTALL), frozenset(extensions.split()))


ZIP = "zip archive"
SAFETENSORS = "safetensors"

_TEXT = (
    rb"(?:[\t\n\r\x20-\x7e]|[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3})+"
    rb"[\x80-\xf4]{0,3}\Z"  # a character may be cut at the 16th byte
)

FORMATS = (
    # PKWARE APPNOTE 4.3.7, local file header. torch.save since 1.6, torch.export, TorchScript, Keras 3, npz.
    _format(ZIP, rb"PK\x03\x04", ".pt2 .pt .pth .ptl .torchscript .keras .npz .pkl .joblib"),
    # huggingface/safetensors README, "Format": u64 little-endian header length (at most 100 MB), then JSON.
    _format(SAFETENSORS, rb".{4}\x00{4}\{", ".safetensors"),
    # ggml docs/gguf.md: magic "GGUF", u32 version.
    _format("GGUF", rb"GGUF", ".gguf"),
    # onnx/onnx.proto3, ModelProto, fields in order as protobuf writers emit them: ir_version (tag 0x08, a
    # small varint), then one of producer_name, producer_version, domain, model_version, doc_string, graph,
    # opset_import, metadata_props, training_info, functions.
    _format("ONNX", rb"\x08[\x01-\x7f](?:[\x12\x1a\x22\x28\x32\x3a\x42\x72]|[\xa2\xca]\x01)", ".onnx"),
    # HDF5 file format specification, superblock signature. Keras 2, h5py.
    _format("HDF5", rb"\x89HDF\r\n\x1a\n", ".h5 .hdf5 .keras"),
    # tensorflow/lite/schema/schema.fbs: file_identifier "TFL3", after the flatbuffer's root offset.
    _format("TFLite", rb".{4}TFL3", ".tflite"),
    # Python pickletools, PROTO opcode, protocols 2 to 5. torch.save before 1.6, scikit-learn, joblib.
    _format("pickle", rb"\x80[\x02-\x05]", ".pt .pth .pkl .pickle .joblib"),
    # RFC 1950 and RFC 1952: joblib.dump(compress=…).
    _format("compressed pickle", rb"\x78[\x01\x5e\x9c\xda]|\x1f\x8b\x08", ".pkl .pickle .joblib"),
    # numpy.lib.format: magic, then the format's major version.
    _format("NumPy array", rb"\x93NUMPY[\x01-\x03]", ".npy"),
    # Undocumented by NVIDIA; as lutzroeder/netron, source/tensorrt.js tells them: "ftrt" or, older, "ptrt",
    # possibly after a u32 length and JSON metadata, as Ultralytics exports it.
    _format("TensorRT engine", rb"[fp]trt|.{3}\x00\{", ".engine .plan .trt"),
    # caffe.proto, NetParameter: name (tag 0x0a), or else layers (field 2) or layer (field 100).
    _format("Caffe weights", rb"\x0a|\x12|\xa2\x06", ".caffemodel"),
    # tensorflow graph.proto, GraphDef.node (tag 0x0a); saved_model.proto, schema version 1, a meta graph.
    _format("TensorFlow graph", rb"\x0a|\x08\x01\x12", ".pb"),
    # AlexeyAB/darknet src/parser.c, load_weights_upto: int32 major 0, minor 1 to 3, revision, images seen.
    _format("Darknet weights", rb"\x00{4}[\x01-\x03]\x00{3}[\x00-\x09]\x00{3}", ".weights"),
    # XML 1.0: OpenCV cascades, OpenVINO topologies; the declaration is optional.
    _format("XML", rb"(?:\xef\xbb\xbf)?\s*<[?!a-zA-Z]", ".xml"),
    # RFC 8259 text that is an object or an array.
    _format("JSON", rb"(?:\xef\xbb\xbf)?\s*[{\[]", ".json"),
    # OpenCV FileStorage, Caffe prototxt, Darknet configurations, class lists: UTF-8, no control characters.
    _format("text", _TEXT, ".yaml .yml .prototxt .pbtxt .cfg .txt .names"),
)

LFS_POINTER = re.compile(rb"version https://git-lfs")  # git-lfs docs/spec.md: the pointer's first line
WEB_PAGE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*|<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b",
    re.IGNORECASE | re.DOTALL,
)
STORE_ERROR = re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?<Error>\s*<Code>([A-Za-z]+)")  # S3 REST API, error responses


def format_of(head: bytes, extension: str = "") -> Format | None:
    """The format that a file's first 16 bytes are of, preferring one that its extension promises."""
    matching = [entry for entry in FORMATS if entry.mark.match(head)]
    return next((entry for entry in matching if extension in entry.extensions), matching[0] if matching else None)


def promised(extension: str) -> list[str]:
    """Names of the formats that an extension (lower case, with its dot) promises; none if it is not known."""
    return [entry.name for entry in FORMATS if extension in entry.extensions]
