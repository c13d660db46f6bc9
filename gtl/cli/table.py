"""The command line: typed functions in one table, parsed before torch or ray is imported."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from gtl import __version__
from gtl.cli import adapters, bench, drawing, features, jobs, usage
from gtl.cli.bar import Bar
from gtl.cli.options import AsJson, RecipeFile, Revision, Set, Variant
from gtl.cli.study_table import StudyBar
from gtl.types import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Fine-tune, search and serve image generators on a Ray cluster.")  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Look at training images before training on them.")


@app.command()
def init(
    folder: Annotated[str, typer.Argument(help="Folder or bucket URL of images.")],
    model: Annotated[str | None, typer.Option(help="To fine-tune; what suits this machine when left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file; the folder's name when left out.")] = None,
) -> None:
    """Look at images and write a commented recipe for them."""
    from gtl.data.draft import write_draft

    with Bar() as bar:
        draft = write_draft(folder, model, out, bar)
    print(draft.file)
    print(f"next: {draft.command}", file=sys.stderr)


@app.command()
def train(
    recipe: RecipeFile,
    set_: Set = None,
    name: Annotated[str | None, typer.Option(help="Of the run and its adapter; the recipe's file name.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest unfinished run.")] = False,
) -> None:
    """Fine-tune a model and publish the adapter; the last line names it."""
    from gtl.config import load_recipe
    from gtl.config.names import check_name

    loaded = load_recipe(recipe, set_ or ())
    run = check_name(name or Path(recipe).stem.lower(), "--name" if name else f"--name, left out, of {recipe}")
    from gtl.report.command import PAGE
    from gtl.storage import Store
    from gtl.train.launch import train as launch

    try:
        with Bar() as bar:
            published = launch(loaded, run, resume=resume, progress=bar)
    except KeyboardInterrupt as error:  # of which typer would only keep the exit status
        print(str(error) or "interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    page = Store(f"{loaded.storage.runs}/{published.name}/{published.version}")
    if page.exists(PAGE):
        print(f"report {page.url(PAGE)}")
    print(f"adapter {published}")


@app.command()
def plan(
    recipe: RecipeFile,
    set_: Set = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="NODESxGPUSxKIND", help="Such as 8x8xH100; this machine when left out.")
    ] = None,
    price: Annotated[float | None, typer.Option(metavar="DOLLARS", help="For an hour of one GPU; adds costs.")] = None,
    network: Annotated[
        float | None, typer.Option(metavar="GBIT", help="A second, of one machine; else what its GPUs usually have.")
    ] = None,
    utilization: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of a GPU's peak that it attains: a run's mfu; else 0.25.")
    ] = None,
    json_: AsJson = False,
) -> None:
    """What a recipe needs of each GPU, what `auto` will choose, and what steps take: from config files alone."""
    from gtl.config import load_recipe
    from gtl.train.forecast import as_json, forecast, render
    from gtl.train.outlook import Asked

    loaded = load_recipe(recipe, set_ or ())
    with Bar() as bar:
        found = forecast(loaded, cluster, bar, Asked(price, network, utilization))
    print(json.dumps(as_json(found), indent=2) if json_ else render(found, loaded))


@app.command()
def report(
    run: Annotated[str | None, typer.Argument(metavar="RUN|STUDY", help="NAME, NAME@VERSION or its folder.")] = None,
    compare: Annotated[list[str] | None, typer.Option(metavar="RUN", help="Another run, shown beside it.")] = None,
    table: Annotated[Literal["transfer"] | None, typer.Option(
        help="Instead: every kind of transfer beside its baseline, trained and measured here, in the folder --out.",
    )] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="KIND", help="Of --table; all when left out.")] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="The page; else in the run's folder.")] = None,
    runs: Annotated[str, typer.Option(envvar="GTL_RUNS", help="Folder or bucket URL of runs.")] = "./runs",
) -> None:  # fmt: skip
    """Write a page about a run (curves, samples, lineage) or a study (who won, and why): one HTML file."""
    if table is not None:
        from gtl.bench import transfer

        with Bar() as bar:
            rows = transfer.bench_transfer(Path(out or table), only or (), bar)
        print(transfer.table(rows))
        return
    if run is None:
        raise UserError("RUN: missing; expected the name of a run or a study, or --table transfer")
    from gtl.evaluate.result import differences_of_files
    from gtl.report.command import report as write

    print(write(run, compare or [], out, runs, differences_of_files if compare else None))


@app.command()
def cache(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|gc", help="A recipe file, or gc.")], set_: Set = None
) -> None:
    """Encode a recipe's images and captions into the cache; `gc` removes what nothing used for a month."""
    if recipe == "gc":
        from gtl.data.garbage import collect_garbage
        from gtl.storage import Store

        removed, freed = collect_garbage(Store(os.environ.get("GTL_CACHE", "./cache")))
        print(f"removed {removed} files, {freed / 2**20:.1f} MiB")
        return
    from gtl.config import load_recipe
    from gtl.train.launch import fill_cache

    with Bar() as bar:
        dataset = fill_cache(load_recipe(recipe, set_ or ()), bar)
    print(f"dataset {dataset.fingerprint[:12]}: {len(dataset.entries)} images")


