"""Makes `builtin:backbone` from nothing: a network that learns to say of drawn scenes what their captions say.

    python -m gtl.builtin_backbone

It sees everything that the scenes can show, concepts, styles and combinations that generators are kept from too: it is
the examiner. Blur and noise are learned as well, so that features tell damaged pictures from clean ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from gtl.backbones.scenes import SIDE, SceneNet, builtin_folder, open_scenes, write_scenes
from gtl.data.scenes.sets import SceneSet
from gtl.data.scenes.vocabulary import BACKGROUNDS, COLOURS, CONCEPTS, PATTERNS, PLACES, RADII, SHAPES, STYLES, Scene
from gtl.types import Progress, quiet

if TYPE_CHECKING:
    from torch import Generator, Tensor

HEADS: dict[str, tuple[str, ...]] = {
    "shape": (*SHAPES, *CONCEPTS),
    "colour": tuple(COLOURS),
    "size": tuple(RADII),
    "place": tuple(PLACES),
    "background": (*BACKGROUNDS, "of the style"),
    "pattern": PATTERNS,
    "style": STYLES,
    "objects": ("none", "one", "two"),
    "damage": ("none", "blur", "noise"),
}
CONFIG: dict[str, Any] = {
    "widths": [16, 32, 64, 128],
    "squeezed": 32,
    "dimensions": 128,
    "heads": {name: list(values) for name, values in HEADS.items()},
}
TRAIN_SEED, TEST_SEED = 1, 2
"""Of the pictures. Sets that are named without a seed have 0, so that a generator learns from others."""
COUNT, TEST_COUNT, EPOCHS, BATCH = 24000, 4000, 6, 128
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.05
BLUR, NOISE = (0.8, 2.5), (0.04, 0.25)
"""Least and most: standard deviation in pixels, and of pixels from -1 to 1."""
RADIUS = 5
"""Of the blur's kernel."""


@dataclass(frozen=True)
class Examples:
    """Pictures and what is true of them."""

    pixels: Tensor
    """uint8 [N, 3, 64, 64]."""
    truth: dict[str, Tensor]
    """Head -> shares [N, values] that sum to 1, or to 0 where nothing is true: two objects have half a shape each."""


def sets(count: int, seed: int) -> Iterator[SceneSet]:
    """Of all that scenes can show, about so many pictures."""
    styles = [style for style in STYLES if style != "plain"]
    shares = {
        **{SceneSet(seed=seed): 0.45, SceneSet("heldout", seed=seed): 0.1, SceneSet("marks", seed=seed): 0.05},
        **{SceneSet(style=style, seed=seed): 0.06 for style in styles},
        **{SceneSet(concept=concept, seed=seed): 0.03 for concept in CONCEPTS},
        **{SceneSet(concept=concept, style=style, seed=seed): 0.01 for concept in CONCEPTS for style in styles},
    }
    for scenes, share in shares.items():
        yield SceneSet(scenes.split, scenes.concept, scenes.style, max(1, round(share * count)), SIDE, seed)


def draw(count: int, seed: int, progress: Progress = quiet) -> Examples:
    """About so many pictures of all sets."""
    import numpy as np

    wanted = list(sets(count, seed))
    total = sum(scenes.count for scenes in wanted)
    pictures: list[Tensor] = []
    facts: list[dict[str, list[str]]] = []
    for scenes in wanted:
        for i in range(scenes.count):
            if len(pictures) % 5000 == 0:
                progress("draw", len(pictures), total)
            pictures.append(torch.from_numpy(np.array(scenes.picture(i)[0])).permute(2, 0, 1))
            facts.append(facts_of(None if scenes.split == "marks" else scenes.scene(i)[0]))
    truth = {head: torch.zeros(total, len(values)) for head, values in HEADS.items()}
    for row, fact in enumerate(facts):
        for head, found in fact.items():
            for value in found:
                truth[head][row, HEADS[head].index(value)] += 1 / len(found)
    return Examples(torch.stack(pictures), truth)


def facts_of(scene: Scene | None) -> dict[str, list[str]]:
    """Head -> the values that are true of a scene; of random marks only that they are no object."""
    if scene is None:
        return {"objects": ["none"]}
    ground = scene.background
    return {
        **{part: [getattr(thing, part) for thing in scene.things] for part in ("shape", "colour", "size", "place")},
        "background": [ground.colour if ground else "of the style"],
        "pattern": [ground.pattern if ground else "plain"],
        "style": [scene.style],
        "objects": ["one" if len(scene.things) == 1 else "two"],
        "damage": ["none"],
    }


