"""The name of a set of scenes, its pictures, and the folder in the cache where they are kept."""

from __future__ import annotations

import hashlib
import io
import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from gtl.data.captions import ORIGINAL
from gtl.data.scenes.captions import write_caption
from gtl.data.scenes.edits import SceneEdit, choose_edit
from gtl.data.scenes.vocabulary import CONCEPTS, STYLES, Scene, choose_scene
from gtl.storage import Store
from gtl.types import Progress, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "builtin:scenes"
SPLITS = ("train", "heldout", "marks", "edits")
EDITION = 2
"""Counts changes that draw other pictures or captions for the same name."""
FEW = 24
"""Pictures that an adapter learns a concept or a style from."""
CAPTIONS, LABELS = "metadata.jsonl", "labels.jsonl"
THREADS = 4
MARKS = "random marks"
"""Caption of a picture without a scene."""


@dataclass(frozen=True)
class SceneSet:
    """A set of captioned pictures; the same fields give the same set.

    Raises:
        UserError: a field is out of its range.
    """

    split: str = "train"
    """train, or heldout: the combinations of shape and colour that train never shows. marks: random ones, no scene.
    edits: scenes that others, of which there are pictures too, become by an instruction, which is their caption."""
    concept: str | None = None
    """Pictures of this concept, which train never shows."""
    style: str = "plain"
    """Pictures in this style; train shows only plain ones."""
    count: int = 20000
    """Pictures."""
    size: int = 64
    """Side in pixels."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UserError(f"data.source: {NAME}: split={self.split}: there are {', '.join(SPLITS)}")
        if self.concept is not None and self.concept not in CONCEPTS:
            raise UserError(f"data.source: {NAME}: concept={self.concept}: there are {', '.join(CONCEPTS)}")
        if self.style not in STYLES:
            raise UserError(f"data.source: {NAME}: style={self.style}: there are {', '.join(STYLES)}")
        if self.style != "plain" and self.split in ("marks", "edits"):
            raise UserError(f"data.source: {NAME}: split={self.split} with style={self.style}: leave one out")
        if self.concept is not None and self.split != "train":
            raise UserError(f"data.source: {NAME}: split={self.split} with concept={self.concept}: leave one out")
        if not 1 <= self.count <= 10**6:
            raise UserError(f"data.source: {NAME}: count={self.count}: has to be from 1 to 1000000")
        if self.size % 16 or not 32 <= self.size <= 512:
            raise UserError(f"data.source: {NAME}: size={self.size}: has to be a multiple of 16 from 32 to 512")
        if self.seed < 0:
            raise UserError(f"data.source: {NAME}: seed={self.seed}: has to be 0 or more")

    @classmethod
    def parse(cls, source: str) -> SceneSet:
        """From `builtin:scenes`, or with fields: `builtin:scenes?count=20000&split=train&size=64`.

        A concept or a style without a count has FEW pictures.

        Raises:
            UserError: it names another set, or a field is unknown, given twice or out of its range.
        """
        name, mark, query = source.partition("?")
        if name != NAME:
            raise UserError(f"data.source: {source}: no such built-in set; there is {NAME}")
        try:
            pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if mark else []
        except ValueError:
            raise UserError(f"data.source: {source}: expected fields after the ?, such as {NAME}?count=100") from None
        fields: dict[str, str | int] = {}
        for key, value in pairs:
            if key not in cls.__dataclass_fields__:
                known = ", ".join(cls.__dataclass_fields__)
                raise UserError(f"data.source: {source}: unknown field {key}; known are {known}")
            if key in fields:
                raise UserError(f"data.source: {source}: {key} is given twice; keep one")
            fields[key] = _whole_number(source, key, value) if key in ("count", "size", "seed") else value
        if fields.keys() & {"concept", "style"}:
            fields.setdefault("count", FEW)
        return cls(**fields)  # type: ignore[arg-type]

    def scene(self, index: int) -> tuple[Scene, str]:
        """What is in a picture, and its caption; marks have none."""
        scene, caption, _ = self._lots(index)
        return scene, caption

    def caption(self, index: int) -> str:
        """The caption of a picture; an edit's is the instruction."""
        if self.split == "edits":
            return self.edit(index)[0].instruction
        return MARKS if self.split == "marks" else self.scene(index)[1]

    def picture(self, index: int) -> tuple[Image, str]:
        """A picture and its caption. It does not depend on `count`."""
        from gtl.data.scenes.draw import draw
        from gtl.data.scenes.marks import draw_marks

        if self.split == "marks":
            return draw_marks(self.size, random.Random(f"marks {self.seed} {index}")), MARKS
        if self.split == "edits":
            edit, seed = self.edit(index)
            return draw(edit.after, self.size, random.Random(seed)), edit.instruction
        scene, caption, rng = self._lots(index)
        return draw(scene, self.size, rng), caption

    def edit(self, index: int) -> tuple[SceneEdit, str]:
        """An edit, and the seed with which both of its scenes are drawn, so that only what is changed differs."""
        seed = f"edits {self.seed} {index}"
        return choose_edit(random.Random(seed)), f"{seed} drawn"

    def before(self, index: int) -> Image:
        """The picture that an edit begins at."""
        from gtl.data.scenes.draw import draw

        edit, seed = self.edit(index)
        return draw(edit.before, self.size, random.Random(seed))

    def labels(self, index: int) -> dict[str, Any]:
        """What a picture shows, for heads that learn to say it; of two things each has a shape of its own, so that the
        picture has none. `boxes` is as `gtl.data.labels.boxes_of` reads it."""
        from gtl.data.scenes.draw import draw_boxed

        if self.split == "marks":
            return {"objects": "none", "boxes": {"bbox": [], "categories": []}}
        scene, _, rng = self._lots(index)
        boxes = [[left, top, right - left, bottom - top]
                 for left, top, right, bottom in draw_boxed(scene, self.size, rng)[1]]  # fmt: skip
        (thing, *others), ground = scene.things, scene.background
        own = {} if others else {part: getattr(thing, part) for part in ("shape", "colour", "size", "place")}
        behind = {"background": ground.colour, "pattern": ground.pattern} if ground else {}
        found = {"bbox": boxes, "categories": [each.shape for each in scene.things]}
        return {**own, **behind, "style": scene.style, "objects": "two" if others else "one", "boxes": found}

    def _lots(self, index: int) -> tuple[Scene, str, random.Random]:
        # Not the size: a picture of 128 pixels shows what the one of 64 shows.
        rng = random.Random(f"{self.split} {self.concept} {self.style} {self.seed} {index}")
        scene = choose_scene(rng, self.split, self.concept, self.style)
        return scene, write_caption(scene, rng), rng

    @property
    def key(self) -> str:
        """Of the folder in the cache: a hash of all that decides the pictures."""
        identity = json.dumps({**asdict(self), "edition": EDITION}, sort_keys=True)
        return f"scenes/{hashlib.sha256(identity.encode()).hexdigest()[:32]}"


