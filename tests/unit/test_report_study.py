"""The page of a study: what it holds, in which order, how sure it is, and how a real browser lays it out."""

from __future__ import annotations

import json
import random
import re
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gtl.cli import main
from gtl.config.space import Domain
from gtl.images import save_png
from gtl.report.chart import Series, Tick, draw
from gtl.report.command import report
from gtl.report.importance import FEWEST, SHUFFLES, Importance, importance
from gtl.report.scale import MISSING, scale_of, scale_of_metric
from gtl.report.study import leader, read_study, standing
from gtl.report.study_charts import LEVELS, by_key, curves, make_board, trade_offs
from gtl.report.study_facts import searched
from gtl.report.study_reasons import reasons, standings
from gtl.storage import Store
from gtl.types import UserError
from tests.pages import EVIL, Page, contrast, find_browser, look

STUDY = """
recipe:
  train: {steps: 200}
  evaluate: {prompts: ["a red dog's house", a cat]}
  storage: {registry: "/a registry"}
set: {train.steps: 40}
space: {}
"""
SPACE = {
    "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "tuner.type": {"choice": ["lora", "freeze"]},
    "tuner.rank": {"choice": [4, 8, 16], "when": {"tuner.type": "lora"}},
}
RATES = [1e-4, 2e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3, 1e-2]
ACCURACIES = [0.1, 0.2, 0.3, 0.6, 0.7, 0.65, 0.25, None]
STATES = ["stopped", "stopped", "stopped", "finished", "finished", "finished", "stopped", "failed"]


