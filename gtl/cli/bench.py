"""`gtl bench`: what this machine does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gtl.cli.bar import Bar
from gtl.cli.options import Set
from gtl.types import UserError

app = typer.Typer(no_args_is_help=True, help="Measure this machine.")


@app.command("train")
def train(
    model: Annotated[str, typer.Option(
        help="builtin:tiny; or, with random weights, small, sd15, sd2, sdxl or flux (FLUX.1 dev, for a GPU of 80 GB; "
             "takes 24 GB of the folder for temporary files, TMPDIR, and 32 GB of memory).",
    )] = "small",
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 4,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each loop in a round.")] = 20,
    rounds: Annotated[int, typer.Option(help="How often the two loops take turns.")] = 9,
    tuner: Annotated[str, typer.Option(help="lora (rank 16 in the attention) or full.")] = "lora",
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile the blocks in gtl's loop.")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations in gtl's.")] = False,
    micro_batch: Annotated[int | None, typer.Option(help="Images per forward pass of gtl's loop; the batch.")] = None,
    bare_batch_size: Annotated[int | None, typer.Option(
        help="Images per step of the bare loop; as many as gtl's. 1 is the usual loop over single images.",
    )] = None,
    bare_checkpointing: Annotated[bool, typer.Option(
        "--bare-checkpointing", help="Recompute activations in the bare loop too.",
    )] = False,
    workers: Annotated[list[int] | None, typer.Option(help="Compare numbers of workers instead; repeat it.")] = None,
    stage: Annotated[int, typer.Option(help="ZeRO stage, with --workers.")] = 0,
    predict: Annotated[bool, typer.Option(
        "--predict", help="With --workers: beside what gtl plan's model of a step says, from rates measured in turn.",
    )] = False,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")] = None,
) -> None:  # fmt: skip
    """This training loop beside a bare PyTorch loop, or on several numbers of workers.

    In images/s, and as a share of the rate at which the device multiplies matrices in the same run.
    """
    from gtl.bench.setting import Setting

    setting = Setting(model, batch_size, steps, rounds, tuner, compile_, checkpointing, micro_batch, bare_batch_size,
                      bare_checkpointing)  # fmt: skip
    if workers:
        from gtl.bench import scaling

        with Bar() as bar:
            result = scaling.bench_scaling(setting, workers, stage, json_, bar, predicts=predict)
        print(scaling.table(result))
        return
    if predict:
        raise UserError("--predict: is of numbers of workers; add --workers 1 --workers 2")
    from gtl.bench.train import bench_train as bench
    from gtl.bench.train import table

    with Bar() as bar:
        result = bench(setting, json_, bar)
    print(table(result))


@app.command("search")
def search(
    model: Annotated[str, typer.Option(
        help="builtin:tiny; or, with random weights, small, sd15, sd2, sdxl or flux.",
    )] = "builtin:tiny",
    pack: Annotated[list[int], typer.Option(help="Trials in a forward pass; may be given several times.")] = [4],  # noqa: B006
    batch_size: Annotated[int, typer.Option(help="Images per optimizer step of a trial.")] = 1,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each in a round.")] = 20,
    rounds: Annotated[int, typer.Option(help="How often they take turns; the median counts.")] = 5,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")] = None,
) -> None:  # fmt: skip
    """How many more trials an hour a study has when they train in one forward pass, against one by one."""
    from gtl.bench.search import bench_search as bench
    from gtl.bench.search import table
    from gtl.bench.setting import Setting

    with Bar() as bar:
        result = bench(Setting(model, batch_size, steps, rounds), pack, json_, bar)
    print(table(result))


@app.command("serve")
def serve(
    model: Annotated[str, typer.Option(
        help="builtin:tiny; or, with random weights, small, sd15, sd2, sdxl or flux.",
    )] = "small",
    adapters: Annotated[int, typer.Option(help="LoRAs, which requests take in turn.")] = 8,
    requests: Annotated[int, typer.Option(help="Pictures of a round.")] = 16,
    batch: Annotated[int, typer.Option(help="Pictures of a step at most.")] = 16,
    rank: Annotated[int, typer.Option(help="Of the LoRAs.")] = 16,
    targets: Annotated[str, typer.Option(
        help="Layers that have them: attention, attention+ff, all-linear or all-linear+conv.",
    )] = "attention",
    steps: Annotated[int, typer.Option(help="Of a picture.")] = 10,
    rounds: Annotated[int, typer.Option(help="How often all take turns; the median counts.")] = 5,
    size: Annotated[int | None, typer.Option(help="Height and width in pixels; what the model was made for.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")] = None,
) -> None:  # fmt: skip
    """How fast many adapters are drawn in one batch, against one of them alone and against swapping in diffusers."""
    from gtl.bench import serve as bench

    serving = bench.Serving(model, adapters, requests, batch, rank, targets, steps, rounds, size)
    with Bar() as bar:
        result = bench.bench_serve(serving, json_, bar)
    print(bench.table(result))


@app.command("endpoint")
def endpoint(
    url: Annotated[str | None, typer.Option(
        help="Of the endpoint, with its key in OPENAI_API_KEY; one of builtin:tiny is started when left out.",
    )] = None,
    model: Annotated[str | None, typer.Option(help="As requests name it; the endpoint's first base.")] = None,
    steps: Annotated[int, typer.Option(help="Of a picture.")] = 10,
    size: Annotated[str, typer.Option(metavar="WIDTHxHEIGHT")] = "64x64",
    load: Annotated[list[float], typer.Option(
        help="Requests a second, as a multiple of what it draws at most; may be given several times.",
    )] = [0.5, 1.0, 2.0],  # noqa: B006
    seconds: Annotated[float, typer.Option(help="Of each load.")] = 30.0,
    users: Annotated[int, typer.Option(help="Who keep it busy to find out what it draws at most.")] = 16,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")] = None,
) -> None:  # fmt: skip
    """What an endpoint answers under load, and whether what is too much for it is refused in time."""
    from gtl.bench import endpoint as bench

    asked = bench.Load(url, model, steps, size, tuple(load), seconds, users)
    with Bar() as bar:
        result = bench.bench_endpoint(asked, json_, bar)
    print(bench.table(result))


@app.command("stopping")
def stopping(
    study: Annotated[str, typer.Argument(metavar="FOLDER", help="Of a study whose trials all ran to their end.")],
    orders: Annotated[int, typer.Option(help="Orders of its trials, drawn at random.")] = 200,
    concurrency: Annotated[int, typer.Option(help="Trials at once.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the orders.")] = 0,
    set_: Set = None,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")] = None,
) -> None:
    """What early stopping (asha) would have lost and spared, replayed on the curves of a study under fifo."""
    from gtl.bench import stopping as bench

    print(bench.table(bench.bench_stopping(study, set_ or (), orders, concurrency, seed, json_)))
