"""Pages about runs: what they hold, that they need nothing else, and how a real browser lays them out."""

import itertools
import json
import math
import re
import shlex
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gtl.cli import main
from gtl.config import Recipe, parse_recipe
from gtl.evaluate.result import Evaluation, Sampling, Score, differences_of_files
from gtl.images import encode_png, save_png
from gtl.report.chart import MAX_POINTS, Series, draw, linear_ticks, log_ticks, short, smooth
from gtl.report.command import report
from gtl.report.demo import Panel, render_demo
from gtl.report.facts import incomparable, next_commands, state
from gtl.report.run import MAX_PICTURES, read_run
from gtl.storage import Store
from gtl.train.scores import write_scores
from gtl.types import UserError
from tests.pages import EVIL, Page, contrast, find_browser, look

RECIPE = """
model: {{source: some/model}}
tuner: {{type: lora, init: {init}}}
objective: {{type: denoise}}
data: {{source: /images, resolution: 512, validation: 0.1, seed: 0}}
train: {{steps: {steps}, batch_size: 4, epochs: null, early_stopping: {stopping}}}
storage: {{registry: "/the registry"}}
"""
CARD = {
    "name": "dog", "version": "v1", "base": {"source": "some/model", "fingerprint": "f" * 64, "family": "sd"},
    "dataset": {"fingerprint": "d" * 64, "images": 7}, "code": "0.1.0", "libraries": {"torch": "2.8.0"},
    "created": "2026-01-02T03:04:05Z",
}  # fmt: skip


def make_run(
    runs: Store, name: str = "dog", version: str = "v1", *, steps: int = 40, finished: bool = True,
    rows: list[dict[str, Any]] | None = None, init: str = "null", stopping: str = "null",
) -> Store:  # fmt: skip
    """A run's folder as `gtl train` leaves it, without pictures; 10 steps, a look at every other."""
    run = runs.sub(f"{name}/{version}")
    run.write("recipe.yaml", RECIPE.format(steps=steps, init=init, stopping=stopping).encode())
    rows = make_rows() if rows is None else rows
    run.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode() + b'{"step": 11, "lo')
    if finished:
        result = {"steps": 10, "device": "cpu", "device_hours": 0.5, "best_step": 6}
        run.write("result.json", json.dumps(result).encode())
        run.write("adapter.json", json.dumps({**CARD, "name": name, "version": version}).encode())
    return run


def make_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": 0.0, **make_look(0)}]
    for step in range(1, 11):
        row = {"step": float(step), "loss": 1 / step, "grad_norm": 0.1 * step, "learning_rate": 1e-4,
               "images_per_second": 8.0, "step_seconds": 0.5, "data_wait": 0.0, "peak_memory_bytes": 2.0**30,
               "tflops": 1.5}  # fmt: skip
        rows.append({**row, **make_look(step)} if step % 2 == 0 else row)
    return rows


def make_look(step: int) -> dict[str, float]:
    quantiles = {f"val_loss_q{q}": (abs(step - 6) + q) / 10 for q in (1, 2, 3, 4)}
    return {"val_loss": sum(quantiles.values()) / 4, **quantiles}


def add_picture(run: Store, folder: Path, step: int, prompts: list[str], size: tuple[int, int] = (128, 64)) -> None:
    save_png(Image.new("RGB", size, (step % 256, 80, 160)), folder / "grid.png", {"prompts": prompts, "steps": step})
    run.upload(folder / "grid.png", f"samples/{step:08d}.png")


def add_scores(registry: Path, created: str, value: float, note: str = "") -> None:
    """An evaluation as `gtl evaluate` leaves it beside dog@v1."""
    score = {"value": value, "low": None, "high": None, "higher_is_better": False, "num_fake": 8, "num_real": 12,
             "extractor": "inception", "resize": "bicubic to 299 x 299", "dtype": "fp32", "note": note}  # fmt: skip
    sampling = {"prompts": ["a", "b"], "steps": 25, "guidance": 7.5, "width": 64, "height": 64, "dtype": "fp32",
                "seed": 3}  # fmt: skip
    values = {"created": created, "images": 12, "held_out": 3, "sampling": sampling, "scores": {
        "kid": score, "recall": {**score, "low": 0.25, "high": 0.5, "higher_is_better": True, "num_real": None},
    }}  # fmt: skip
    store = Store(registry / "dog" / "v1" / "evaluations")
    store.write(f"{created[:4]}.json", json.dumps(values).encode())
    store.write(f"{created[:4]}.png", encode_png(Image.new("RGB", (128, 64), "red"), {}))


