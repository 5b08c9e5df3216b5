"""Tracking by detection: constant-velocity motion model, buffered IoU, optimal assignment.

One `Tracker.update` per frame:

    predict every track → cost of (track, detection) → assignment → correct, begin, coast or drop

The motion model is OpenCV's `KalmanFilter`, the assignment is `lapx` (Jonker-Volgenant).
This file is the same in every bundled plugin that tracks, so that each folder works alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import cv2
import lap
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Standard deviations as shares of an object's size, per frame. Scaling them with the size is from
# DeepSORT (Wojke et al., ICIP 2017, arXiv:1703.07402), whose 1/20 for positions is kept. Its 1/160
# for velocities suits 30 frames per second; 1/40 also follows objects at 10 frames per second,
# which move, and change speed, three times as much from one frame to the next.
POSITION_STD = 1 / 20
VELOCITY_STD = 1 / 40
# Each side of a box is enlarged by this share of the box before the overlap is taken, so that small
# fast objects still overlap their prediction: the first buffer of C-BIoU (Yang et al., WACV 2023,
# arXiv:2211.14317).
BUFFER = 0.3
# A pair whose buffered boxes overlap (IoU) less than this is no match; SORT (Bewley et al., ICIP
# 2016, arXiv:1602.00763) asks for 0.3 of boxes without a buffer.
MIN_OVERLAP = 0.2
# A box of which this share lies inside another is part of it.
INSIDE = 0.6


@dataclass(slots=True)
class Track:
    """One object over time. `box` is (4,) float32: x1, y1, x2, y2 in pixels."""

    box: Floats
    score: float
    label: int
    motion: cv2.KalmanFilter = field(repr=False)
    begun: Floats = field(repr=False)  # (2,) where its centre was first seen
    id: int = 0  # 0 until the track is confirmed
    hits: int = 1  # frames with a detection
    missed: int = 0  # frames in a row without one
    merged: int = 0  # frames in a row inside a blob shared with other tracks


class Tracker:
    """Gives detections of successive frames lasting identities.

    - A track is confirmed, and gets the next id (from 1), once `min_hits` frames in a row show it
      and its centre has moved by `min_travel` of its size (the side of a square of its area).
    - A confirmed track survives `max_missed` frames without a detection; it is not reported then.
    - A detection with a score under `birth_score` may continue a track and never begins one, as in
      ByteTrack (Zhang et al., ECCV 2022, arXiv:2110.06864).
    - Detections continue only tracks of their own label.
    - `blobs=True` is for detectors that see foreground and not objects: objects that pass each
      other are one blob for a while. Confirmed tracks whose predictions lie in one blob coast
      through it, for at most `max_merged` frames, and are reported at their predicted boxes; a
      blob that lies inside a tracked object is a fragment and begins no track.
    """

    def __init__(
        self,
        *,
        min_hits: int = 3,
        min_travel: float = 0.0,
        max_missed: int = 10,
        birth_score: float = 0.0,
        blobs: bool = False,
        max_merged: int = 50,
    ) -> None:
        self._min_hits = min_hits
        self._min_travel = min_travel
        self._max_missed = max_missed
        self._birth_score = birth_score
        self._blobs = blobs
        self._max_merged = max_merged
        self._tracks: list[Track] = []
        self._last_id = 0

    def update(self, boxes: Floats, scores: Floats, labels: Ints | None = None) -> list[Track]:
        """Take one frame's detections; return the confirmed tracks that this frame shows, by id.

        `boxes` is (N, 4) float32 x1, y1, x2, y2 in pixels; `scores` (N,) in 0..1; `labels` (N,)
        int64, all 0 by default. N may be 0. The tracks belong to the tracker: read them before the
        next update.
        """
        if labels is None:
            labels = np.zeros(len(boxes), np.int64)
        for track in self._tracks:
            track.box = _predict(track)
        merged, taken = self._merge(boxes) if self._blobs else ([], set())
        single = [track for track in self._tracks if not any(track is other for other in merged)]
        free = [j for j in range(len(boxes)) if j not in taken]

        pairs = _assign(single, boxes[free], labels[free])
        for i, j in pairs:
            _correct(single[i], boxes[free[j]], float(scores[free[j]]))
        matched_tracks, matched = {i for i, _ in pairs}, {free[j] for _, j in pairs}
        for i, track in enumerate(single):
            if i not in matched_tracks:
                _miss(track)

        for j in free:
            if j not in matched and scores[j] >= self._birth_score and not self._fragment(boxes[j]):
                self._tracks.append(_begin(boxes[j], float(scores[j]), int(labels[j])))
        self._tracks = [track for track in self._tracks if self._alive(track)]
        for track in self._tracks:
            if not track.id and self._confirmed(track):
                self._last_id += 1
                track.id = self._last_id
        shown = (track for track in self._tracks if track.id and not track.missed)
        return sorted(shown, key=lambda track: track.id)

    def _confirmed(self, track: Track) -> bool:
        travel = float(np.linalg.norm(_centre(track.box) - track.begun))
        return track.hits >= self._min_hits and travel >= self._min_travel * _size(track.box)

    def _alive(self, track: Track) -> bool:
        return track.missed <= (self._max_missed if track.id else 0)

    def _merge(self, boxes: Floats) -> tuple[list[Track], set[int]]:
        """Find blobs that hold two or more confirmed tracks; let those tracks coast."""
        tracks = [track for track in self._tracks if track.id and track.merged < self._max_merged]
        if len(tracks) < 2 or not len(boxes):
            return [], set()
        inside = _shares_inside(_stack(tracks), boxes)  # (T, N)
        home = inside.argmax(axis=1)
        merged: list[Track] = []
        taken: set[int] = set()
        for j in range(len(boxes)):
            members = [track for i, track in enumerate(tracks) if home[i] == j and inside[i, j] >= INSIDE]
            if len(members) >= 2:
                merged += members
                taken.add(j)
        for track in merged:
            _coast(track)
            track.merged += 1
            track.missed = 0
        return merged, taken

    def _fragment(self, box: Floats) -> bool:
        """Whether a blob lies inside a known object, which may be standing still just now."""
        known = [track for track in self._tracks if track.id] if self._blobs else []
        return bool(known) and bool((_shares_inside(box[None], _stack(known)) >= INSIDE).any())


def overlaps(a: Floats, b: Floats) -> Floats:
    """Intersection over union of every pair: (N, 4) and (M, 4) x1, y1, x2, y2 → (N, M) in 0..1."""
    common = _intersections(a, b)
    union = _areas(a)[:, None] + _areas(b)[None] - common
    return np.asarray(common / np.maximum(union, 1e-6), np.float32)


def buffered(boxes: Floats, share: float = BUFFER) -> Floats:
    """Boxes (N, 4) enlarged on each side by `share` of their width and height."""
    margin = (boxes[:, 2:] - boxes[:, :2]) * np.float32(share)
    return np.concatenate([boxes[:, :2] - margin, boxes[:, 2:] + margin], axis=1)


def _assign(tracks: list[Track], boxes: Floats, labels: Ints) -> list[tuple[int, int]]:
    """The pairs (track, detection) of least total cost 1 - overlap, none under `MIN_OVERLAP`."""
    if not tracks or not len(boxes):
        return []
    cost = 1.0 - overlaps(buffered(_stack(tracks)), buffered(boxes)).astype(np.float64)
    cost[np.array([track.label for track in tracks])[:, None] != labels[None]] = 2.0
    rows, columns = lap.lapjvx(cost, cost_limit=1.0 - MIN_OVERLAP, return_cost=False)
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True)]


def _begin(box: Floats, score: float, label: int) -> Track:
    """A track with zero velocity. State (8,): x1, y1, x2, y2 and their changes per frame.

    Corners with velocities are a linear transform of BoT-SORT's centre, size and their velocities
    (Aharon et al., 2022, arXiv:2206.14651), and let an object that enters at an edge of the
    picture have one side that moves and one that does not.
    """
    motion = cv2.KalmanFilter(8, 4, 0, cv2.CV_32F)
    motion.transitionMatrix = np.eye(8, dtype=np.float32) + np.eye(8, k=4, dtype=np.float32)
    motion.measurementMatrix = np.eye(4, 8, dtype=np.float32)
    motion.statePost = np.concatenate([box, np.zeros(4, np.float32)]).reshape(8, 1)
    size = _size(box)
    # An unknown first velocity: ten times what one frame may change it by, as DeepSORT begins.
    motion.errorCovPost = _noise(2 * POSITION_STD * size, 10 * VELOCITY_STD * size)
    return Track(box=box, score=score, label=label, motion=motion, begun=_centre(box))


def _predict(track: Track) -> Floats:
    size = _size(track.box)
    track.motion.processNoiseCov = _noise(POSITION_STD * size, VELOCITY_STD * size)
    return _box(track.motion.predict())


def _correct(track: Track, box: Floats, score: float) -> None:
    variance = np.float32((POSITION_STD * _size(box)) ** 2)
    track.motion.measurementNoiseCov = np.eye(4, dtype=np.float32) * variance
    track.motion.correct(np.ascontiguousarray(box.reshape(4, 1)))
    track.box = box
    track.score = score
    track.hits += 1
    track.missed = 0
    track.merged = 0


def _miss(track: Track) -> None:
    _coast(track)
    track.missed += 1
    track.merged = 0


def _coast(track: Track) -> None:
    """Hold the size while nothing is measured: both sides of each axis move alike."""
    state = track.motion.statePost.copy()
    state[4:] = np.tile((state[4:6] + state[6:8]) / 2, (2, 1))
    track.motion.statePost = state


def _noise(position: float, velocity: float) -> Floats:
    return np.diag(np.repeat([position**2, velocity**2], 4)).astype(np.float32)


def _size(box: Floats) -> float:
    """The side of a square of the box's area, in pixels, at least 1."""
    width, height = float(box[2] - box[0]), float(box[3] - box[1])
    return float(max(width * height, 1.0) ** 0.5)


def _centre(box: Floats) -> Floats:
    return np.asarray((box[:2] + box[2:]) / 2, np.float32)


def _box(state: NDArray[np.generic]) -> Floats:
    """The box of a state (8, 1), never turned inside out by a wild prediction."""
    box = np.asarray(state, np.float32)[:4, 0].copy()
    box[2:] = np.maximum(box[2:], box[:2] + 1)
    return box


def _stack(tracks: Iterable[Track]) -> Floats:
    return np.stack([track.box for track in tracks])


def _areas(boxes: Floats) -> Floats:
    sides = boxes[:, 2:] - boxes[:, :2]
    return np.asarray(sides[:, 0] * sides[:, 1], np.float32)


def _intersections(a: Floats, b: Floats) -> Floats:
    near = np.maximum(a[:, None, :2], b[None, :, :2])
    far = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = np.maximum(far - near, 0)
    return np.asarray(sides[..., 0] * sides[..., 1], np.float32)


def _shares_inside(a: Floats, b: Floats) -> Floats:
    """How much of each box of a (N, 4) lies inside each of b (M, 4): (N, M) in 0..1."""
    return np.asarray(_intersections(a, b) / np.maximum(_areas(a)[:, None], 1e-6), np.float32)