@app.command()
def shrink(
    model: Annotated[str, typer.Argument(help="Hub id, folder or bucket URL of a model with a UNet.")],
    out: Annotated[Path, typer.Option(help="A new folder for the smaller model.")],
    layers: Annotated[int | None, typer.Option(help="Of every section; all when left out.")] = None,
    drop_middle: Annotated[bool, typer.Option("--drop-middle", help="Leave the middle section out.")] = False,
    revision: Revision = None,
    variant: Variant = None,
) -> None:
    """Make a smaller model of a model, for objective.type: distill; its layers begin as they were."""
    from gtl.families.shrink import shrink as make

    now, before = make(model, out, layers=layers, drop_middle=drop_middle, revision=revision, variant=variant)
    print(f"{out}: {now / 1e6:.3g} of {before / 1e6:.3g} million weights")


@app.command()
def evaluate(
    recipe: RecipeFile,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME[@VERSION|@ALIAS][:SCALE]", help="Each is scored alone; repeat it.")
    ] = None,
    together: Annotated[bool, typer.Option("--together", help="Also all of the adapters at once.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Also the model alone; it is, without an adapter.")] = False,
    set_: Set = None,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the scores here.")] = None,
) -> None:
    """Score a model and adapters on it by their pictures and held-out images; say which differences are no chance."""
    from gtl.config import load_recipe
    from gtl.evaluate.result import table
    from gtl.evaluate.run import evaluate as score
    from gtl.storage import Store

    loaded, each = load_recipe(recipe, set_ or ()), adapter or []
    if together and len(each) < 2:
        raise UserError("--together: is of several adapters; repeat --adapter")
    with Bar() as bar:
        found = score(loaded, [*([None] if base or not each else []), *each, *([each] if together else [])],
                      progress=bar)  # fmt: skip
    if json_ is not None:
        text = json.dumps([json.loads(evaluation.to_json()) for evaluation in found], indent=1) + "\n"
        Store(json_.parent).write(json_.name, text.encode())
    print(table(found))


@app.command()
def prompts(
    recipe: RecipeFile,
    adapter: Annotated[list[str] | None, typer.Option(metavar="NAME[@VERSION|@ALIAS][:SCALE]")] = None,
    templates: Annotated[str | None, typer.Option(
        metavar="FILE", help="YAML of `templates` and of `additions` to them; some for photographs when left out.",
    )] = None,
    metric: Annotated[str | None, typer.Option(help="Of pictures; the first of the recipe's when left out.")] = None,
    tries: Annotated[int, typer.Option(help="Templates to draw with.")] = 12,
    writer: Annotated[str | None, typer.Option(
        metavar="FOLDER|ID", help="A language model of transformers, which writes more of them from what fails.",
    )] = None,
    set_: Set = None,
) -> None:  # fmt: skip
    """Find words around a recipe's prompts that draw them better: templates are scored, and changed by what fails."""
    from gtl.config import load_recipe
    from gtl.config.templates import read_templates
    from gtl.search.prompts import search_prompts, table

    loaded, given = load_recipe(recipe, set_ or ()), read_templates(templates)
    with Bar() as bar:
        found = search_prompts(loaded, adapter or (), given, metric, tries=tries, writer=writer, progress=bar)
    print(table(found))
    print(f"template {found.best}")


