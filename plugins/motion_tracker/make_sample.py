"""Draws sample.mp4: a road seen by a fixed camera, two cars that pass each other, one walker.

    python make_sample.py [FILE]

8 s, 320x240, 12.5 frames per second, MPEG-4 part 2, the same picture for picture every time.
"""

import sys
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

WIDTH, HEIGHT, FPS, FRAMES = 320, 240, 12.5, 100
ROAD = slice(60, 190)


def background(random: np.random.Generator) -> Image:
    image = np.full((HEIGHT, WIDTH, 3), (70, 110, 80), np.uint8)
    image[ROAD] = (95, 95, 95)
    grain = cv2.GaussianBlur(random.normal(0, 12, image.shape), (0, 0), 1.5)
    image = np.asarray(np.clip(image + grain, 0, 255), np.uint8)
    for x in range(8, WIDTH, 48):
        image[123:127, x : x + 24] = 210
    return image


def car(image: Image, x: int, y: int, colour: tuple[int, int, int], *, right: bool) -> None:
    """A car of 62 x 30 pixels, its top left corner at x, y, seen from above."""
    cv2.rectangle(image, (x, y), (x + 61, y + 29), colour, cv2.FILLED)
    glass = (60, 45, 40)
    front, back = (x + 40, x + 8) if right else (x + 14, x + 50)
    cv2.rectangle(image, (front, y + 4), (front + 7, y + 25), glass, cv2.FILLED)
    cv2.rectangle(image, (back, y + 6), (back + 4, y + 23), glass, cv2.FILLED)


def walker(image: Image, x: int, y: int, step: int) -> None:
    """A person of about 28 x 38 pixels, the head's centre at x, y."""
    swing = 6 if step % 6 < 3 else -6
    cv2.line(image, (x, y + 14), (x + swing, y + 30), (120, 40, 30), 8)
    cv2.ellipse(image, (x, y + 9), (14, 10), 0, 0, 360, (40, 60, 190), cv2.FILLED)
    cv2.circle(image, (x, y), 6, (150, 180, 220), cv2.FILLED)


def frame(index: int, scene: Image) -> Image:
    image = scene.copy()
    car(image, -70 + 6 * index, 94, (40, 40, 200), right=True)
    car(image, 440 - 7 * index, 112, (225, 225, 225), right=False)
    walker(image, -20 + 4 * index, 202, index)
    return image


def main(path: Path) -> None:
    random = np.random.default_rng(7)
    scene = background(random)
    code = cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, FPS, (WIDTH, HEIGHT))
    for index in range(FRAMES):
        writer.write(frame(index, scene))
    writer.release()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("sample.mp4"))