def test_scores_stand_with_what_they_depend_on(tmp_path: Path) -> None:
    run = make_run(Store(tmp_path / "runs"))
    text = run.read("recipe.yaml").decode().replace("/the registry", str(tmp_path / "registry"))
    run.write("recipe.yaml", text.encode())
    for created, value in (("2026-01-02T03:04:05Z", 0.5), ("2027-01-02T03:04:05Z", 0.25)):
        add_scores(tmp_path / "registry", created, value, note=EVIL)
    first, second = read_run(run).scores
    assert first.title == (
        "2027-01-02 03:04 UTC: 8 samples of 2 prompts, 25 steps, guidance 7.5, 64x64, fp32, seeds from 3; "
        "12 real images, 3 of them held out"
    )
    assert first.rows[1] == {
        "metric": "recall", "value": "0.25", "95 % interval": "0.25 to 0.5", "better": "higher", "drawn": "8",
        "real": "", "extractor": "inception (bicubic to 299 x 299, fp32)",
    }  # fmt: skip
    assert (second.rows[0]["value"], second.rows[0]["95 % interval"]) == ("0.5", "none")
    page = make_page(run)
    assert f"kid: {EVIL}" in page.text
    assert sum(tag == "img" and "nearest" in values["alt"] for tag, values in page.elements) == 2


def add_look(run: Store, step: int, kid: float, seed: int = 0) -> None:
    """An evaluation of a look, as a run leaves it."""
    influence = [kid * ((i * 7 + seed) % 5 - 2) for i in range(20)]
    score = Score(value=kid, low=kid - 0.1, high=kid + 0.1, higher_is_better=False, num_fake=20, num_real=None,
                  extractor="builtin:backbone", resize="none", dtype="fp32", fake=influence)  # fmt: skip
    sampling = Sampling(prompts=["a"], negative_prompt="", seed=0, steps=2, guidance=1, height=64, width=64,
                        dtype="fp32")  # fmt: skip
    look = Evaluation(adapter="dog@v1", step=step, base={}, dataset="d", images=3, held_out=0, sampling=sampling,
                      scores={"kid": score}, samples=None)  # fmt: skip
    write_scores(run, look, None)


def test_looks_have_intervals_and_the_one_that_is_published_is_marked(runs: Store) -> None:
    run = make_run(runs, stopping="{metric: kid, patience: 2}")
    for step, kid in ((0, 5.0), (6, 1.0), (8, 2.0), (10, 3.0)):
        add_look(run, step, kid)
    found = read_run(run)
    assert found.series("kid") == [(0, 5.0), (6, 1.0), (8, 2.0), (10, 3.0)]
    assert found.bounds("kid")[1] == (6, 0.9, 1.1)
    assert state(found) == "stopped early"
    page = make_page(run)
    assert page.charts[:2] == ["Validation loss", "Validation loss by noise level"] and "kid" in page.charts
    marks = [values for tag, values in page.elements if tag == "line" and values["class"].startswith("mark")]
    assert len(marks) == 3  # on the validation losses and on kid
    assert sum(values.get("class", "").startswith("bound") for _, values in page.elements) == 4
    told = re.sub(r"\s+", " ", page.text)
    for fact in ("Best kid 1 at step 6", "Last kid 3 at step 10", "6, published", "1 (0.9 to 1.1)",
                 "dashed: step 6, published", "After 6 steps, "):  # fmt: skip
        assert fact in told
    assert "After 8 steps, " not in told