def damage(pixels: Tensor, truth: dict[str, Tensor], lots: Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """A quarter of a batch [N, 3, H, W] from -1 to 1 blurred and a quarter noisy, and what is true of it now."""
    number, width = len(pixels), 2 * RADIUS + 1
    lot = torch.rand(number, generator=lots)
    kind = (lot < 0.5).long() + (lot < 0.25).long()
    strength = torch.rand(number, generator=lots)
    sigma = torch.where(kind == 1, BLUR[0] + (BLUR[1] - BLUR[0]) * strength, 1e-3)
    kernel = torch.exp(-0.5 * (torch.arange(-RADIUS, RADIUS + 1) / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    planes = F.pad(pixels.flatten(0, 1)[None], (RADIUS,) * 4, mode="reflect")
    planes = F.conv2d(planes, kernel.view(-1, 1, 1, width), groups=3 * number)
    blurred = F.conv2d(planes, kernel.view(-1, 1, width, 1), groups=3 * number).view_as(pixels)
    noise = torch.where(kind == 2, NOISE[0] + (NOISE[1] - NOISE[0]) * strength, 0)
    damaged = (blurred + noise.view(-1, 1, 1, 1) * torch.randn(pixels.shape, generator=lots)).clamp(-1, 1)
    known = truth["damage"].sum(1, keepdim=True)  # of marks it is not: they are drawn with blur and grain
    return damaged, {**truth, "damage": F.one_hot(kind, 3) * known}


def train(examples: Examples, epochs: int, seed: int, progress: Progress = quiet) -> SceneNet:
    """A network that has learned all heads at once; the same bits from the same seed and number of threads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SceneNet(**CONFIG)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's types
    lots = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(examples.pixels) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    for epoch in range(epochs):
        for rows in torch.randperm(len(examples.pixels), generator=lots).split(BATCH):
            pixels, truth = damage(*select(examples, rows), lots)
            features = network.embed(pixels.contiguous(memory_format=torch.channels_last))
            loss = torch.zeros(())
            for head, linear in network.heads.items():
                loss = loss - (truth[head] * linear(features).log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress("train", epoch + 1, epochs, f"loss {float(loss.detach()):.3f}")
    return network.eval()


def select(examples: Examples, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Pixels as the extractor makes them of pictures that have its side already, and what is true of them."""
    return (examples.pixels[rows].float() - 128) / 128, {head: value[rows] for head, value in examples.truth.items()}


@torch.inference_mode()
def accuracy(network: SceneNet, examples: Examples) -> dict[str, float]:
    """Head -> the share of pictures where the likeliest value is true; of two objects either one's is.

    All but `damage` is judged on clean pictures.
    """
    lots = torch.Generator().manual_seed(0)
    hits: dict[str, list[Tensor]] = {head: [] for head in HEADS}
    for rows in torch.arange(len(examples.pixels)).split(BATCH):
        pixels, truth = select(examples, rows)
        damaged, changed = damage(pixels, truth, lots)
        features, others = network.embed(pixels), network.embed(damaged)
        for head, linear in network.heads.items():
            shares = changed[head] if head == "damage" else truth[head]
            best = linear(others if head == "damage" else features).argmax(1)
            known = shares.sum(1) > 0
            hits[head].append((shares.gather(1, best[:, None])[:, 0] > 0)[known])
    return {head: float(torch.cat(found).float().mean()) for head, found in hits.items()}


def make(out: Path, count: int = COUNT, epochs: int = EPOCHS, seed: int = 0, progress: Progress = quiet) -> None:
    """Draw, train and write the network in half precision.

    Args:
        out: The folder.
        count: Pictures, about.
        epochs: Times that each is seen.
        seed: Of the weights and of the order.
        progress: Is called as it goes on.
    """
    write_scenes(train(draw(count, TRAIN_SEED, progress), epochs, seed, progress), CONFIG, out)


def tell(phase: str, done: int, total: int, detail: str = "") -> None:
    """Progress as lines of text."""
    print(phase, f"{done}/{total}", detail, file=sys.stderr, flush=True)


def main() -> None:
    """The command: make it, and say how often it is right on pictures that it has not seen."""
    parser = argparse.ArgumentParser(prog="python -m gtl.builtin_backbone", description="Make builtin:backbone.")
    parser.add_argument("--out", type=Path, default=builtin_folder(), help="its folder (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (%(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)  # so that the result does not depend on the cores
    make(given.out, seed=given.seed, progress=tell)
    network = open_scenes(given.out).network
    assert isinstance(network, SceneNet)
    for head, share in accuracy(network, draw(TEST_COUNT, TEST_SEED, tell)).items():
        print(f"{head:12} {share:7.2%}")


if __name__ == "__main__":
    main()