def make_trial(runs: Store, number: int, **changes: Any) -> dict[str, Any]:
    """One of eight: the best rates are in the middle, and the highest diverges."""
    state, best = STATES[number], ACCURACIES[number]
    steps = {"finished": 40, "stopped": 10, "failed": 3}[state]
    config = {"train.learning_rate": RATES[number], "tuner.type": "freeze"}
    if number % 2 == 0:
        config |= {"tuner.type": "lora", "tuner.rank": (4, 8, 16, 4)[number // 2]}
    looks = [
        {"step": step, "prompt_accuracy": best * step / steps, "val_loss": 1 / step}
        for step in range(10, steps + 1, 10) if best is not None
    ]  # fmt: skip
    return {
        "trial": f"{number:05d}", "config": config, "state": state, "steps": steps, "looks": looks,
        "reason": "the loss is not finite" if state == "failed" else None,
        "metrics": {} if best is None else {"prompt_accuracy": best}, "best_step": None if best is None else steps,
        "device_hours": 0.25, "run": runs.url(f"study/v1/trials/{number:05d}/v1"), **changes,
    }  # fmt: skip


FINALISTS = [
    {"trial": trial, "metric": "prompt_accuracy", "value": value, "low": value - 0.1, "high": value + 0.1,
     "samples": 64} for trial, value in (("00005", 0.66), ("00004", 0.62), ("00003", 0.5))
]  # fmt: skip
ENDED = {
    "ended": "2026-03-01T13:30:00+00:00", "finalists": FINALISTS, "published": ["study@v1-00005", "study@v1-00004"],
    "winner": {"trial": "00005", "text": "00005: ahead of 00004: +0.04 (-0.1 to 0.18)", "tied": ["00004", "00003"]},
}  # fmt: skip


LOWER = {"val_loss": "min"}


def make_study(runs: Store, trials: list[dict[str, Any]] | None = None, **changes: Any) -> Store:
    """A study's folder as `gtl tune` leaves it."""
    folder = runs.sub("study/v1")
    values = {
        "schema": 1, "name": "study", "version": "v1", "metrics": ["prompt_accuracy"],
        "directions": {"prompt_accuracy": "max"}, "space": SPACE, "began": "2026-03-01T12:00:00+00:00", "ended": None,
        "trials": [make_trial(runs, number) for number in range(8)] if trials is None else trials, "finalists": [],
        "winner": None, "published": [], **changes,
    }  # fmt: skip
    folder.write("study.yaml", STUDY.encode())
    folder.write("study.json", json.dumps(values).encode())
    return folder


def add_grid(trial: Store, folder: Path, step: int, colour: str, prompts: list[str]) -> None:
    save_png(Image.new("RGB", (96, 48), colour), folder / "grid.png", {"prompts": prompts, "seed": 0, "steps": step})
    trial.upload(folder / "grid.png", f"samples/{step:08d}.png")


def open_page(folder: Store) -> Page:
    return Page(Path(report(folder.url(), [], None, "nowhere")).read_text())


def told_by(page: Page) -> str:
    return re.sub(r"\s+", " ", page.text)


def classes(page: Page, tag: str, name: str) -> list[str]:
    """The classes of the elements that have one, without it."""
    found = [values.get("class", "").split() for element, values in page.elements if element == tag]
    return [" ".join(part for part in one if part != name) for one in found if name in one]


@pytest.fixture
def runs(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture
def shown(runs: Store, tmp_path: Path) -> Store:
    """A finished study whose trials drew two grids each."""
    for number in range(7):
        for step, colour in ((30, "blue"), (40, "red")):
            add_grid(runs.sub(f"study/v1/trials/{number:05d}/v1"), tmp_path, step, colour, ["a red dog", "a cat"])
    return make_study(runs, **ENDED)


def test_those_measured_again_come_first_then_the_finished_the_stopped_and_the_failed(runs: Store) -> None:
    study = read_study(make_study(runs, **ENDED))
    order = ["00005", "00004", "00003", "00002", "00006", "00001", "00000", "00007"]
    assert [one.trial for one in standing(study)] == order
    page = open_page(Store(study.url))
    rows = [values["id"] for tag, values in page.elements if tag == "tr" and "id" in values]
    assert rows == [f"trial-{i}" for i in range(1, 9)]
    told = told_by(page)
    assert "trial learning_rate type rank prompt_accuracy measured again steps state 1 00005 0.002 freeze 0.65" in told
    assert "1 00005 0.002 freeze 0.65 0.66 (0.56 to 0.76) 40 finished 2 00004 0.0015 lora 16 0.7 0.62" in told
    assert "8 00007 0.01 freeze 3 failed: the loss is not finite" in told
    # without those, the search's own numbers decide, and nobody has won
    study = read_study(make_study(runs))
    assert [one.trial for one in standing(study)] == ["00004", "00005", *order[2:]]
    found = leader(study)
    assert found is not None and found.trial == "00004"


def test_it_says_what_was_searched_who_won_and_what_to_type_next(shown: Store, runs: Store) -> None:
    told = told_by(open_page(shown))
    for fact in (
        "study@v1 finished The winner: trial 00005 0.66 prompt_accuracy; 95 % interval 0.56 to 0.76, of 64 pictures",
        "00005: ahead of 00004: +0.04 (-0.1 to 0.18). Chance may have put it before all of 00004, 00003.",
        "learning_rate 0.002 type freeze", "3 finished 4 stopped 1 failed",
        "Searched train.learning_rate, tuner.type, tuner.rank For the highest prompt_accuracy Trials 8: 3 finished, 4",
        "prompt_accuracy in the search 0.65 at step 40 of 00005, the winner", "Time 1 h 30 min, began 2026-03-01 12:00",
        "Device time 2 device-hours", "Steps 163; 51 % of what the 8 trials that ended would have made in full",
        "Published study@v1-00005, study@v1-00004",
        "key searched winner worst that ran to its end train.learning_rate 0.0001 to 0.01, by its logarithm 0.002 0.0",
        "tuner.rank 4, 8, 16; where tuner.type is lora",
        "gtl generate --adapter study@v1-00005 --prompt 'a red dog'\"'\"'s house' --out drawn --registry '/a registry'",
        "gtl adapters promote study@v1-00005 prod --registry '/a registry'",
        f"gtl report {runs.url('study/v1/trials/00005/v1')} --compare {runs.url('study/v1/trials/00003/v1')}",
    ):  # fmt: skip
        assert fact in told, fact
    assert "gtl tune" not in told


def test_every_trial_is_in_every_drawing(shown: Store) -> None:
    page = open_page(shown)
    threads = classes(page, "polyline", "thread")
    # two layouts, one of which is shown; what is drawn last lies on top
    assert threads == ["failed", "stopped", "stopped", "stopped", "stopped", "r3", "r1", "lead"] * 2
    assert [line["points"] for line in page.lines if "thread" in line["class"]] == [4] * 16
    assert page.charts == [
        "All trials", "All trials", "prompt_accuracy, measured again", "prompt_accuracy by learning_rate",
        "prompt_accuracy by type", "prompt_accuracy by rank", "prompt_accuracy", "val_loss",
    ]  # fmt: skip
    spots = classes(page, "circle", "spot")
    assert len(spots) == 3 + 7 + 7 + 4  # measured again; by learning rate, by type, and by rank where there is one
    assert spots[:3] == ["lead", "r1", "r3"]
    assert len(classes(page, "text", "cross")) == 2  # the failed one has a rate and a type, and no value
    curves = [(line["label"], line["class"], line["points"]) for line in page.lines if line["chart"] == "val_loss"]
    assert curves == [
        *((f"0000{i}", f"line stopped n{n}", 1) for i, n in ((0, 7), (1, 6), (6, 5), (2, 4))),
        ("00003", "line r3 n3", 4), ("00004", "line r1 n2", 4), ("00005", "line lead n1", 4),
    ]  # fmt: skip
    assert "dashed: step 40, the best look of 00005" in told_by(page)


def test_a_trial_leads_to_its_row_which_marks_it_everywhere(shown: Store) -> None:
    file = Path(report(shown.url(), [], None, ""))
    page = Page(file.read_text())
    rows = {f"#{values['id']}" for tag, values in page.elements if tag == "tr" and "id" in values}
    links = [values["href"] for tag, values in page.elements if tag == "a"]
    assert set(links) == rows and len(links) == 2 * 8 + 3 + 7 + 7 + 4 + 2
    for i in range(1, 9):
        assert f"body:has(#trial-{i}:target) :is(.line.n{i}, .n{i} > :is(" in file.read_text()


def test_the_best_and_the_worst_draw_the_same_prompts(shown: Store, runs: Store) -> None:
    page = open_page(shown)
    alts = [values["alt"] for tag, values in page.elements if tag == "img"]
    assert alts == ["Samples of 00005 after 40 steps", "Samples of 00003 after 40 steps"]
    assert "What was asked for, left to right and row by row a red dog a cat" in told_by(page)
    trials = [make_trial(runs, number, best_step=30) for number in range(8)]
    page = open_page(make_study(runs, trials, **ENDED))
    assert [values["alt"][-8:] for tag, values in page.elements if tag == "img"] == ["30 steps"] * 2
    trials = [make_trial(runs, number, best_step=35, run=f"{runs.url()}/gone") for number in range(8)]
    assert not [tag for tag, _ in open_page(make_study(runs, trials, **ENDED)).elements if tag == "img"]


def test_losses_that_were_measured_again_are_of_held_out_images(runs: Store) -> None:
    trials = [make_trial(runs, number) for number in range(8)]
    for one in trials:
        one["metrics"] = {"val_loss": one["metrics"]["prompt_accuracy"]} if one["metrics"] else {}
    again = [{**one, "metric": "val_loss", "samples": 12} for one in FINALISTS]
    changes = {**ENDED, "metrics": ["val_loss"], "directions": LOWER, "finalists": again}
    told = told_by(open_page(make_study(runs, trials, **changes)))
    assert "val_loss; 95 % interval 0.56 to 0.76, of 12 held-out images at fresh noise" in told
    assert "val_loss, measured again" in told and "pictures on fresh seeds" not in told


def test_a_study_that_goes_on_has_a_page_too(runs: Store) -> None:
    trials = [make_trial(runs, number) for number in range(6)]
    trials[4] |= {"state": "running", "steps": 20}
    waiting = [make_trial(runs, n, state="waiting", looks=[], metrics={}, best_step=None, steps=0) for n in (6, 7)]
    folder = make_study(runs, trials + waiting)
    page = open_page(folder)
    told = told_by(page)
    assert "not finished The best so far: trial 00004 0.7 prompt_accuracy at step 40" in told
    assert "2 finished 3 stopped 1 running 2 waiting" in told
    assert f"gtl tune {folder.url()}/study.yaml --name study --resume" in told
    assert classes(page, "polyline", "thread")[:6] == ["stopped", "stopped", "stopped", "r3", "r1", "lead"]
    assert "waiting: " not in told and "Published" not in told and "began 2026-03-01 12:00 UTC" in told
    for few in ([], trials[:1], waiting, [make_trial(runs, 4, state="running", metrics={}, looks=[])]):
        page = open_page(make_study(runs, few))
        assert ("No trial has begun" in page.text) is (few in ([], waiting))


def test_what_a_study_holds_is_shown_as_text(runs: Store, tmp_path: Path) -> None:
    trials = [make_trial(runs, number) for number in range(8)]
    trials[5]["config"]["tuner.type"] = trials[5]["trial"] = EVIL
    trials[7]["reason"] = EVIL
    add_grid(Store(trials[5]["run"]), tmp_path, 40, "red", [EVIL])
    space = {**SPACE, "tuner.type": {"choice": ["lora", "freeze", EVIL]}}
    folder = make_study(runs, trials, space=space, winner={"trial": EVIL, "text": EVIL, "tied": []})
    folder.write("study.yaml", STUDY.encode() + f"note: {json.dumps(EVIL)}\n".encode())
    page = open_page(folder)
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert not [values for _, values in page.elements if "onerror" in values]
    for before in ("The winner: trial ", "failed: ", "lora, freeze, "):
        assert before + EVIL in told_by(page)
    assert json.dumps(EVIL) in page.text
    assert EVIL in [values["alt"] for tag, values in page.elements if tag == "img"][0]


def test_it_needs_nothing_but_itself(shown: Store) -> None:
    file = Path(report(shown.url(), [], None, "nowhere"))
    page = Page(file.read_text())
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "object", "embed", "base", "form", "video"}
    for tag, values in page.elements:
        for name in ("src", "href", "srcset", "xlink:href", "data", "poster"):
            assert values.get(name, "data:").startswith(("data:", "#trial-")), (tag, values)
        assert not [name for name in values if name.startswith("on")], (tag, values)
    assert not re.search(r"https?://|@import|url\(", file.read_text())
    ids = [values["id"] for _, values in page.elements if "id" in values]
    assert len(ids) == len(set(ids))
    for tag, values in page.elements:
        if tag == "svg":
            assert set(values["aria-labelledby"].split()) <= set(ids)


def test_a_trade_off_has_a_front_of_those_that_ran_to_their_end(runs: Store) -> None:
    sizes = [1e5, 2e5, 3e5, 4e5, 9e5, 5e5, 1e5, 1e5]
    trials = [make_trial(runs, number) for number in range(8)]
    for trial, size in zip(trials, sizes, strict=True):
        if trial["state"] != "failed":
            trial["metrics"]["adapter_bytes"] = size
    both = {"metrics": ["prompt_accuracy", "adapter_bytes"],
            "directions": {"prompt_accuracy": "max", "adapter_bytes": "min"}}  # fmt: skip
    trials[3]["metrics"]["prompt_accuracy"] = 0.64  # 00003: smallest; 00005: between; 00004: best
    board = make_board(read_study(make_study(runs, trials, **both)))
    (chart,) = trade_offs(board)
    assert (chart.title, len(chart.spots)) == ("prompt_accuracy and adapter_bytes", 7)
    places = {spot.entry.text[:5]: f"{spot.x:g},{spot.y:g}" for spot in chart.spots}
    assert chart.front.split() == [places["00003"], places["00005"], places["00004"]]
    page = open_page(make_study(runs, trials, **both))
    assert [len(values["points"].split()) for tag, values in page.elements if values.get("class") == "front"] == [3]
    assert [line["points"] for line in page.lines if "thread" in line["class"]] == [5] * 16
    assert "What goes with adapter_bytes" in page.text
    assert standings(board.study, "prompt_accuracy")["00007"] == 7
    assert "00007" not in standings(board.study, "adapter_bytes")  # it has no size, which is not a large one
    assert all("end of what was searched" not in " ".join(one.told) for one in reasons(board, "adapter_bytes"))


def test_axes_are_logarithmic_where_the_domain_is_and_listed_where_it_is_a_choice(runs: Store) -> None:
    rates = scale_of("lr", Domain(loguniform=(1e-4, 1e-2)), [], 0, 300)
    assert [rates.place(value) for value in (1e-4, 1e-3, 1e-2)] == [0, 150, 300] and rates.is_log
    depths = scale_of("depth", Domain(quniform=(0.0, 0.8, 0.2)), [], 0, 300)
    assert depths.place(0.4) == 150 and not depths.is_log
    ranks = scale_of("rank", Domain(choice=(4, 8, 16)), [8, 64], 0, 400, absent=-9)
    assert [ranks.place(value) for value in (4, 8, 16, 64, MISSING)] == [50, 150, 250, 350, -9]
    assert [tick.text for tick in ranks.ticks] == ["4", "8", "16", "64"]
    parts = scale_of("train", Domain(choice=(["unet", "text_encoder"], ["unet"], None)), [], 0, 300)
    assert [tick.text for tick in parts.ticks] == ['["unet", "text…', '["unet"]', "null"]
    assert parts.place(["unet"]) == 150 and parts.place(None) == 250
    losses = scale_of_metric("val_loss", [0.01, 1.0], True, 300, 0)  # the lower the farther to the right
    assert losses.is_log and losses.place(0.01) > losses.place(0.1) > losses.place(1.0) >= 0
    # labels do not lie over each other
    many = scale_of("seed", Domain(choice=tuple(range(1000, 1040))), [], 0, 300)
    gaps = [b.at - a.at for a, b in zip(many.ticks, many.ticks[1:], strict=False)]
    assert len(many.places) == 40 and min(gaps) >= 4 * 6.2


def test_labels_that_have_no_room_are_told_apart_or_left_out() -> None:
    def texts(values: list[Any], width: float) -> list[str]:
        return [tick.text for tick in scale_of("key", Domain(choice=tuple(values)), [], 0, width).ticks]

    rates = [1e-4, 2e-4, 3.5e-4, 5e-4, 7.5e-4, 1e-3, 2e-3]
    assert texts(rates, 304) == ["0.0001", "0.0002", "0.0005", "0.001", "0.002"], "a part of a number is another one"
    assert texts(rates, 900) == ["0.0001", "0.0002", "0.00035", "0.0005", "0.00075", "0.001", "0.002"]
    assert texts(["attention", "feed_forward"], 140) == ["attention", "feed_forw…"]
    assert texts(["down_blocks.0", "down_blocks.1"], 120) == ["…locks.0", "…locks.1"]
    assert texts(["all-linear+conv", "all-linear-conv"], 60) == ["all-linear+conv"]


def test_looks_after_one_step_stand_in_the_middle_of_an_axis_with_that_step() -> None:
    chart = draw("val_loss", [Series("a", [(200.0, 0.5)]), Series("b", [(200.0, 0.25)])])
    assert chart is not None
    assert chart.x_ticks == [Tick((chart.left + chart.right) / 2, "200")]
    assert [dot.x for line in chart.lines for dot in line.dots] == [(chart.left + chart.right) / 2] * 2


def test_an_axis_ends_before_what_is_far_out_on_its_worse_side(runs: Store) -> None:
    losses = [0.31, 0.312, 0.314, 0.316, 0.32, 0.324, 0.328, 0.9, 0.97]
    lower = scale_of_metric("val_loss", losses, True, 200, 0, direction="min")
    assert lower.far == [0.9, 0.97] and lower.beyond == "2 beyond the end (0.9 to 0.97)"
    assert lower.place(0.97) == lower.place(0.9) == 0 and lower.place(0.328) == pytest.approx(
        200 * 0.06 / 1.12, abs=0.1
    )
    assert [lower.side(value) for value in (0.31, 0.328, 0.9, MISSING)] == [0, 0, -1, 0]  # up is where places are small
    across = scale_of_metric("val_loss", losses, True, 0, 200, direction="min")
    assert (across.place(0.97), across.side(0.97)) == (200, 1)
    for values, direction in ((losses, "max"), (losses, ""), (losses[2:], "min"), ([1.0] * 8 + [9.0], "min")):
        whole = scale_of_metric("val_loss", values, True, 200, 0, direction=direction)
        assert whole.far == [] and whole.beyond == "" and whole.place(max(values)) > 0  # the best is never cut off


def test_a_trial_that_diverged_is_an_arrow_at_the_edge(runs: Store) -> None:
    trials = [make_trial(runs, n, state="finished", metrics={"val_loss": 0.31 + n / 500}) for n in range(8)]
    trials += [make_trial(runs, 0, trial="00008", state="finished", metrics={"val_loss": 0.97})]
    folder = make_study(runs, trials, metrics=["val_loss"], directions=LOWER)
    chart = by_key(make_board(read_study(folder)), "train.learning_rate", "val_loss")
    assert chart is not None and "triangles: 1 beyond the end (0.97)" in chart.note
    (far,) = [spot for spot in chart.spots if spot.arrow]
    assert (far.entry.text[:5], far.y, far.side) == ("00008", chart.top, (0, -1))
    assert max(spot.y for spot in chart.spots) - min(spot.y for spot in chart.spots if not spot.arrow) > 140
    for one in trials:
        one["looks"] = [{"step": 10, "val_loss": 0.5}, {"step": 40, "val_loss": one["metrics"]["val_loss"]}]
    (lines,) = curves(make_board(read_study(make_study(runs, trials, metrics=["val_loss"], directions=LOWER))))
    assert lines.unit == "at the edge: 1 beyond the end (0.97)"
    assert [float(tick.text) for tick in lines.y_ticks] == [0.3, 0.35, 0.4, 0.45, 0.5]  # how the others began is in it
    (ended,) = [line.parts[0].rpartition(",")[2] for line in lines.lines if line.label == "00008"]
    assert float(ended) == lines.top
    page = open_page(folder)
    assert len(classes(page, "polygon", "spot")) == 2  # by rank too few tell what is far
    assert "better on the right, 1 beyond the end (0.97)" in told_by(page)


def test_equal_listed_values_stand_side_by_side(runs: Store) -> None:
    chart = by_key(make_board(read_study(make_study(runs))), "tuner.type", "prompt_accuracy")
    assert chart is not None
    xs = sorted(spot.x for spot in chart.spots)
    assert len(set(xs)) == 8
    left = [spot.x for spot in chart.spots if "type lora" in spot.entry.text]
    assert sum(left) / 4 == pytest.approx(chart.x_ticks[0].at) and max(left) - min(left) == pytest.approx(27)


def found(domain: Domain, values: list[Any], places: list[float]) -> Importance:
    share = importance(domain, values, places)
    assert share is not None
    return share


def test_a_key_that_decides_has_all_of_the_order_and_one_that_does_not_has_none() -> None:
    ranks = Domain(choice=(4, 8))
    values = [4] * 8 + [8] * 8
    all_of_it = found(ranks, values, [0] * 8 + [1] * 8)
    assert all_of_it.share == 1 and all_of_it.is_clear
    assert [(group.text, group.members) for group in all_of_it.groups] == [
        ("4", tuple(range(8))),
        ("8", tuple(range(8, 16))),
    ]
    none_of_it = found(ranks, values, [0, 1, 2, 3, 4, 5, 6, 7] * 2)
    assert none_of_it.share == 0 and not none_of_it.is_clear
    # Kelley's epsilon squared of ranks 1-3, 5 against 4, 6-8: eta squared 0.7619, of which chance has 1/7
    half = found(ranks, [4, 4, 4, 8, 4, 8, 8, 8], list(range(8)))
    eta = (4 * (2.75 - 4.5) ** 2 + 4 * (6.25 - 4.5) ** 2) / 42
    assert half.share == pytest.approx((eta - 1 / 7) / (1 - 1 / 7), abs=3 / SHUFFLES**0.5)


def test_a_best_value_in_the_middle_is_found() -> None:
    rates = Domain(loguniform=(1e-4, 1e-2))
    values = [1e-4 * 100 ** (i / 15) for i in range(16)]
    order = sorted(range(16), key=lambda i: abs(i - 7.4))
    hump = found(rates, values, [float(order.index(i)) for i in range(16)])
    assert hump.is_clear and hump.share == pytest.approx(0.62, abs=0.02)
    assert hump.groups[0].text == "0.000341 to 0.00293"
    assert found(rates, [values[i] for i in reversed(range(16))], [float(order.index(i)) for i in range(16)]).is_clear


def test_chance_seems_to_decide_in_one_of_twenty_cases() -> None:
    rates, generator = Domain(uniform=(0, 1)), random.Random(0)
    clear = [
        found(rates, [generator.random() for _ in range(12)], list(range(12))).is_clear for _ in range(60)
    ]  # fmt: skip
    assert 1 <= sum(clear) <= 7


def test_too_few_trials_say_nothing() -> None:
    ranks, rates = Domain(choice=(4, 8)), Domain(uniform=(0, 1))
    assert importance(ranks, [4, 8] * 2, [0, 1, 2, 3]) is None and FEWEST == 6
    assert importance(ranks, [4] * 8, list(range(8))) is None
    assert importance(rates, [0.5] * 8, list(range(8))) is None
    assert importance(ranks, [4, 8] * 4, [0] * 8) is None
    assert importance(Domain(choice=tuple(range(8))), list(range(8)), list(range(8))) is None


def test_the_page_says_which_values_were_best_and_whether_a_wider_range_may_be_better(runs: Store) -> None:
    trials = [make_trial(runs, n) for n in range(8)]
    for n in range(8):  # the same with the other type
        other = {"tuner.type": "freeze"} if n % 2 == 0 else {"tuner.type": "lora", "tuner.rank": (16, 4, 8, 8)[n // 2]}
        config = {"train.learning_rate": RATES[n], **other}
        trials.append({**make_trial(runs, n), "trial": f"0001{n}", "config": config})
    board = make_board(read_study(make_study(runs, trials, **ENDED)))
    first, *rest = reasons(board, "prompt_accuracy")
    assert first.key == "train.learning_rate"
    assert first.told[1:] == [
        "Best at 0.0005 to 0.002: median prompt_accuracy 0.625 (8 trials).",
        "Worst at 0.004 to 0.01: median prompt_accuracy 0.25 (4 trials, 2 failed).",
    ]
    assert sorted(one.key for one in rest) == ["tuner.rank", "tuner.type"] and not any(one.best for one in rest)
    told = told_by(open_page(Store(board.study.url)))
    assert re.search(r"The order of the trials goes with learning_rate \(\d\d %\)\. Best at 0\.0005 to 0\.002: ", told)
    assert "Of type, rank these trials show no more than chance would." in told
    # half as many are too few to tell that from chance, or to tell anything
    first, _, last = reasons(make_board(read_study(make_study(runs, trials[:8]))), "prompt_accuracy")
    assert "no more than chance explains" in first.told[0] and not first.best
    assert last.told == ["Fewer than 6 trials have ended with it, or all alike: too few to say."]
    # the best at the upper end
    rising = [{**one, "state": "finished", "metrics": {"prompt_accuracy": one["config"]["train.learning_rate"]}}
              for one in trials]  # fmt: skip
    first, *_ = reasons(make_board(read_study(make_study(runs, rising))), "prompt_accuracy")
    assert first.told[-1] == "00007 is at the upper end of what was searched: beyond it may lie better ones."


def test_a_trial_that_failed_late_is_last_whatever_it_was_before(runs: Store) -> None:
    trials = [make_trial(runs, n) for n in range(8)]
    trials[7] |= {"metrics": {"prompt_accuracy": 0.9}, "looks": [{"step": 10, "prompt_accuracy": 0.9}], "best_step": 10}
    study = read_study(make_study(runs, trials, **ENDED))
    board = make_board(study)
    assert standings(study, "prompt_accuracy") == {
        f"0000{n}": place for n, place in enumerate((6, 5, 3, 2, 0, 1, 4, 7))
    }
    chart = by_key(board, "train.learning_rate", "prompt_accuracy")
    assert chart is not None
    (cross,) = [spot for spot in chart.spots if spot.is_cross]
    assert cross.y == min(spot.y for spot in chart.spots) and cross.entry.kind == "failed"
    assert chart.description == "prompt_accuracy against train.learning_rate: 8 trials, 1 failed"


def test_domains_are_told_in_words() -> None:
    assert [searched(domain) for domain in (
        Domain(quniform=(0.0, 0.8, 0.2)), Domain(randint=(1, 9)), Domain(grid=(1e-4, "auto", [1, 2])),
        Domain(qloguniform=(1e-3, 1.0, 1e-3), when={"tuner.type": ["lora", "full"]}),
    )] == [
        "0 to 0.8 in steps of 0.2", "1 to 9", "0.0001, auto, [1, 2]",
        "0.001 to 1 in steps of 0.001, by its logarithm; where tuner.type is lora or full",
    ]  # fmt: skip


def test_colours_from_best_to_worst_can_be_told_by_day_and_by_night(shown: Store) -> None:
    blocks = re.findall(r":root \{(.*?)\}", Path(report(shown.url(), [], None, "nowhere")).read_text(), re.S)
    day, night = (dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in blocks)
    for colours in (day, night):
        ladder = [contrast(colours[f"r{level}"], colours["panel"]) for level in range(LEVELS)]
        assert ladder == sorted(ladder, reverse=True) and ladder[-1] >= 2.9
        assert contrast(colours["gone"], colours["panel"]) >= 2.8


def test_studies_are_found_as_runs_are(
    shown: Store, runs: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GTL_RUNS", runs.url())
    monkeypatch.setattr(sys, "argv", ["gtl", "report", "study"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert capsys.readouterr().out.strip() == shown.url("report.html")
    assert report("study@v1", [], None, runs.url()) == shown.url("report.html")
    runs.write("other/v1/recipe.yaml", b"{}")
    for run, others in (("study", ["other"]), ("other", ["study"])):
        with pytest.raises(UserError, match="^--compare: study is a study, which has a page of its own; compare runs"):
            report(run, others, None, runs.url())
    shown.delete("study.json")
    with pytest.raises(UserError, match="^study study@v1: no study.json yet in .*; it comes with the first trial$"):
        report("study", [], None, runs.url())


def test_a_bucket_is_as_good_as_a_folder(s3: str, tmp_path: Path) -> None:
    runs = Store(s3).sub(uuid.uuid4().hex)
    folder = make_study(runs, **ENDED)
    add_grid(runs.sub("study/v1/trials/00005/v1"), tmp_path, 40, "red", ["a dog"])
    assert report("study", [], None, runs.url()) == folder.url("report.html")
    page = Page(folder.read("report.html").decode())
    assert len(classes(page, "polyline", "thread")) == 16
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 1


@pytest.mark.parametrize("is_dark", [False, True])
def test_a_phone_shows_it_without_scrolling_sideways(is_dark: bool, shown: Store, tmp_path: Path) -> None:
    browser = find_browser()
    values = json.loads(shown.read("study.json"))
    values["trials"][7]["reason"] = "an_uncommonly_long_reason_without_a_space_in_it_" * 8
    shown.write("study.json", json.dumps(values).encode())
    seen = look(browser, Path(report(shown.url(), [], None, "")), tmp_path, is_dark)
    assert seen["inner"] == 375
    assert seen["scroll"] <= seen["inner"]
    assert seen["dark"] is is_dark
    assert (seen["pictures"], seen["broken"]) == (2, 0)
