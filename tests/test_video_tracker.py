"""The plugin `video_tracker`, without the engine and on the CPU, with a model made and exported here.

The model finds the bounding box of what is red (class 0) and of what is cyan (class 1).
"""

import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from clips import PLUGINS, Mover, context, draw, draw_clip, encode, load_plugin
from torch import Tensor

SIDE = 160  # the model's input; clips are 320 x 240, so that the letterbox both shrinks and pads
RED = Mover((20, 100), (6, 0), colour=(40, 40, 220))
CYAN = Mover((250, 110), (-5, 0), colour=(220, 200, 40))


class ColourBoxes(torch.nn.Module):
    """(1, 3, SIDE, SIDE) RGB in 0..1 → (1, 4 + 2, 8): four boxes per class, three of them worse twins."""

    def forward(self, image: Tensor) -> Tensor:
        red, blue = image[0, 0], image[0, 2]
        found = torch.cat([self.box(red - blue > 0.3, 0), self.box(blue - red > 0.3, 1)], dim=1)
        return found[None]

    def box(self, mask: Tensor, label: int) -> Tensor:
        places = torch.arange(SIDE, dtype=torch.float32)
        columns, rows = mask.any(dim=0), mask.any(dim=1)
        x1, x2 = self.ends(columns, places)
        y1, y2 = self.ends(rows, places)
        score = mask.any().float() * 0.9
        best = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
        scores = torch.stack([score * float(label == 0), score * float(label == 1)])
        better = torch.cat([best, scores])
        worse = torch.cat([best + 1, scores * 0.8])
        return torch.stack([better, worse, worse, worse], dim=1)

    def ends(self, line: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.where(line, places, torch.full_like(places, SIDE)).amin()
        last = torch.where(line, places, torch.zeros_like(places)).amax()
        return first, last + 1


class Pair(ColourBoxes):
    """The same as two tensors: boxes (1, 8, 4) x1, y1, x2, y2 and scores (1, 8, 2)."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        table = super().forward(image)[0].T
        centre, half = table[:, :2], table[:, 2:4] / 2
        return torch.cat([centre - half, centre + half], dim=1)[None], table[None, :, 4:]


class Wrong(torch.nn.Module):
    """A classifier, not a detector: (1, 10)."""

    def forward(self, image: Tensor) -> Tensor:
        return image.mean().repeat(1, 10)


def export(model: torch.nn.Module, path: Path) -> Path:
    torch.export.save(torch.export.export(model.eval(), (torch.rand(1, 3, SIDE, SIDE),)), path)
    return path


def trace(model: torch.nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is; it is still accepted
        torch.jit.trace(model.eval(), torch.rand(1, 3, SIDE, SIDE)).save(path)  # type: ignore[no-untyped-call]
    return path


@pytest.fixture(scope="module")
def plugin() -> Any:
    return load_plugin("video_tracker")


@pytest.fixture(scope="module")
def detector() -> Any:
    return load_plugin("video_tracker", "detector")


@pytest.fixture(scope="module")
def suppression() -> Any:
    return load_plugin("video_tracker", "suppression")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(ColourBoxes(), tmp_path_factory.mktemp("models") / "detector.pt2")


def build(plugin: Any, model: Path, scratch: Path, **settings: object) -> Any:
    settings = {"device": "cpu", "input_px": SIDE, "labels": ["red", "cyan"], **settings}
    return plugin.VideoTracker(context(scratch, {"detector": model}, **settings))


@pytest.fixture
def tracker(plugin: Any, exported: Path, tmp_path: Path) -> Any:
    return build(plugin, exported, tmp_path)


def quiet(done: int, total: int) -> None:
    """A `progress` that nobody watches."""


def assert_finds_both(tracker: Any) -> None:
    tracker.validate()
    found = tracker.detect(encode(draw([RED, CYAN], 0), ".png"))
    assert (found["width"], found["height"]) == (320, 240)
    assert sorted(each["label"] for each in found["objects"]) == ["cyan", "red"]
    for each in found["objects"]:
        assert each["score"] == pytest.approx(0.9)
        expected = (RED if each["label"] == "red" else CYAN).box(0)
        assert each["box"] == pytest.approx(expected, abs=4)


def test_exported_program_finds_objects_in_pixels_of_the_image(tracker: Any) -> None:
    assert_finds_both(tracker)


def test_torchscript_finds_the_same_whatever_its_file_is_called(plugin: Any, tmp_path: Path) -> None:
    assert_finds_both(build(plugin, trace(ColourBoxes(), tmp_path / "detector.pt2"), tmp_path))


def test_exported_program_loads_whatever_its_file_is_called(plugin: Any, exported: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "weights.bin"
    renamed.write_bytes(exported.read_bytes())
    assert_finds_both(build(plugin, renamed, tmp_path))


def test_boxes_and_scores_as_two_tensors_find_the_same(plugin: Any, tmp_path: Path) -> None:
    assert_finds_both(build(plugin, export(Pair(), tmp_path / "pair.pt2"), tmp_path))


def test_without_labels_classes_are_numbered(plugin: Any, exported: Path, tmp_path: Path) -> None:
    found = build(plugin, exported, tmp_path, labels=[]).detect(encode(draw([CYAN], 0), ".png"))
    assert [each["label"] for each in found["objects"]] == ["1"]


def test_image_without_objects_gives_none(tracker: Any) -> None:
    assert tracker.detect(encode(draw([], 0)))["objects"] == []


def test_tracks_keep_their_ids_and_labels_through_a_crossing(tracker: Any, tmp_path: Path) -> None:
    clip = draw_clip(tmp_path / "crossing.avi", [RED, CYAN], 40)
    boxes: dict[str, dict[int, tuple[int, list[float]]]] = defaultdict(dict)
    reports: list[tuple[int, int]] = []
    for item in tracker.track(clip, progress=lambda done, total: reports.append((done, total))):
        for track in item["tracks"]:
            boxes[track["label"]][item["frame"]] = (track["id"], track["box"])
    assert reports[-1] == (40, 40)
    for label, mover in (("red", RED), ("cyan", CYAN)):
        assert len({identity for identity, _ in boxes[label].values()}) == 1
        assert len(boxes[label]) >= 25
        assert boxes[label][5][1] == pytest.approx(mover.box(5), abs=4)
    assert boxes["red"][5][0] != boxes["cyan"][5][0]


def test_output_that_is_no_list_of_boxes_fails_validation(plugin: Any, tmp_path: Path) -> None:
    wrong = build(plugin, export(Wrong(), tmp_path / "wrong.pt2"), tmp_path)
    with pytest.raises(RuntimeError, match=r"shapes \[\(1, 10\)\]; it has to be one tensor \(1, 4 \+ 2, N\)"):
        wrong.validate()


def test_labels_that_do_not_fit_the_model_fail_validation(plugin: Any, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="make `labels` in the settings match"):
        build(plugin, exported, tmp_path, labels=["red", "cyan", "blue"]).validate()


def test_a_wrong_model_is_not_the_callers_fault(detector: Any) -> None:
    assert not issubclass(detector.ModelOutputError, (ValueError, cv2.error))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a working GPU")
def test_device_that_does_not_work_raises_torchs_own_error(plugin: Any, exported: Path, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|cuda|NVIDIA"):
        build(plugin, exported, tmp_path, device="cuda").validate()


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_yolo_layout_is_decoded_in_both_orientations(detector: Any, classes: int, transposed: bool) -> None:
    table = torch.zeros(1, 7, 20)
    table[0, :, 11] = torch.tensor([50.0, 40.0, 20.0, 10.0, 0.1, 0.7, 0.2])
    boxes, scores = detector.decode(table.mT if transposed else table, classes)
    assert (tuple(boxes.shape), tuple(scores.shape)) == ((20, 4), (20, 3))
    assert boxes[11].tolist() == [40.0, 35.0, 60.0, 45.0]
    assert scores[11].tolist() == pytest.approx([0.1, 0.7, 0.2])


@pytest.mark.parametrize(
    "output",
    [
        torch.zeros(2, 6, 100),
        torch.zeros(1, 4, 100),
        torch.zeros(6, 100),
        (torch.zeros(1, 100, 4), torch.zeros(1, 99, 2)),
        (torch.zeros(1, 6, 100), torch.zeros(1, 6, 50), torch.zeros(1, 6, 25)),
        {"boxes": torch.zeros(1, 100, 4)},
        None,
    ],
    ids=["batch_of_two", "no_classes", "no_batch", "unequal_pair", "three_heads", "a_dict", "none"],
)
def test_other_outputs_are_refused(detector: Any, output: object) -> None:
    with pytest.raises(detector.ModelOutputError, match="it has to be one tensor"):
        detector.decode(output)


def test_letterbox_keeps_the_shape_and_centres_the_image(detector: Any) -> None:
    image = np.full((100, 400, 3), 255, np.uint8)
    square, scale, left, top = detector.letterbox(image, 200)
    assert (square.shape, scale, left, top) == ((200, 200, 3), 0.5, 0, 75)
    assert (square[75:125] == 255).all()
    assert (square[:75] == 114).all()
    assert (square[125:] == 114).all()


def greedy(boxes: Tensor, scores: Tensor, labels: Tensor, max_overlap: float, overlaps: Any) -> list[int]:
    """The textbook method, one box at a time."""
    shares = overlaps(boxes)
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if all(labels[i] != labels[j] or shares[i, j] <= max_overlap for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("seed", range(10))
def test_suppression_equals_the_greedy_method(suppression: Any, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    near = torch.rand(200, 2, generator=random) * 100
    boxes = torch.cat([near, near + 10 + torch.rand(200, 2, generator=random) * 30], dim=1)
    scores = torch.rand(200, generator=random)
    labels = torch.randint(0, 3, (200,), generator=random)
    kept = suppression.suppress(boxes, scores, labels, 0.4).tolist()
    assert kept == greedy(boxes, scores, labels, 0.4, suppression.overlaps)
    assert 0 < len(kept) < 200


def test_suppression_of_nothing_is_nothing(suppression: Any) -> None:
    none = torch.zeros(0)
    assert suppression.suppress(torch.zeros(0, 4), none, none.long(), 0.5).tolist() == []


def test_bad_input_is_refused(tracker: Any, tmp_path: Path) -> None:
    letter = tmp_path / "letter.mp4"
    letter.write_text("this is no video")
    with pytest.raises(ValueError, match="cannot be opened as a video"):
        list(tracker.track(letter, progress=quiet))
    with pytest.raises(ValueError, match="no image that OpenCV can decode"):
        tracker.detect(b"this is no image")
    with pytest.raises(ValueError, match="min_score is 2"):
        tracker.detect(encode(draw([], 0)), min_score=2)
    with pytest.raises(ValueError, match="max_overlap is -1"):
        list(tracker.track(letter, max_overlap=-1, progress=quiet))


@pytest.mark.parametrize("module", ["association.py", "video_file.py"])
def test_modules_that_the_trackers_share_are_the_same(module: str) -> None:
    copies = [(PLUGINS / name / module).read_text() for name in ("motion_tracker", "video_tracker")]
    assert copies[0] == copies[1], f"copy the changed {module} into the other plugin's folder"
