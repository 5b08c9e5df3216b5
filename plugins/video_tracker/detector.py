"""A detector from a file: picture in, boxes with scores and classes out.

image (H, W, 3) uint8 BGR → letterbox → (1, 3, S, S) float32 RGB in 0..1 → model
  → decode → boxes (N, 4), scores (N, C) → best class → suppression → boxes of the image
"""

import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from suppression import suppress
from torch import Tensor
from torch.export.passes import move_to_device_pass

Image = NDArray[np.uint8]

# Suppression compares every pair, so only the best boxes of a crowded picture take part.
MAX_CANDIDATES = 1024
# The grey around a letterboxed picture: YOLOv5's, which its successors are trained with too.
PADDING = 114


class ModelOutputError(RuntimeError):
    """The model answers with something that is no list of boxes: its file or settings are wrong."""


@dataclass(frozen=True, slots=True)
class Detections:
    """`boxes` (N, 4) float32 x1, y1, x2, y2 in pixels, `scores` (N,) float32, `labels` (N,) int64."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]


class Detector:
    """The model in `path`, on `device`, for square inputs of `input_px`, a whole image at a time.

    `classes` is the number of classes, or 0 to take it from the output's shape. Torch's own errors
    for a file that it cannot load, or a device that does not work, are left as they are.
    """

    def __init__(self, path: Path, device: str, input_px: int, classes: int = 0) -> None:
        self._device = torch.device(device)
        self._input_px = input_px
        self._classes = classes
        self._model = load_model(path, self._device)

    @torch.inference_mode()
    def detect(self, image: Image, min_score: float, max_overlap: float) -> Detections:
        """Objects with a score of `min_score` or more; none overlaps a better one of its class by
        more than `max_overlap` (IoU). Raises `ModelOutputError`."""
        height, width = image.shape[:2]
        boxed, scale, left, top = letterbox(image, self._input_px)
        pixels = torch.from_numpy(boxed).to(self._device)
        batch = pixels.flip(-1).permute(2, 0, 1)[None].to(torch.float32) / 255
        boxes, scores = decode(self._model(batch), self._classes)
        best, labels = scores.max(dim=1)
        best, found = best.topk(min(MAX_CANDIDATES, len(best)))
        found = found[best >= min_score]
        boxes, best, labels = boxes[found].float(), scores[found].amax(dim=1).float(), labels[found]
        kept = suppress(boxes, best, labels, max_overlap)
        offset = torch.tensor([left, top, left, top], device=self._device)
        limit = torch.tensor([width, height, width, height], device=self._device)
        boxes = ((boxes[kept] - offset) / scale).clamp(min=0).minimum(limit)
        return Detections(
            boxes.cpu().numpy().astype(np.float32),
            best[kept].cpu().numpy().astype(np.float32),
            labels[kept].cpu().numpy().astype(np.int64),
        )


def load_model(path: Path, device: torch.device) -> Callable[[Tensor], Any]:
    """A model from `torch.export.save` (.pt2) or `torch.jit.save`, told apart by content.

    Both are zip files; only TorchScript holds a folder `code/`.
    """
    with zipfile.ZipFile(path) as archive:
        is_torchscript = any("/code/" in name for name in archive.namelist())
    if is_torchscript:
        with warnings.catch_warnings():
            # Deprecated in favour of torch.export; many models still come this way.
            warnings.simplefilter("ignore", DeprecationWarning)
            scripted: torch.jit.ScriptModule = torch.jit.load(path, map_location=device)  # type: ignore[no-untyped-call]
        return scripted.eval()
    with path.open("rb") as file:
        program = torch.export.load(file)
    return move_to_device_pass(program, device).module()


def letterbox(image: Image, side: int) -> tuple[Image, float, int, int]:
    """Fit an image (H, W, 3) into a square: (side, side, 3), the scale, and the left and top margins.

    The shape is kept; what is left over is `PADDING`, half on each side, as YOLOv5's `letterbox`
    does. A point x, y of the image is at x * scale + left, y * scale + top.
    """
    height, width = image.shape[:2]
    scale = side / max(height, width)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    shrunk = cv2.resize(image, inner, interpolation=cv2.INTER_LINEAR)
    left, top = (side - inner[0]) // 2, (side - inner[1]) // 2
    square = np.full((side, side, 3), PADDING, np.uint8)
    square[top : top + inner[1], left : left + inner[0]] = shrunk
    return square, scale, left, top


def decode(output: object, classes: int = 0) -> tuple[Tensor, Tensor]:
    """A model's output as boxes (N, 4) x1, y1, x2, y2 in input pixels and scores (N, C) in 0..1.

    Accepted, for a batch of one image:

    - one tensor (1, 4 + C, N): rows cx, cy, w, h in input pixels, then a score per class. This is
      what YOLOv8 and its successors export (Ultralytics, "Detect" head);
    - the same transposed, (1, N, 4 + C). With `classes` given the axis of 4 + `classes` holds the
      rows, else the shorter one;
    - two tensors: boxes (1, N, 4) x1, y1, x2, y2 in input pixels, scores (1, N, C).

    Scores are taken as probabilities: a sigmoid belongs into the model. Raises `ModelOutputError`
    for anything else, naming the shapes that came.
    """
    parts = list(output) if isinstance(output, Sequence) else [output]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(tensors) == len(parts) == 1:
        found = _decode_yolo(tensors[0], classes)
    elif len(tensors) == len(parts) == 2:
        found = _decode_pair(tensors[0], tensors[1], classes)
    else:
        found = None
    if found is None:
        width = f"4 + {classes}" if classes else "4 + classes"
        came = f"shapes {shapes}" if tensors else f"a {type(output).__name__} without tensors"
        raise ModelOutputError(
            f"the detector's output has {came}; it has to be one tensor (1, {width}, N) or "
            f"(1, N, {width}), or boxes (1, N, 4) and scores (1, N, {classes or 'classes'}); export "
            "it without other heads and make `labels` in the settings match its classes"
        )
    return found


def _decode_yolo(output: Tensor, classes: int) -> tuple[Tensor, Tensor] | None:
    if output.ndim != 3 or output.shape[0] != 1:
        return None
    rows, columns = output.shape[1:]
    wanted = 4 + classes if classes else min(rows, columns)
    if wanted < 5 or wanted not in (rows, columns):
        return None
    table = output[0].T if wanted == rows else output[0]  # (N, 4 + C)
    centre, half = table[:, :2], table[:, 2:4] / 2
    return torch.cat([centre - half, centre + half], dim=1), table[:, 4:]


def _decode_pair(boxes: Tensor, scores: Tensor, classes: int) -> tuple[Tensor, Tensor] | None:
    if boxes.ndim != 3 or scores.ndim != 3 or boxes.shape[::2] != (1, 4):
        return None
    if scores.shape[:2] != boxes.shape[:2] or scores.shape[2] != (classes or scores.shape[2]):
        return None
    return (boxes[0], scores[0]) if scores.shape[2] else None