def test_scores_of_two_runs_differ_by_more_than_chance_or_not(runs: Store) -> None:
    one, two, other = (make_run(runs, name) for name in ("dog", "cat", "bird"))
    add_look(one, 6, 1.0)
    add_look(two, 6, 5.0, seed=1)
    page = Page(Path(report("dog", ["cat", "bird"], None, runs.url(), differences_of_files)).read_text())
    told = re.sub(r"\s+", " ", page.text)
    assert "How the scores differ cat@v1 less dog@v1 metric difference 95 % interval better kid +4 " in told
    assert re.search(r"kid \+4 3\.\d+ to 4\.\d+ dog@v1 after 6 steps ", told)
    assert "bird@v1 less dog@v1 Not compared: not scored both" in told
    assert read_run(other).scores == []


def make_page(run: Store, *others: Store, **options: Any) -> Page:
    return Page(Path(report(run.url(), [other.url() for other in others], None, "nowhere", **options)).read_text())


@pytest.fixture
def runs(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture
def shown(runs: Store, tmp_path: Path) -> Store:
    """A finished run with three grids."""
    run = make_run(runs, init="wolf@v3")
    for step in (0, 5, 10):
        add_picture(run, tmp_path, step, ["a dog", "a cat"])
    return run


def test_every_row_is_a_point_of_its_curve(shown: Store) -> None:
    page = make_page(shown)
    assert page.charts == [
        "Validation loss", "Validation loss by noise level", "Training loss", "Learning rate", "Gradient norm",
        "Throughput", "Arithmetic of one device", "Share of a step spent waiting for data",
    ]  # fmt: skip
    assert page.points("Validation loss") == [6]
    assert page.points("Validation loss by noise level") == [6, 6, 6, 6]
    for title in page.charts[2:]:
        assert page.points(title) == [10]
    levels = [line["label"] for line in page.lines if "by noise" in line["chart"]]
    assert levels == ["q1 (least noise)", "q2", "q3", "q4 (most noise)"]


def test_it_says_what_was_trained_on_what_and_what_to_type_next(shown: Store) -> None:
    page = make_page(shown)
    told = re.sub(r"\s+", " ", page.text)
    for fact in ("dog@v1 finished", "Steps 10 of 40", "Best validation loss 0.25 at step 6", "Training loss 0.1 at",
                 "Last validation loss 0.65 at step 10", "Published weights of step 6", "Time in steps 5.0 s",
                 "8 images/s (median; batch of 4, 512 pixels)", "Peak memory 1.00 GiB", "0.5 device-hours",
                 "Continues wolf@v3", f"Model fingerprint {'f' * 64}", f"Dataset fingerprint {'d' * 64}",
                 "/images (7 images)", "torch 2.8.0", "Published 2026-01-02 03:04:05 UTC", "tuner: {type: lora",
                 "gtl generate --adapter dog@v1 --prompt 'a dog' --out drawn --registry '/the registry'"):  # fmt: skip
        assert fact in told
    pictures = [values for tag, values in page.elements if tag == "img"]
    assert [values["alt"] for values in pictures] == [
        f"Samples after {step} steps: a dog; a cat" for step in (10, 0, 5, 10)
    ]  # fmt: skip


def test_it_needs_nothing_but_itself(shown: Store) -> None:
    file = Path(report(shown.url(), [], None, "nowhere"))
    page = Page(file.read_text())
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "object", "embed", "base", "form", "video"}
    for tag, values in page.elements:
        for name in ("src", "href", "srcset", "xlink:href", "data", "poster"):
            assert values.get(name, "data:").startswith("data:"), (tag, values)
        assert not [name for name in values if name.startswith("on")], (tag, values)
    assert not re.search(r"https?://|@import|url\(", file.read_text())
    assert {tag for tag, values in page.elements if values.get("role") == "img"} == {"svg"}
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements
    ids = [values["id"] for _, values in page.elements if "id" in values]
    assert len(ids) == len(set(ids))
    for tag, values in page.elements:
        if tag == "svg":
            assert set(values["aria-labelledby"].split()) <= set(ids)