def _whole_number(source: str, key: str, value: str) -> int:
    # int() would also read "+1", "1_0" and digits of other scripts.
    if not (value.isascii() and value.isdigit()):
        raise UserError(f"data.source: {source}: {key}={value}: expected a whole number")
    return int(value)


def draw_set(wanted: SceneSet, cache: Store, progress: Progress | None = None) -> Store:
    """The folder in the cache with the set's PNG files and their captions; draws those that are missing.

    A run goes on where another was cut off. Two runs at once write the same files, each of them whole; the captions
    come last, so a folder with captions is complete.

    Raises:
        UserError: the cache cannot be written.
    """
    folder = cache.sub(wanted.key)
    if folder.exists(CAPTIONS):
        return folder
    there = {key for key, _, _ in folder.list()}
    lines = [{"file_name": file_name(i), "text": wanted.caption(i)} for i in range(wanted.count)]
    if wanted.split == "edits":
        lines = [{**line, ORIGINAL: before_name(i)} for i, line in enumerate(lines)]
    missing = [i for i in range(wanted.count) if file_name(i) not in there]

    def write(index: int) -> None:
        if wanted.split == "edits":  # first: one whose edit is there is not drawn again
            folder.write(before_name(index), _png(wanted.before(index)))
        folder.write(file_name(index), _png(wanted.picture(index)[0]))

    with ThreadPoolExecutor(THREADS) as pool:
        for done, _ in enumerate(pool.map(write, missing), wanted.count - len(missing) + 1):
            if progress is not None:
                progress("draw", done, wanted.count)
    folder.write(CAPTIONS, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return folder


def label_set(wanted: SceneSet, folder: Store, progress: Progress | None = None) -> None:
    """Write beside a set's pictures what they show, unless it is there.

    Raises:
        UserError: the cache cannot be written.
    """
    if folder.exists(LABELS):
        return
    lines = []
    for index in range(wanted.count):
        lines.append(json.dumps({"file_name": file_name(index), **wanted.labels(index)}) + "\n")
        if progress is not None:
            progress("label", index + 1, wanted.count)
    folder.write(LABELS, "".join(lines).encode())


def file_name(index: int) -> str:
    """Of a picture of a set."""
    return f"{index:06d}.png"


def before_name(index: int) -> str:
    """Of the picture that an edit begins at."""
    return f"before/{index:06d}.png"


def _png(image: Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()
