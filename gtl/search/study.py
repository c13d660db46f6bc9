"""`gtl tune`: a study on Ray Tune, from its file to published adapters."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gtl.adapters import Registry
from gtl.config import Study
from gtl.config.load import dump_study, load_recipe, load_study
from gtl.config.metrics import METRICS
from gtl.config.names import new_version
from gtl.config.search import Fifo, RandomSearch
from gtl.evaluate.result import Evaluation
from gtl.report.command import write_page
from gtl.search.choose import Outcome, rank, top, winner
from gtl.search.claim import claimed
from gtl.search.record import ENDED, RECORD, STUDY, Record, TrialRecord, now, trial_name
from gtl.search.room import Room, fill, make_room
from gtl.search.space import carried, configurations
from gtl.search.standing import Audience, Watch
from gtl.search.strategy import KIND, advise, look_at, narrowed
from gtl.session import Cluster, session
from gtl.storage import Store
from gtl.train.launch import Start, begin, open_model, publish
from gtl.train.resources import choose_resources
from gtl.types import Progress, UserError, quiet

if TYPE_CHECKING:
    from gtl.search.trial import Place

FRESH = 1_000_003
"""Added to the seeds of pictures and of noise that trials were chosen by, for those that they are confirmed by."""


def tune(
    study: Study, name: str, *, resume: bool = False, progress: Progress = quiet, watch: Watch | None = None
) -> Record:
    """Run a study on the cluster and publish the best of it.

    Args:
        study: See `gtl.config.load_study`.
        name: Of the study, and of what it publishes unless that says another.
        resume: Go on with the newest unfinished study of that name; what is done is not done again.
        progress: Is called as it goes on.
        watch: Is called with how the trials stand, every few seconds.

    Raises:
        UserError: the study, the model, the data or the cluster is not what it has to be, no trial came to anything, or
            another process runs a study of that name.
        KeyboardInterrupt: it was stopped; `resume` goes on with it.
    """
    from gtl.search.schedule import check_searcher

    check_searcher(study)
    studies = Store(f"{study.base.storage.runs}/{name}")
    with claimed(studies, progress):
        version = unfinished(studies, study) if resume else new_version(dump_study(study))
        record = Record(studies.sub(version), name, version, study)
        run(study, record, progress, watch)
    page(record.folder)
    return record


def run(study: Study, record: Record, progress: Progress, watch: Watch | None) -> None:
    """Run what is left of a study, choose, publish; see `tune`."""
    from gtl.search.trial import Place

    folder = record.folder
    place = Place(study.model_dump(mode="json"), folder.url(), record.version)
    began = time.monotonic()

    def hours() -> float:
        return (time.monotonic() - began) / 3600

    with session(dashboard=True) as cluster:
        room = make_room(study, place, cluster)
        steps = fill(study, place, room, progress)
        folder.write(STUDY, dump_study(study).encode())
        if study.kinds == "auto":
            study = record.study = advised(study, record, progress)
        for number, values in listed(study):
            trial = trial_name(number)
            record.trials.setdefault(trial, TrialRecord(trial, values, place.run(number).url()))
        record.save(hours())
        try:
            search(study, place, record, room, cluster, Audience(progress, watch, hours), steps)
            choose(study, place, record, cluster, progress)
            record.ended = now()
        finally:
            record.save(hours())


def advised(study: Study, record: Record, progress: Progress) -> Study:
    """The study of those kinds that are worth trials, which its record says; asked once, however often it goes on."""
    if not record.advice:
        facts = look_at(study.base, progress)
        verdicts = advise(facts, study.space[KIND].values, study.num_trials)
        record.advice = {"images": str(facts), "kinds": [vars(one) for one in verdicts]}
        for line in record.advised():
            progress("kinds", 0, 0, line)
    return narrowed(study, [one["kind"] for one in record.advice["kinds"] if one["is_tried"]])


def page(folder: Store) -> None:
    """Write the page about a study into its folder; what goes wrong there is a warning."""
    try:
        write_page([folder], folder)
    except Exception as error:  # all is published, and `gtl report` makes the page again
        warnings.warn(f"{folder.url()}: no page of the study: {error}", stacklevel=2)


def unfinished(studies: Store, study: Study) -> str:
    """The newest version of a study that has not ended.

    Raises:
        UserError: there is none, or it is of another study.
    """
    versions = [version for version in studies.folders() if studies.exists(f"{version}/{STUDY}")]
    left = [version for version in versions if not has_ended(studies.sub(version))]
    if not left:
        raise UserError(f"--resume: no unfinished study under {studies.url()}")
    old = load_study(studies.url(f"{left[-1]}/{STUDY}"))
    mine, theirs = study.model_dump(mode="json"), old.model_dump(mode="json")
    harmless = ("trials", "budget", "concurrency", "publish", "confirm", "pack")
    if changed := [key for key in mine if mine[key] != theirs[key] and key not in harmless]:
        raise UserError(
            f"--resume: {studies.url(left[-1])} was started with another {', '.join(changed)}; put it back "
            f"({', '.join(harmless)} may differ), or start a new study without --resume"
        )
    return left[-1]


def has_ended(folder: Store) -> bool:
    """Whether a study has chosen."""
    return folder.exists(RECORD) and json.loads(folder.read(RECORD))["ended"] is not None


def listed(study: Study) -> list[tuple[int, dict[str, Any]]]:
    """Numbers and configurations, where they are known beforehand."""
    return list(enumerate(configurations(study))) if study.searcher.type in ("random", "grid") else []


def search(
    study: Study, place: Place, record: Record, room: Room, cluster: Cluster, audience: Audience, steps: int
) -> None:
    """Run the trials that are left, of so many steps at most; where a rate is carried over ranks, first those at the
    smallest.

    Raises:
        KeyboardInterrupt: the study was stopped.
    """
    first, trials = study.at_smallest_rank, record.trials
    if not any(one.carried for one in trials.values()):
        run_left(first, place, record, list(trials), room, cluster, audience, steps)
        if study.transfer_rank:
            carry(study, place, record)
            record.save(audience.hours())
    if added := [name for name, one in trials.items() if one.carried]:
        whole = first.model_copy(update={"scheduler": Fifo(), "searcher": RandomSearch()})
        run_left(whole, place, record, added, room, cluster, audience, steps)


def carry(study: Study, place: Place, record: Record) -> None:
    """List a trial at every other rank, of the configuration that was best at the smallest, if any ran to its end."""
    for best in rank(record.finished(), study.directions)[:1]:
        for values in carried(study, record.trials[best.trial].config):
            number = len(record.trials)
            trial = trial_name(number)
            record.trials[trial] = TrialRecord(trial, values, place.run(number).url(), carried=best.trial)


def run_left(
    study: Study, place: Place, record: Record, trials: Sequence[str], room: Room, cluster: Cluster,
    audience: Audience, steps: int,
) -> None:  # fmt: skip
    """Run those of some trials that are left, and what else a searcher asks for.

    Raises:
        KeyboardInterrupt: the study was stopped.
    """
    from gtl.search.pack import packs_for
    from gtl.search.tuning import run_trials

    left = [int(name) for name in sorted(trials) if record.trials[name].state not in ENDED]
    if study.searcher.type in ("random", "grid") and not left:
        return
    asked = study.num_trials - sum(one.state in ENDED for one in record.trials.values())
    with packs_for(study, place, room, cluster, max(asked, len(left)), audience.progress) as packs:
        run_trials(study, place, record, room, packs, left, audience, steps)


def choose(study: Study, place: Place, record: Record, cluster: Cluster, progress: Progress) -> None:
    """Measure the best trials again on fresh seeds, name the winner, publish.

    Raises:
        UserError: no trial ran to its end, or none of those has the study's metrics.
    """
    finished = record.finished()
    if not finished:
        reasons = dict.fromkeys(one.reason for one in record.trials.values() if one.reason)
        raise UserError(f"no trial ran to its end: {'; '.join(map(str, reasons)) or 'all were stopped'}")
    if not rank(finished, study.directions):
        raise UserError(f"metric: {', '.join(study.metrics)}: no trial that ran to its end has a finite number of each")
    best = [outcome.trial for outcome in top(finished, study.directions, max(study.confirm.top, study.publish.top, 1))]
    if study.confirm.top and study.metrics[0] in METRICS:
        found = confirm(study, place, best[: study.confirm.top], cluster, progress)
        won = winner(found, study.metrics[0])
        metric = study.metrics[0]
        scores = {trial: evaluation.scores[metric] for trial, evaluation in found.items()}
        measured = [Outcome(trial, {metric: score.value}) for trial, score in scores.items()]
        order = [outcome.trial for outcome in rank(measured, {metric: study.directions[metric]})]
        record.finalists = [
            {"trial": trial, "metric": metric, "value": scores[trial].value, "low": scores[trial].low,
             "high": scores[trial].high, "samples": scores[trial].num_fake or scores[trial].num_real}
            for trial in order
        ]  # fmt: skip
        record.winner = {"trial": won.trial, "text": str(won), "tied": list(won.tied)}
        best = [*order, *[trial for trial in best if trial not in order]]
    else:
        record.winner = {"trial": best[0], "text": f"{best[0]}: best by the study's own numbers", "tied": []}
    for trial in best[: study.publish.top]:
        start = start_of(place, trial, cluster)
        name = study.publish.name or record.name
        registry = Registry(start.recipe.storage.registry)
        card = publish(start, registry, name, f"{record.version}-{trial}", study=record.folder.url(), trial=trial)
        record.published.append(f"{card.name}@{card.version}")


def confirm(
    study: Study, place: Place, trials: Sequence[str], cluster: Cluster, progress: Progress
) -> dict[str, Evaluation]:
    """Evaluations of trials' published weights, on seeds that none of them was chosen by: of pictures, and of the noise
    that val_loss is at."""
    from gtl.data.reference import reference
    from gtl.evaluate.run import evaluate_all
    from gtl.generate.spread import Published

    shelf, base = Registry(f"{place.url}/finalists"), study.base
    chosen: dict[str, tuple[Published, ...]] = {}
    steps: dict[str, int] = {}
    for trial in trials:
        start = start_of(place, trial, cluster)
        publish(start, shelf)
        name = f"{start.job.name}@{start.job.version}"
        chosen[trial] = (Published(shelf.store.root, name, sampler=start.recipe.sampler),)
        steps[trial] = start.recipe.evaluate.steps
    asked = base.evaluate.model_copy(update={
        "metrics": list(study.measured), "seed": base.evaluate.seed + FRESH,
        "samples": study.confirm.samples or base.evaluate.samples,
    })  # fmt: skip
    family = open_model(base, progress)
    images = reference(base.data, family, base.storage.cache, progress)
    dtype = choose_resources(base, cluster).dtype
    found: dict[str, Evaluation] = {}
    for number in dict.fromkeys(steps.values()):
        alike = [trial for trial in trials if steps[trial] == number]
        recipe = base.model_copy(update={"evaluate": asked.model_copy(update={"steps": number})})
        found |= zip(alike, evaluate_all(
            recipe, shelf, [chosen[trial] for trial in alike], family, images, dtype, progress,
            noise=base.data.seed + FRESH,
        ), strict=True)  # fmt: skip
    return {trial: found[trial] for trial in trials}


def start_of(place: Place, trial: str, cluster: Cluster) -> Start:
    """A trial's run, as it was begun."""
    recipe = load_recipe(place.run(int(trial)).url("recipe.yaml"))
    return begin(recipe, trial, place.version, open_model(recipe, quiet), cluster, quiet)