def test_what_a_run_holds_is_shown_as_text(runs: Store, tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0, f"{EVIL}": 2.0} for step in (1, 2)]
    run = make_run(runs, rows=rows, init=json.dumps(EVIL))
    add_picture(run, tmp_path, 2, [EVIL, "a dog"])
    page = make_page(run)
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert not [values for _, values in page.elements if "onerror" in values]
    assert page.text.count(EVIL) >= 3  # the prompt, the recipe, the adapter that it continues
    assert EVIL in page.charts
    (alt,) = [values["alt"] for tag, values in page.elements if tag == "img"]
    assert EVIL in alt


def test_a_value_that_is_no_number_leaves_a_gap(runs: Store) -> None:
    values = [3.0, 2.0, math.nan, 1.5, None, 1.0, math.inf, math.inf, 0.5, "much"]
    rows = [{"step": i, "loss": value, "learning_rate": 1e-3} for i, value in enumerate(values)]
    page = make_page(make_run(runs, rows=rows, finished=False))
    assert page.points("Training loss") == [2, 2, 1]  # a missing value is no gap
    assert page.points("Learning rate") == [10]
    assert "nan" not in " ".join(values["points"] for tag, values in page.elements if tag == "polyline")
    chart = draw("x", [Series("a", [(0, math.nan)])])
    assert chart is None


def test_a_run_that_goes_on_has_a_page_too(runs: Store) -> None:
    run = make_run(runs, finished=False)
    page = make_page(run)
    assert "not finished" in page.text
    assert "not published yet" in page.text
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert f"gtl train {run.url()}/recipe.yaml --name dog --resume" in page.text


@pytest.mark.parametrize(
    ("steps", "stopping", "expected"),
    [
        (40, "null", "finished"),
        (40, "{metric: val_loss, patience: 2}", "stopped early"),  # the looks at 8 and 10 were worse than that at 6
        (40, "{metric: val_loss, patience: 3}", "finished"),
        (10, "{metric: val_loss, patience: 2}", "finished"),
        ("null", "{metric: val_loss, patience: 2}", "stopped early"),
    ],
)
def test_the_end_of_a_run_has_a_reason(runs: Store, steps: Any, stopping: str, expected: str) -> None:
    assert state(read_run(make_run(runs, steps=steps, stopping=stopping))) == expected


def test_two_runs_lie_over_each_other(runs: Store, shown: Store) -> None:
    other = make_run(runs, "cat", rows=[row for row in make_rows() if row["step"] <= 6], steps=6)
    file = Path(report("dog", ["cat"], None, runs.url()))
    assert file == Path(shown.url("comparison.html"))
    page = Page(file.read_text())
    assert page.points("Training loss", "c0") == [10]
    assert page.points("Training loss", "c1") == [6]
    assert page.points("Validation loss by noise level: q2") == [6, 4]
    assert [line["label"] for line in page.lines if line["chart"] == "Learning rate"] == ["dog@v1", "cat@v1"]
    told = re.sub(r"\s+", " ", page.text)
    assert "What differs in the recipes dog@v1 cat@v1 tuner.init wolf@v3 null train.steps 40 6 Curves" in told
    assert incomparable([read_run(shown), read_run(other)]) == []
    assert 'class="note"' not in file.read_text()


def test_losses_that_measure_different_things_are_said_to(runs: Store) -> None:
    one, two = make_run(runs), make_run(runs, "cat")
    two.write("recipe.yaml", two.read("recipe.yaml").replace(b"denoise", b"autoencode").replace(b"/images", b"/others"))
    page = make_page(one, two)
    assert "different objectives" in page.text
    assert "compare no validation losses" in page.text


