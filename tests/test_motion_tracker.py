"""The plugin `motion_tracker`, without the engine: boxes, identities, and what it refuses."""

import os
import subprocess
import sys
import textwrap
import tomllib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from clips import (
    PLUGINS,
    REAL_CLIPS,
    Box,
    Image,
    Mover,
    context,
    draw,
    draw_clip,
    encode,
    load_plugin,
    write_clip,
)

FOLDER = PLUGINS / "motion_tracker"
MANIFEST = tomllib.loads((FOLDER / "plugin.toml").read_text())
# The exceptions that the manifest lists as the caller's fault.
REJECTS = {"ValueError": ValueError, "cv2.error": cv2.error}

LEFT_TO_RIGHT = Mover((-60, 100), (6, 0))
RIGHT_TO_LEFT = Mover((340, 110), (-5, 0), colour=(220, 200, 40))

Lives = dict[int, dict[int, Box]]  # track id → frame → box


@pytest.fixture(scope="module")
def plugin() -> Any:
    return load_plugin("motion_tracker")


@pytest.fixture
def tracker(plugin: Any, tmp_path: Path) -> Any:
    return plugin.MotionTracker(context(tmp_path, **MANIFEST["settings"]))


def quiet(done: int, total: int) -> None:
    """A `progress` that nobody watches."""


def lives(tracker: Any, video: Path, **arguments: Any) -> Lives:
    found: Lives = defaultdict(dict)
    for item in tracker.track(video, progress=quiet, **arguments):
        for track in item["tracks"]:
            found[track["id"]][item["frame"]] = tuple(track["box"])
    return found


def visible(box: Box, width: int = 320, height: int = 240) -> Box:
    x1, y1, x2, y2 = box
    return max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)


def error_px(found: Box, expected: Box) -> int:
    """The largest distance between two corresponding sides."""
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def apart(a: Box, b: Box, margin: int = 10) -> bool:
    return a[2] + margin < b[0] or b[2] + margin < a[0] or a[3] + margin < b[1] or b[3] + margin < a[1]


def follower(found: Lives, mover: Mover, frame: int) -> int:
    """The id of the track that is nearest to a mover in a frame."""
    here = {identity: boxes[frame] for identity, boxes in found.items() if frame in boxes}
    return min(here, key=lambda identity: error_px(here[identity], visible(mover.box(frame))))


def test_validate_passes_where_the_packages_work(tracker: Any) -> None:
    tracker.validate()


def test_validate_raises_when_opencv_cannot_read_videos(
    plugin: Any, tracker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "ffmpeg_is_built_in", lambda: False)
    with pytest.raises(RuntimeError, match="without FFmpeg"):
        tracker.validate()


def test_a_setting_that_makes_no_sense_is_named(plugin: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="setting `analysis_px` is 0"):
        plugin.MotionTracker(context(tmp_path, analysis_px=0))


def test_one_mover_is_one_track_within_a_few_pixels(tracker: Any, tmp_path: Path) -> None:
    mover = Mover((-60, 100), (6, 1))
    found = lives(tracker, draw_clip(tmp_path / "one.avi", [mover]))
    assert list(found) == [1]
    assert len(found[1]) >= 40
    for frame, box in found[1].items():
        assert error_px(box, visible(mover.box(frame))) <= 4, f"frame {frame}"


@pytest.mark.parametrize(
    "movers",
    [
        pytest.param([LEFT_TO_RIGHT, RIGHT_TO_LEFT], id="head_on"),
        pytest.param(
            [Mover((-60, 100), (6, 0)), Mover((150, -70), (0, 6), (30, 40), (30, 200, 60))],
            id="at_right_angles",
        ),
        pytest.param(
            [Mover((-60, 60), (7, 2)), Mover((-60, 170), (7, -2), colour=(220, 200, 40))],
            id="converging",
        ),
    ],
)
def test_identities_are_kept_through_a_crossing(tracker: Any, tmp_path: Path, movers: list[Mover]) -> None:
    found = lives(tracker, draw_clip(tmp_path / "crossing.avi", movers))
    one, other = movers
    meeting = [
        frame for frame in range(60) if not apart(visible(one.box(frame)), visible(other.box(frame)), margin=0)
    ]
    assert meeting, "the shapes have to cross for this test to say anything"
    for mover in movers:
        before, after = follower(found, mover, meeting[0] - 5), follower(found, mover, meeting[-1] + 5)
        assert before == after
    assert len(found) == len(movers)


def test_boxes_stay_within_a_few_pixels_through_a_crossing(tracker: Any, tmp_path: Path) -> None:
    movers = [LEFT_TO_RIGHT, RIGHT_TO_LEFT]
    found = lives(tracker, draw_clip(tmp_path / "crossing.avi", movers))
    for identity, mover in zip((1, 2), movers, strict=True):
        if follower(found, mover, 20) != identity:
            identity = 3 - identity
        for frame, box in found[identity].items():
            alone = apart(movers[0].box(frame), movers[1].box(frame))
            assert error_px(box, visible(mover.box(frame))) <= (4 if alone else 8), f"frame {frame}"


