"""The command line: typed functions in one table, parsed before torch or ray is imported."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from gtl import __version__
from gtl.types import UserError

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe.")]
RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file (YAML), or its bucket URL.")]
RegistryUrl = Annotated[str, typer.Option("--registry", envvar="GTL_REGISTRY", help="Folder or bucket URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Variant = Annotated[str | None, typer.Option(help="Of the model's weight files, for example fp16.")]
AdapterName = Annotated[str, typer.Argument(metavar="NAME[@VERSION|@ALIAS]")]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Fine-tune, search and serve image generators on a Ray cluster.")  # fmt: skip
adapters_app = typer.Typer(no_args_is_help=True, help="The registry of adapters: list, show, promote, import, export.")
data_app = typer.Typer(no_args_is_help=True, help="Look at training images before training on them.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure this machine.")


class Bar:
    """Progress on stderr: a live bar in a terminal, a line now and then in a log."""

    def __init__(self) -> None:
        self._live: object | None = None
        self._phase = ""
        self._began = 0.0, 0
        self._printed = 0.0

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Show that `done` of `total` of a phase is through."""
        now = time.monotonic()
        if phase != self._phase:
            self._began = now, done
        if sys.stderr.isatty():
            self._draw(phase, done, total, detail)
        elif phase != self._phase or done >= total or now - self._printed > 10:
            counts = f" {done}/{total}" if total else ""
            print(f"{phase}{counts} {detail}".rstrip() + self._left(now, done, total), file=sys.stderr, flush=True)
            self._printed = now
        self._phase = phase

    def _left(self, now: float, done: int, total: int) -> str:
        """How long the phase still takes at its rate so far, which a resumed one does not begin at 0."""
        began, first = self._began
        if not first < done < total:
            return ""
        from gtl.report.facts import duration

        return f"  {duration((total - done) * (now - began) / (done - first))} left"

    def _draw(self, phase: str, done: int, total: int, detail: str) -> None:
        from rich import progress
        from rich.console import Console

        if phase != self._phase:
            self.close()
            text = progress.TextColumn("{task.description:<12}"), progress.TextColumn("{task.fields[detail]}")
            # What has no end to count towards turns while it lasts, and leaves no line behind.
            columns = (
                (text[0], progress.BarColumn(), progress.MofNCompleteColumn(), text[1], progress.TimeRemainingColumn())
                if total
                else (progress.SpinnerColumn(), *text, progress.TimeElapsedColumn())
            )
            self._live = progress.Progress(*columns, console=Console(stderr=True), transient=not total)
            self._live.start()
            self._live.add_task(phase, total=total or None, detail="")
        bar = self._live
        assert isinstance(bar, progress.Progress)
        bar.update(bar.task_ids[0], completed=done, total=total or None, detail=detail)

    def close(self) -> None:
        """Leave the last bar on the screen and let go of it."""
        if self._live is not None:
            self._live.stop()  # type: ignore[attr-defined]
            self._live = None


@app.command()
def init(
    folder: Annotated[str, typer.Argument(help="Folder or bucket URL of images.")],
    model: Annotated[str | None, typer.Option(help="To fine-tune; what suits this machine when left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file; the folder's name when left out.")] = None,
) -> None:
    """Look at images and write a commented recipe for them."""
    from gtl.data.draft import write_draft

    bar = Bar()
    try:
        draft = write_draft(folder, model, out, bar)
    finally:
        bar.close()
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

    bar = Bar()
    try:
        published = launch(loaded, run, resume=resume, progress=bar)
    except KeyboardInterrupt as error:  # of which typer would only keep the exit status
        bar.close()
        print(str(error) or "interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        bar.close()
    page = Store(f"{loaded.storage.runs}/{published.name}/{published.version}")
    if page.exists(PAGE):
        print(f"report {page.url(PAGE)}")
    print(f"adapter {published}")


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="NAME, NAME@VERSION or the folder of a run.")],
    compare: Annotated[list[str] | None, typer.Option(metavar="RUN", help="Another run, shown beside it.")] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="The page; else in the run's folder.")] = None,
    runs: Annotated[str, typer.Option(envvar="GTL_RUNS", help="Folder or bucket URL of runs.")] = "./runs",
) -> None:
    """Write a page about a run: curves, samples, recipe, lineage. One HTML file that needs nothing else."""
    from gtl.report.command import report as write

    print(write(run, compare or [], out, runs))