def test_pages_are_found_by_name_version_and_folder(
    runs: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(runs, version="v1")
    make_run(runs, version="v2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GTL_RUNS", runs.url())
    pages = []
    for arguments in (["dog"], ["dog@v1"], ["runs/dog/v1", "--out", "page.html"], [f"{runs.url()}/dog/v2/"]):
        monkeypatch.setattr(sys, "argv", ["gtl", "report", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        pages.append(Path(capsys.readouterr().out.strip()))
    expected = [runs.url("dog/v2/report.html"), runs.url("dog/v1/report.html"), f"{tmp_path}/page.html"]
    assert [str(page) for page in pages] == [*expected, expected[0]]
    assert [re.findall("<h1>(.*)</h1>", page.read_text()) for page in pages[:3]] == [["dog@v2"], ["dog@v1"], ["dog@v1"]]


def test_mistakes_name_what_there_is(runs: Store, tmp_path: Path) -> None:
    make_run(runs)
    runs.write("empty/v1/recipe.yaml", b"{}")
    where = re.escape(runs.url())
    for text, message in (
        ("cat", f"run 'cat': no such run under {where}, where there is dog, empty; see --runs"),
        ("dog@v9", f"run 'dog@v9': dog has no such version under {where}; it has: v1"),
        ("dog:0.5", "run 'dog:0.5': a run has no scale; write NAME or NAME@VERSION"),
        ("empty", f"run empty@v1: no metrics yet in {where}/empty/v1; they come with its first steps"),
        (
            f"{runs.url()}/dog",
            f"run {where}/dog: no recipe.yaml or study.yaml in it; give the folder of one, RUNS/NAME/VERSION",
        ),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            report(text, [], None, runs.url())
    with pytest.raises(UserError, match="^--out there/: names a folder; name the page in it"):
        report("dog", [], "there/", runs.url())
    with pytest.raises(UserError, match="Is a directory"):
        report("dog", [], str(tmp_path), runs.url())


def test_a_bucket_is_as_good_as_a_folder(s3: str, tmp_path: Path) -> None:
    runs = Store(s3).sub(uuid.uuid4().hex)
    run = make_run(runs)
    add_picture(run, tmp_path, 10, ["a dog"])
    assert report("dog", [], None, runs.url()) == run.url("report.html")
    page = Page(run.read("report.html").decode())
    assert page.points("Training loss") == [10]
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 1


def test_what_a_run_in_a_bucket_says_to_type_goes_on_with_it(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(Store(s3).sub(uuid.uuid4().hex), finished=False)
    (command,) = next_commands(read_run(run))
    assert command == f"gtl train {run.url()}/recipe.yaml --name dog --resume"
    asked: list[Any] = []

    def train(recipe: Recipe, name: str, *, resume: bool, **_: object) -> None:
        asked.extend((recipe, name, resume))
        raise KeyboardInterrupt

    monkeypatch.setattr("gtl.train.launch.train", train)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit):
        main()
    assert asked == [parse_recipe(read_run(run).recipe), "dog", True]


def test_large_and_many_pictures_stay_a_small_page(runs: Store, tmp_path: Path) -> None:
    run = make_run(runs)
    for step in range(MAX_PICTURES + 6):
        add_picture(run, tmp_path, step, ["a dog"], (4096, 2048) if step == 3 else (64, 64))
    run.write("samples/00000001.png", b"no picture")
    run.write("samples/notes.txt", b"no picture either")
    found = read_run(run)
    steps = [picture.step for picture in found.pictures]
    assert steps[:4] == [0, 3, 4, 5]  # 1 is damaged
    assert (steps[-1], len(steps), found.num_pictures) == (29, MAX_PICTURES - 1, 30)
    assert f"{len(steps)} of the 30 grids" in make_page(run).text
    (large,) = [picture for picture in found.pictures if picture.width == 4096]
    assert large.uri.startswith("data:image/jpeg;base64,")
    assert len(large.uri) < 50_000


def test_a_run_whose_page_fails_has_its_adapter(tmp_path: Path) -> None:
    from gtl.train.launch import report as report_at_the_end

    with pytest.warns(UserWarning, match=r"no report of the run: run .*: no metrics yet"):
        report_at_the_end(Store(tmp_path))


def test_a_long_line_keeps_its_peaks() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    chart = draw("x", [Series("a", points)])
    assert chart is not None
    (line,) = chart.lines
    places = [tuple(map(float, place.split(","))) for place in line.parts[0].split()]
    assert len(places) <= MAX_POINTS
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert min(y for _, y in places) < chart.top + 20
    assert line.dots == []


def test_axes_have_round_ticks() -> None:
    assert linear_ticks(0, 60) == [0, 20, 40, 60]
    assert linear_ticks(0.93, 1.07) == pytest.approx([0.95, 1.0, 1.05])
    assert log_ticks(0.03, 1.5) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1.0])
    assert log_ticks(1e-9, 1e3) == pytest.approx([1e-9, 1e-6, 1e-3, 1.0, 1e3])
    assert [short(v) for v in (0, 0.0001, 1e-5, 0.30000000000000004, 1234, 25_000, 3.5e6, -2e4)] == [
        "0", "0.0001", "1e-5", "0.3", "1234", "25k", "3.5M", "-20k",
    ]  # fmt: skip
    for values in ([1.0], [0.0, 0.0], [-1.0, -1.0], [1e-12, 1e9], [0.0, 1e-30]):
        chart = draw("x", [Series("a", list(enumerate(values)))], log=True, zero=True)
        assert chart is not None
        assert chart.y_ticks
        assert all(chart.top <= dot.y <= chart.bottom for line in chart.lines for dot in line.dots)
    chart = draw("x", [Series("a", [(0, 0.01), (1, 100.0), (2, 1.0)])], log=True)
    assert chart is not None
    assert chart.log
    low, high, middle = (dot.y for dot in chart.lines[0].dots)
    assert middle == pytest.approx((low + high) / 2, abs=0.1)


def test_a_mean_is_of_the_steps_before() -> None:
    points = [(0.0, 1.0), (1.0, math.nan), (2.0, 3.0), (3.0, 5.0), (4.0, 7.0)]
    assert smooth(points, 2) == [(0.0, 1.0), (2.0, 2.0), (3.0, 4.0), (4.0, 6.0)]


def test_colours_can_be_read_by_day_and_by_night(shown: Store) -> None:
    blocks = re.findall(r":root \{(.*?)\}", Path(report(shown.url(), [], None, "nowhere")).read_text(), re.S)
    day, night = (dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in blocks)
    assert day.keys() == night.keys()
    for colours in (day, night):
        for ink, paper in itertools.product(("ink", "soft"), ("paper", "panel", "note")):
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
        for i in range(8):
            assert contrast(colours[f"c{i}"], colours["panel"]) >= 4.5, i


@pytest.fixture(scope="module")
def chromium() -> str:
    return find_browser()


@pytest.fixture
def demo_page(tmp_path: Path) -> Path:
    """The page of a demo, with two panels of two prompts and two models each."""
    picture = tmp_path / "picture.png"
    save_png(Image.new("RGB", (64, 64), "red"), picture, {})
    prompts = ["a photo of an uncommonly large red wug on a blue background", "a wug"]
    models = dict.fromkeys(("the base model", "with the concept adapter"), [picture, picture])
    scores = [{"prompts": "new prompts with the concept", "drawn by": model, "right": "57 of 60",
               "95 % interval": "86% to 99%", "goal": "95%, goal 90%: reached"} for model in models]  # fmt: skip
    page = render_demo(
        scores, [Panel("new prompts", prompts, models), Panel("old prompts", prompts, models)], {"concept": 400},
        {"concept": 600.0}, ["gtl generate --registry demo/registry --adapter demo-concept --prompt 'a wug' --out it"],
    )  # fmt: skip
    file = tmp_path / "demo.html"
    file.write_text(page, encoding="utf-8")
    return file


@pytest.mark.parametrize("is_dark", [False, True])
def test_a_phone_shows_it_without_scrolling_sideways(
    is_dark: bool, chromium: str, runs: Store, shown: Store, demo_page: Path, tmp_path: Path
) -> None:
    other = make_run(runs, "an-uncommonly-long-name-of-a-run-that-does-not-fit", "20261125-043753-919-324dee")
    pages = {
        report(shown.url(), [], None, ""): 4, report(shown.url(), [other.url()], None, ""): 4, str(demo_page): 8,
    }  # fmt: skip
    for file, pictures in pages.items():
        seen = look(chromium, Path(file), tmp_path, is_dark)
        assert seen["inner"] == 375
        assert seen["scroll"] <= seen["inner"]
        assert seen["dark"] is is_dark
        assert seen["paper"] == ("rgb(20, 23, 27)" if is_dark else "rgb(255, 255, 255)")
        assert seen["broken"] == 0
        assert seen["pictures"] == pictures