def test_frames_count_from_zero_and_carry_their_time(tracker: Any, tmp_path: Path) -> None:
    clip = draw_clip(tmp_path / "timed.mp4", [LEFT_TO_RIGHT], 20, fps=10)
    items = list(tracker.track(clip, progress=quiet))
    assert [item["frame"] for item in items] == list(range(20))
    assert [item["time_s"] for item in items] == pytest.approx([0.1 * frame for frame in range(20)])


def test_items_are_plain_values_with_scores_from_zero_to_one(tracker: Any, tmp_path: Path) -> None:
    clip = draw_clip(tmp_path / "plain.mp4", [LEFT_TO_RIGHT], 30)
    tracks = [track for item in tracker.track(clip, progress=quiet) for track in item["tracks"]]
    assert tracks
    for track in tracks:
        assert {key: type(value) for key, value in track.items()} == {"id": int, "box": list, "score": float}
        assert all(type(side) is int for side in track["box"])
        assert 0 <= track["score"] <= 1


def test_progress_ends_at_the_number_of_frames(tracker: Any, tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    clip = draw_clip(tmp_path / "progress.mp4", [], 130)
    list(tracker.track(clip, progress=lambda done, total: reports.append((done, total))))
    assert reports[-1] == (130, 130)
    assert reports == sorted(set(reports))
    assert 10 <= len(reports) <= 70


def test_a_region_under_min_area_is_no_object(tracker: Any, tmp_path: Path) -> None:
    clip = draw_clip(tmp_path / "small.mp4", [Mover((-30, 100), (5, 0), (16, 16))])
    assert not lives(tracker, clip, min_area=400)
    assert len(lives(tracker, clip, min_area=100)) == 1


def test_automatic_exposure_is_no_motion(tracker: Any, tmp_path: Path) -> None:
    def darkened(frame: int) -> Image:
        power = 1 + 0.6 * min(max(frame - 20, 0) / 10, 1)  # within 0.8 s
        return (255 * (draw([LEFT_TO_RIGHT], frame) / 255) ** power).astype(np.uint8)

    clip = write_clip(tmp_path / "exposure.avi", map(darkened, range(60)))
    assert list(lives(tracker, clip)) == [1]


def test_what_stays_in_place_is_no_moving_object(tracker: Any, tmp_path: Path) -> None:
    still = Mover((140, 100), (0, 0))
    images = (draw([still] if frame >= 10 else [], frame) for frame in range(60))
    assert not lives(tracker, write_clip(tmp_path / "still.avi", images))


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def text_file(folder: Path) -> Path:
    path = folder / "letter.mp4"
    path.write_text("this is no video\n" * 100)
    return path


def empty_file(folder: Path) -> Path:
    path = folder / "empty.mp4"
    path.touch()
    return path


def without_its_index(folder: Path) -> Path:
    return cut(draw_clip(folder / "headless.mp4", [LEFT_TO_RIGHT]), 0.7)


def cut_midway(folder: Path) -> Path:
    return cut(draw_clip(folder / "midway.avi", [LEFT_TO_RIGHT]), 0.6)


def header_only(folder: Path) -> Path:
    path = draw_clip(folder / "header.avi", [LEFT_TO_RIGHT])
    path.write_bytes(path.read_bytes()[:6000])
    return path


def playlist(folder: Path) -> Path:
    path = folder / "list.m3u8"
    path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/secret.ts\n#EXT-X-ENDLIST\n")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (text_file, "cannot be opened as a video"),
        (empty_file, "is empty"),
        (without_its_index, "its index is missing because the file was cut short"),
        (cut_midway, r"declares 60 frames and only \d+ can be decoded"),
        (header_only, "cut short"),
        (playlist, "cannot be opened as a video"),
        (lambda folder: folder / "gone.mp4", "there is no video file"),
        (lambda folder: folder, "there is no video file"),
    ],
)
def test_bad_video_is_refused_with_a_reason(
    tracker: Any, tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    rejects = tuple(REJECTS[name] for name in MANIFEST["tools"]["track"]["rejects"])
    with pytest.raises(rejects, match=message) as caught:
        list(tracker.track(make(tmp_path), progress=quiet))
    assert "send" in str(caught.value), "the message says what to do next"


def test_bad_video_leaves_stderr_quiet(tmp_path: Path) -> None:
    clips = [text_file(tmp_path), without_its_index(tmp_path), cut_midway(tmp_path)]
    script = f"""
        import sys
        sys.path.insert(0, {str(FOLDER)!r})
        from pathlib import Path
        from types import SimpleNamespace
        from plugin import MotionTracker
        tracker = MotionTracker(SimpleNamespace(settings={{}}))
        for clip in sys.argv[1:]:
            try:
                list(tracker.track(Path(clip), progress=lambda done, total: None))
            except ValueError:
                print("refused")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, clips)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout.split(), done.stderr) == (["refused"] * 3, "")


def test_min_area_under_one_is_refused(tracker: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="min_area is 0"):
        list(tracker.track(tmp_path / "any.mp4", min_area=0, progress=quiet))
    with pytest.raises(ValueError, match="min_area is -5"):
        tracker.detect(encode(draw([], 0)), min_area=-5)


def test_detect_finds_what_moved_since_the_images_before(tracker: Any) -> None:
    mover = Mover((20, 100), (8, 0))
    first = tracker.detect(encode(draw([], 0)))
    assert (first["frame"], first["width"], first["height"], first["objects"]) == (0, 320, 240, [])
    second = tracker.detect(encode(draw([mover], 5)))
    assert second["frame"] == 1
    [found] = second["objects"]
    assert error_px(tuple(found["box"]), mover.box(5)) <= 4
    assert found["score"] > 0.5


def test_detect_keeps_the_streams_apart(tracker: Any) -> None:
    mover = Mover((20, 100), (8, 0))
    tracker.detect(encode(draw([], 0)), stream="yard")
    assert tracker.detect(encode(draw([mover], 0)), stream="gate")["objects"] == []
    assert len(tracker.detect(encode(draw([mover], 0)), stream="yard")["objects"]) == 1


def test_detect_forgets_the_stream_unused_for_longest(plugin: Any, tmp_path: Path) -> None:
    tracker = plugin.MotionTracker(context(tmp_path, streams=2))
    image = encode(draw([], 0))
    for stream in ("a", "b", "a", "c"):
        tracker.detect(image, stream=stream)
    assert tracker.detect(image, stream="a")["frame"] == 2
    assert tracker.detect(image, stream="b")["frame"] == 0


def test_detect_starts_anew_when_the_size_changes(tracker: Any) -> None:
    tracker.detect(encode(draw([], 0)))
    assert tracker.detect(encode(draw([], 0, (640, 480))))["objects"] == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"this is no image", "no image that OpenCV can decode"),
        (encode(draw([], 0))[:-400], "cut short"),
        (encode(draw([], 0), ".png")[:-400], "cut short"),
        (b"\xff\xd8\xff\xe0" + bytes(200) + b"\xff\xd9", "no image that OpenCV can decode"),
    ],
)
def test_bad_image_is_refused_with_a_reason(tracker: Any, data: bytes, message: str) -> None:
    rejects = tuple(REJECTS[name] for name in MANIFEST["tools"]["detect"]["rejects"])
    with pytest.raises(rejects, match=message):
        tracker.detect(data)


def test_sample_clip_shows_three_objects(tracker: Any) -> None:
    sample = FOLDER / "sample.mp4"
    assert sample.stat().st_size < 300_000
    found = lives(tracker, sample)
    assert len(found) == 3
    assert all(len(boxes) >= 30 for boxes in found.values())


def test_sample_clip_is_what_its_generator_draws(tmp_path: Path) -> None:
    drawn = tmp_path / "sample.mp4"
    subprocess.run([sys.executable, FOLDER / "make_sample.py", drawn], check=True)
    shipped, fresh = cv2.VideoCapture(str(FOLDER / "sample.mp4")), cv2.VideoCapture(str(drawn))
    for _ in range(100):
        (a_ok, a), (b_ok, b) = shipped.read(), fresh.read()
        assert a_ok
        assert b_ok
        assert np.abs(a.astype(int) - b.astype(int)).mean() < 1


def test_four_cars_cross_the_real_clip_within_the_memory_limit() -> None:
    clip = REAL_CLIPS / "car-detection.mp4"
    if not clip.is_file():
        pytest.skip(f"the real clip is not at {os.path.relpath(clip)}")
    script = """
        import resource, sys
        limit = int(sys.argv[3]) << 20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        sys.path.insert(0, sys.argv[1])
        from collections import Counter
        from pathlib import Path
        from types import SimpleNamespace
        from plugin import MotionTracker
        tracker = MotionTracker(SimpleNamespace(settings={}))
        items = list(tracker.track(Path(sys.argv[2]), progress=lambda done, total: None))
        lengths = Counter(track["id"] for item in items for track in item["tracks"])
        print(len(items), sum(length >= 12 for length in lengths.values()))
    """
    limit_mib = MANIFEST["limits"]["memory_mib"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(FOLDER), str(clip), str(limit_mib)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["377", "4"]


def test_real_clip_cut_midway_is_refused(tracker: Any, tmp_path: Path) -> None:
    clip = REAL_CLIPS / "car-detection.mp4"
    if not clip.is_file():
        pytest.skip(f"the real clip is not at {os.path.relpath(clip)}")
    part = tmp_path / "part.mp4"
    part.write_bytes(clip.read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match="declares 377 frames"):
        list(tracker.track(part, progress=quiet))