@app.command()
def cache(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|gc", help="A recipe file, or gc.")], set_: Set = None
) -> None:
    """Encode a recipe's images and captions into the cache; `gc` removes what no dataset uses."""
    if recipe == "gc":
        from gtl.data.garbage import collect_garbage
        from gtl.storage import Store

        removed, freed = collect_garbage(Store(os.environ.get("GTL_CACHE", "./cache")))
        print(f"removed {removed} shards, {freed / 2**20:.1f} MiB")
        return
    from gtl.config import load_recipe
    from gtl.train.launch import fill_cache

    bar = Bar()
    try:
        dataset = fill_cache(load_recipe(recipe, set_ or ()), bar)
    finally:
        bar.close()
    print(f"dataset {dataset.fingerprint[:12]}: {len(dataset.entries)} images")


@app.command()
def generate(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    model: Annotated[str | None, typer.Option(help="Base model; the adapter's own when left out.")] = None,
    revision: Revision = None,
    variant: Variant = None,
    adapter: Annotated[list[str] | None, typer.Option(metavar="NAME[@VERSION|@ALIAS][:SCALE]")] = None,
    prompt: Annotated[str | None, typer.Option()] = None,
    prompts: Annotated[Path | None, typer.Option(help="One prompt a line, or .jsonl.")] = None,
    negative_prompt: Annotated[str, typer.Option()] = "",
    seed: Annotated[int, typer.Option(help="Image i uses seed + i.")] = 0,
    steps: Annotated[int, typer.Option()] = 25,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is off.")] = 7.5,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own when left out.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own when left out.")] = None,
    count: Annotated[int, typer.Option(help="Images per prompt.")] = 1,
    registry: RegistryUrl = "./registry",
) -> None:
    """Draw pictures with a base model and any adapters of the registry."""
    from gtl.generate.command import run

    bar = Bar()
    try:
        paths = run(out=out, model=model, revision=revision, variant=variant, adapters=adapter or [], prompt=prompt,
                    prompts=prompts, negative_prompt=negative_prompt, seed=seed, steps=steps, guidance=guidance,
                    width=width, height=height, count=count, registry=registry, progress=bar)  # fmt: skip
    finally:
        bar.close()
    for path in paths:
        print(path)


@data_app.command("check")
def data_check(
    folder: Annotated[str, typer.Argument(help="Folder or bucket URL of images.")],
    resolution: Annotated[int, typer.Option(help="Pixels.")] = 512,
) -> None:
    """Captions, aspect-ratio buckets, broken files and duplicates of a folder."""
    from gtl.data.check import check, render

    bar = Bar()
    try:
        report = check(folder, resolution, progress=bar)
    finally:
        bar.close()
    print(render(report))


@adapters_app.command("list")
def adapters_list(registry: RegistryUrl = "./registry", json_: AsJson = False) -> None:
    """Every published version with its aliases."""
    from gtl.adapters.commands import list_adapters

    rows = list_adapters(registry)
    if json_:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        aliases = "".join(f" @{alias}" for alias in row["aliases"])
        print(f"{row['name']}@{row['version']}  {row['kind']}  {row['base']}{aliases}")


@adapters_app.command("show")
def adapters_show(adapter: AdapterName, registry: RegistryUrl = "./registry", json_: AsJson = False) -> None:
    """An adapter's card: base, tuner, data, lineage, files."""
    import yaml

    from gtl.adapters.commands import show_adapter

    card = show_adapter(registry, adapter)
    print(json.dumps(card, indent=2) if json_ else yaml.safe_dump(card, sort_keys=False, allow_unicode=True).rstrip())