@app.command()
def serve(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="Of Ray Serve; else for here.")] = None,
    set_: Set = None,
    check: Annotated[bool, typer.Option("--check", help="Only say what is wrong with it, or what it serves.")] = False,
    new_key: Annotated[str | None, typer.Option(metavar="NAME", help="Only make a key and its line in `keys`.")] = None,
) -> None:
    """Answer OpenAI's image API for every adapter of the registry, with a page at /; --set is for its `args`."""
    if new_key is not None:
        from serve.keys import new_key as make

        key, line = make(new_key)
        print(f"the key, which is kept nowhere: {key}", file=sys.stderr)
        print(line)
        return
    from serve import command

    loaded = command.read_config(config, set_ or ())
    if check:
        print(command.describe(command.check(loaded)))
        return
    with Bar() as bar:
        command.run(loaded, bar)


@app.command()
def tune(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study file, such as those in tune_configs/.")],
    name: Annotated[str | None, typer.Option(help="Of the study, and of what it publishes; else the file's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest unfinished one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would try and what that takes.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="NODESxGPUSxKIND",
            help="With --dry-run: what it takes there, such as 64x8xH100; nothing is run.",
        ),
    ] = None,
    set_: Set = None,
) -> None:
    """Search a recipe's settings: run trials, stop the poor ones, publish the best."""
    from gtl.config.load import load_study
    from gtl.config.names import check_name

    if cluster is not None and not dry_run:
        raise UserError(f"--cluster: {cluster}: is planned for, not trained on; add --dry-run")
    if resume and dry_run:
        raise UserError("--resume: goes on with trials, and --dry-run runs none; leave one of the two out")
    loaded = load_study(study, set_ or ())
    called = check_name(name or Path(study).stem.lower(), "--name" if name else f"--name, left out, of {study}")
    with StudyBar() as bar:
        if dry_run:
            from gtl.search.forecast import forecast

            print(forecast(loaded, cluster, progress=bar))
            return
        from gtl.search.study import tune as search

        try:
            record = search(
                loaded, called, resume=resume, progress=bar, watch=bar.watch if sys.stderr.isatty() else None
            )
        except KeyboardInterrupt as error:
            print(str(error) or "interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
    print(record.table())
    print(f"report {record.folder.url('report.html')}", file=sys.stderr)
    for published in record.published:
        print(f"adapter {published}")


@data_app.command("check")
def data_check(
    folder: Annotated[str, typer.Argument(help="Folder or bucket URL of images.")],
    resolution: Annotated[int, typer.Option(help="Pixels.")] = 512,
) -> None:
    """Captions, aspect-ratio buckets, broken files and duplicates of a folder."""
    from gtl.data.check import check, render

    with Bar() as bar:
        report = check(folder, resolution, progress=bar)
    print(render(report))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("demo"),
    set_: Set = None,
    prompts: Annotated[int, typer.Option(help="New prompts of each kind.")] = 60,
) -> None:
    """Teach the built-in model a concept and a style, here and now; ends with a page of pictures and numbers."""
    from gtl.demo import demo as show
    from gtl.demo import next_commands, summary

    try:
        with Bar() as bar:
            outcome = show(out, set_ or (), prompts, bar)
    except KeyboardInterrupt as error:
        print("interrupted; the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from error
    print(summary(outcome))
    print("next:", *next_commands(out), sep="\n  ")
    print(f"page {outcome.page}")


@app.command()
def doctor(json_: AsJson = False) -> None:
    """Whether this machine, its Ray cluster and the stores have what training needs."""
    from dataclasses import asdict

    from gtl.doctor import examine

    with Bar() as bar:
        findings = examine(bar)
    if json_:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            print(f"{finding.state:<7}  {finding.subject:<{width}}  {finding.detail}")
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


def version(value: bool) -> None:
    """Print the version and leave."""
    if value:
        print(f"gtl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version_: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Fine-tune, search and serve image generators on a Ray cluster."""


app.command()(drawing.generate)
app.command()(drawing.edit)
app.command()(features.heads)
app.command()(features.classify)
app.command()(jobs.submit)
app.add_typer(jobs.app, name="jobs")
app.add_typer(adapters.app, name="adapters")
app.add_typer(data_app, name="data")
app.add_typer(features.app, name="features")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run a command; a user's mistake, in a file or on the command line, is one line and exit status 2."""
    # PEFT imports it wherever it is installed, and it warns of a kernel for CPUs that nothing here calls.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        sys.exit(app(prog_name="gtl", standalone_mode=False) or 0)
    except usage.UsageError as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # whose help is printed by now
            print(f"error: {usage.explain(error)}", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:  # what typer makes of Ctrl-C where it is older
        sys.exit(130)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
