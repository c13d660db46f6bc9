"""What was measured of the pictures of a run's looks, in the run's folder."""

from __future__ import annotations

from gtl.evaluate.result import Evaluation
from gtl.report.evaluations import LOOKS
from gtl.storage import Store


def write_scores(run: Store, evaluation: Evaluation, nearest: bytes | None) -> None:
    """Keep a look's evaluation, and the picture of the samples nearest to images trained on."""
    key = f"{LOOKS}/{evaluation.step:08d}"
    if nearest is not None:
        run.write(f"{key}.png", nearest)
    run.write(f"{key}.json", evaluation.to_json())


def scored(run: Store) -> list[int]:
    """Steps of the looks that were measured."""
    keys = [key.rpartition("/")[2] for key, _, _ in run.list(LOOKS, recursive=False)]
    return sorted(int(key.removesuffix(".json")) for key in keys if key.endswith(".json"))


def read_scores(run: Store, step: int) -> dict[str, float]:
    """What a look measured."""
    return {name: score.value for name, score in read_evaluation(run, step).scores.items()}


def read_evaluation(run: Store, step: int) -> Evaluation:
    """All that is known of what a look measured."""
    return Evaluation.model_validate_json(run.read(f"{LOOKS}/{step:08d}.json"))


def forget_scores(run: Store, step: int) -> None:
    """Remove those of later steps, which a resumed run will make again."""
    for later in scored(run):
        if later > step:
            run.delete(f"{LOOKS}/{later:08d}.json")
            run.delete(f"{LOOKS}/{later:08d}.png")