@adapters_app.command("promote")
def adapters_promote(
    adapter: AdapterName,
    alias: Annotated[str, typer.Argument(help="For example prod.")],
    registry: RegistryUrl = "./registry",
) -> None:
    """Point an alias at a version."""
    from gtl.adapters.commands import promote_adapter

    alias = alias.removeprefix("@")
    print(f"@{alias} -> {promote_adapter(registry, adapter, alias)}")


@adapters_app.command("import")
def adapters_import(
    file: Annotated[Path, typer.Argument(help="A .safetensors file or a folder: diffusers, PEFT or kohya layout.")],
    model: Annotated[str, typer.Option(help="The base model it was made for.")],
    name: Annotated[str, typer.Option(help="Its name in the registry.")],
    revision: Revision = None,
    variant: Variant = None,
    registry: RegistryUrl = "./registry",
) -> None:
    """Publish a LoRA made by others; one whose keys do not all match the model is refused."""
    from gtl.adapters.commands import import_adapter

    card = import_adapter(registry, file, model, name, revision, variant)
    print(f"adapter {card.name}@{card.version}")


@adapters_app.command("export")
def adapters_export(
    adapter: AdapterName,
    out: Annotated[Path, typer.Option(help="A new folder.")],
    pipeline: Annotated[bool, typer.Option("--pipeline", help="The whole model with the adapter merged in.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Of the pipeline: fp32, bf16, fp16; else as stored.")] = None,
    registry: RegistryUrl = "./registry",
) -> None:
    """Write an adapter's files, or a diffusers pipeline that has it inside."""
    from gtl.adapters.commands import export_adapter, export_pipeline

    if dtype is not None and not pipeline:
        raise UserError(f"--dtype {dtype}: only with --pipeline; an adapter's own files keep theirs")
    done = export_pipeline(registry, adapter, out, dtype) if pipeline else export_adapter(registry, adapter, out)
    print(f"{done} -> {out}")


@adapters_app.command("remove")
def adapters_remove(
    adapter: AdapterName,
    force: Annotated[bool, typer.Option("--force", help="Also the aliases that point at it.")] = False,
    registry: RegistryUrl = "./registry",
) -> None:
    """Delete one version."""
    from gtl.adapters.commands import remove_adapter

    print(f"removed {remove_adapter(registry, adapter, force)}")


@bench_app.command("train")
def bench_train(
    model: Annotated[str, typer.Option(help="small or sd15; random weights.")] = "small",
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 4,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each loop in a round.")] = 20,
    rounds: Annotated[int, typer.Option(help="How often the two loops take turns.")] = 9,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")] = None,
) -> None:
    """This training loop beside a bare PyTorch loop: images/s of both, with LoRA on one device."""
    from gtl.bench.train import bench_train as bench
    from gtl.bench.train import table

    bar = Bar()
    try:
        result = bench(model, batch_size, steps, rounds, json_, bar)
    finally:
        bar.close()
    print(table(result))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("demo"),
    set_: Set = None,
    prompts: Annotated[int, typer.Option(help="New prompts of each kind.")] = 60,
) -> None:
    """Teach the built-in model a concept and a style, here and now; ends with a page of pictures and numbers."""
    from gtl.demo import demo as show
    from gtl.demo import next_commands, summary

    bar = Bar()
    try:
        outcome = show(out, set_ or (), prompts, bar)
    except KeyboardInterrupt as error:
        bar.close()
        print("interrupted; the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from error
    finally:
        bar.close()
    print(summary(outcome))
    print("next:", *next_commands(out), sep="\n  ")
    print(f"page {outcome.page}")


@app.command()
def doctor(json_: AsJson = False) -> None:
    """Whether this machine, its Ray cluster and the stores have what training needs."""
    from dataclasses import asdict

    from gtl.doctor import examine

    bar = Bar()
    try:
        findings = examine(bar)
    finally:
        bar.close()
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


app.add_typer(adapters_app, name="adapters")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run a command; a user's mistake is one line and exit status 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
