"""Drawn scenes: one large and two to five small coloured shapes on a background, with captions. Nothing is written.

A scene depends on (seed, split, index) alone, so any process can draw any part of a set.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import yaml
from PIL import Image, ImageDraw

VOCABULARY = yaml.safe_load(Path(__file__).with_name("scenes.yaml").read_text(encoding="utf-8"))
SHAPES = VOCABULARY["shapes"]
COLOURS, BACKGROUNDS = ({k: tuple(rgb) for k, rgb in VOCABULARY[name].items()} for name in ("colours", "backgrounds"))
IMAGE_SIZE = 64
_SUPERSAMPLING = 4  # draw larger, then shrink, because Pillow doesn't smooth the edges of shapes


@dataclass(frozen=True)
class SceneObject:
    """One shape; centre and radius as fractions of the image's side."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    size: str

    @property
    def place(self) -> str:
        """Which of the nine parts of the image its centre is in, in words."""
        vertical, horizontal = min(2, int(self.y * 3)), min(2, int(self.x * 3))
        return f"{('top', '', 'bottom')[vertical]} {('left', '', 'right')[horizontal]}".strip() or "middle"


@dataclass(frozen=True)
class Scene:
    """Objects on a background, the large one first, with one short caption and any number of long ones."""

    background: str
    objects: tuple[SceneObject, ...]
    seed: str

    @property
    def label(self) -> int:
        """Class of the large object: its index in `large_object_prompts()`."""
        large = self.objects[0]
        return list(COLOURS).index(large.colour) * len(SHAPES) + SHAPES.index(large.shape)

    def short_caption(self) -> str:
        """Returns a caption that names only the large object, as alt text does."""
        return short_prompt(self.objects[0].colour, self.objects[0].shape)

    def long_caption(self, variant: int) -> list[str]:
        """Returns one sentence per object and one for the background; order and wording depend on the variant."""
        rng = random.Random(f"{self.seed}/caption{variant}")
        sentences = [
            rng.choice(VOCABULARY["object_sentences"]).format(
                size=o.size, colour=o.colour, shape=o.shape, place=o.place
            )
            for o in self.objects
        ]
        sentences.append(rng.choice(VOCABULARY["background_sentences"]).format(colour=self.background))
        rng.shuffle(sentences)
        return sentences


def short_prompt(colour: str, shape: str) -> str:
    """Returns the short caption of a scene with this large object."""
    return f"a large {colour} {shape}"


def large_object_prompts() -> list[str]:
    """Returns all 48 short captions, in the order of `Scene.label`."""
    return [short_prompt(colour, shape) for colour in COLOURS for shape in SHAPES]


def make_scene(seed: int, split: str, index: int) -> Scene:
    """Returns scene number `index` of a split (`train`, `test`); different splits never share a random stream."""
    name = f"{seed}/{split}/{index}"
    rng = random.Random(name)  # text seeds are hashed with SHA-512: the same on every machine and Python
    kinds = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], rng.randint(3, 6))
    objects = None
    while objects is None:
        objects = _place_objects(rng, kinds)
    return Scene(rng.choice(list(BACKGROUNDS)), objects, name)


def _place_objects(rng: random.Random, kinds: list[tuple[str, str]]) -> tuple[SceneObject, ...] | None:
    """Draws centres at random until no shapes touch; returns None if the first shapes leave too little room."""
    objects: list[SceneObject] = []
    for number, (colour, shape) in enumerate(kinds):
        radius = rng.uniform(0.21, 0.25) if number == 0 else rng.uniform(0.11, 0.13)
        for _ in range(100):
            x, y = rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)
            apart = all(math.hypot(x - o.x, y - o.y) > radius + o.radius for o in objects)
            if apart and _is_clearly_placed(x) and _is_clearly_placed(y):
                break
        else:
            return None
        objects.append(SceneObject(colour, shape, x, y, radius, "small" if number else "large"))
    return tuple(objects)


def _is_clearly_placed(centre: float) -> bool:
    """Returns whether a coordinate is far enough from the lines between thirds that its third is unambiguous."""
    return min(abs(centre - 1 / 3), abs(centre - 2 / 3)) > 0.05


def draw_scene(scene: Scene, image_size: int = IMAGE_SIZE) -> Image.Image:
    """Draws a scene as an RGB image of image_size x image_size pixels."""
    side = image_size * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    for o in scene.objects:
        _draw_shape(canvas, o.shape, o.x * side, o.y * side, o.radius * side, COLOURS[o.colour])
    return image.resize((image_size, image_size), Image.Resampling.BOX)


def _draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: tuple[int, int, int]
) -> None:
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "ring":
        canvas.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=round(r * 0.38))
    elif shape == "cross":
        arm = 0.34 * r
        canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=colour)
        canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=colour)
    else:
        corners, inner = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (5, 0.42)}[shape]
        start = -math.pi / 4 if shape == "square" else -math.pi / 2
        steps = corners if inner == 1.0 else 2 * corners
        radii = [r * (1.0 if k % 2 == 0 else inner) for k in range(steps)]
        angles = [start + 2 * math.pi * k / steps for k in range(steps)]
        canvas.polygon([(x + q * math.cos(a), y + q * math.sin(a)) for q, a in zip(radii, angles)], fill=colour)
