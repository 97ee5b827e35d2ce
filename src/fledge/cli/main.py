"""`fledge`: one page of commands. What a command needs is imported when it runs, so that help comes at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

import fledge
from fledge.cli.tuning import tuning
from fledge.core.errors import FledgeError, Problem, did_you_mean
from fledge.core.language import t
from fledge.inference.formats import DTYPES

STAGES: dict[str, str] = {
    "data collect": "gather files, folders and packages as records",
    "data crawl": "read pages of the web, politely; WARC files beside them",
    "data refine": "clean, filter, de-duplicate; rejected rows are kept",
    "data split": "hold rows out, without near-copies across the split",
    "data contamination": "which evaluation items stand in a corpus",
    "data mix": "mix sources by weight, temperature or epochs",
    "data chunk": "cut long documents at sensible borders",
    "data convert": "write records as Alpaca, ShareGPT, messages, …: JSON, CSV, Parquet",
    "data pack": "turn text into rows of token ids to train on",
    "tokenizer train": "train a tokenizer: BPE, Unigram, WordPiece",
    "tokenizer report": "measure tokenizers side by side",
    "ngram train": "an n-gram model of reference text: perplexity, spelling",
    "classifier train": "a classifier of texts: quality, topic, toxicity",
    "model import": "make a model folder from a package, the Hub or a GGUF",
    "model merge": "merge an adapter into its base",
    "model extend": "stretch a model's rotary positions to a longer context",
    "train pretrain": "train a model from nothing",
    "train continue": "go on with a model's pre-training, on a domain's text",
    "train sft": "supervised fine-tuning on conversations",
    "train reward": "train a reward model on preferences",
    "train dpo": "direct preference optimisation",
    "train classify": "teach a model to put texts into classes",
    "train tag": "teach a model to mark names, places, … in texts",
    "train embed": "teach a model to turn texts into vectors",
    "train meta": "weights that learn a task from a few examples",
    "train cross_validate": "K models of one stage, each measured on what it has not seen",
    "search rate_range": "a training with a rising rate: which one to begin with",
    "search scaling": "a scaling law from small runs, checked on a larger one",
    "align preferences": "make preference pairs from a model and real text",
    "align identity": "make data that teach a model its name",
    "index": "make texts searchable: passages, words, vectors",
    "evaluate": "measure models side by side",
    "quantize": "make a smaller model",
    "export": "write a GGUF file",
}
"""Every stage that is a command, with its line of help (the stage's own docstring says the rest)."""

GROUPS = {
    "data": "records: collect, crawl, refine, split, mix, pack, inspect, …",
    "tokenizer": "tokenizers: train, report",
    "ngram": "n-gram models: train",
    "classifier": "classifiers of texts: train",
    "model": "model folders: import, merge, extend",
    "train": "pre-training, fine-tuning, reward models, preferences",
    "search": "settings: a rate range test, scaling laws (fledge sweep: anything else)",
    "align": "data for alignment, made by models",
}


class Fledge(click.Group):
    """The root: unknown commands get a suggestion, wrong input one message and no traceback."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            known = self.list_commands(ctx)
            raise FledgeError(
                Problem(
                    t('there is no command "{name}"', name=args[0]),
                    allowed=", ".join(known),
                    fix=did_you_mean(args[0], known),
                )
            )
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of a model's life, not of the alphabet


@click.group(cls=Fledge, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(fledge.__version__, prog_name="fledge")
def cli() -> None:
    """Raise a language model: raw text to a served, aligned, evaluated model.

    Begin with `fledge run` (the recipe hatch: a model from nothing, in English and Chinese), look at what it made with
    `fledge show hatch`, talk to it with `fledge chat hatch`.
    """


def main() -> None:
    """The entry point: every FledgeError becomes one message and an exit status."""
    try:
        status = cli.main(standalone_mode=False)
    except FledgeError as error:
        from rich.console import Console

        from fledge.cli.console import error_text

        Console(stderr=True, highlight=False, soft_wrap=True).print(error_text(error.problems))
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    sys.exit(status if isinstance(status, int) else 0)


# --- recipes -------------------------------------------------------------------------------------------------------


def recipe_file(name: str) -> Path:
    """A file, or the name of a recipe that comes with fledge."""
    given = Path(name)
    if given.suffix in (".yaml", ".yml") and given.exists():
        return given
    package = Path(fledge.__file__).parent
    for folder in (Path("recipes"), package / "recipes", package.parent.parent / "recipes"):
        if (folder / f"{given.stem}.yaml").is_file() and given.name in (given.stem, f"{given.stem}.yaml"):
            return folder / f"{given.stem}.yaml"
    return given


def _load(name: str, settings: tuple[str, ...], execution: dict[str, Any]) -> tuple[Any, Any]:
    from fledge.core.recipe import load
    from fledge.core.store import Store

    store = Store()
    flags = [f"execution.{key}={value}" for key, value in execution.items() if value is not None]
    return load(recipe_file(name), [*flags, *settings], store.db.digest), store


_SET = click.Option(["--set", "settings"], multiple=True, metavar="STAGE.KEY=VALUE", help="set any key of the recipe")
_UNTIL = click.Option(["--until"], default="", metavar="STAGE", help="make only what this stage needs, and it")
_FROM = click.Option(["--from", "start"], default="", metavar="STAGE", help="make this stage and all after it again")
_RECIPE = click.Argument(["recipe"], default="hatch")


def _run(recipe: str, settings: tuple[str, ...], until: str, start: str, log_to: str | None, **execution: Any) -> None:
    """Carry out RECIPE (a YAML file, or a name: hatch, adapt-smollm2). What is there is not made again."""
    from fledge.cli.running import carry_out
    from fledge.core.launch import launched

    group = launched()
    if group and group.rank:
        raise SystemExit(group.follow())
    loaded, store = _load(recipe, settings, execution)
    command = "fledge run" + (f" {recipe}" if recipe != "hatch" else "") + "".join(f" --set {s}" for s in settings)
    try:
        carry_out(loaded, store, until, start, command, log_to, group)
    finally:
        if group:
            group.end()


def _plan(
    recipe: str, settings: tuple[str, ...], until: str, start: str, as_json: bool, detail: bool, ranks: int,
    **execution: Any,
) -> None:  # fmt: skip
    """What `fledge run` would make and why, and what it would take."""
    from fledge.core.plan import make_plan

    loaded, store = _load(recipe, settings, execution)
    if ranks:
        from fledge.cli.ranks import print_ranks

        return print_ranks(loaded, ranks)
    plan = make_plan(loaded, store, until, start)
    if as_json:
        click.echo(json.dumps(plan.to_dict(), ensure_ascii=False, indent=1))
        return
    from fledge.cli.console import Console, error_text, plan_summary, plan_table

    console = Console()
    console.rich.print(plan_table(plan))
    console.rich.print(plan_summary(plan), style="bold")
    from fledge.cli.estimate import needs_table, plan_details

    for table in [needs_table(plan), *(plan_details(plan) if detail else [])]:
        if table is not None:
            console.rich.print(table)
    for step in plan.to_make:
        if step.estimate.too_large:
            console.rich.print(error_text([step.estimate.too_large]))
        for note in step.estimate.notes:
            console.rich.print(f"  {step.name}: {note}", style="dim")


def _recipe_commands() -> None:
    from fledge.cli.execution import execution_options, log_option

    cli.add_command(
        click.Command(
            "run",
            callback=_run,
            help=_run.__doc__,
            short_help="carry out a recipe: a YAML file, or hatch, adapt-smollm2",
            params=[_RECIPE, _SET, _UNTIL, _FROM, log_option(), *execution_options()],
        )
    )
    as_json = click.Option(["--json", "as_json"], is_flag=True, help="for programs")
    ranks = click.Option(["--ranks"], type=int, default=0, help="what each of so many processes would hold")
    detail = click.Option(["--detail"], is_flag=True, help="the memory of every training by part")
    cli.add_command(
        click.Command(
            "plan",
            callback=_plan,
            help=_plan.__doc__,
            params=[_RECIPE, _SET, _UNTIL, _FROM, as_json, detail, ranks, *execution_options()],
        )
    )


_recipe_commands()


class EstimateCommand(click.Command):
    """`fledge estimate`: its flags are read only when they are asked for."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not self.params:
            from fledge.cli.estimate import estimate, estimate_options

            self.params, self.callback, self.help = estimate_options(), estimate, estimate.__doc__
        return super().get_params(ctx)


_ABOUT_ESTIMATE = "memory, time and money of a training; the best size for a budget"
cli.add_command(EstimateCommand("estimate", short_help=_ABOUT_ESTIMATE))


@cli.command(short_help="try settings of a recipe and find the best")
@click.argument("recipe")
@click.option("--vary", multiple=True, required=True, metavar="STAGE.KEY=VALUES", help="1e-4..1e-2:log, or 8,16,32")
@click.option("--minimize", default="", metavar="STAGE.METRIC", help="what to make small: base.bits_per_byte_en")
@click.option("--maximize", default="", metavar="STAGE.METRIC", help="what to make large: chat.accuracy")
@click.option("--trials", type=click.IntRange(1), default=20, show_default=True, help="how many, at most")
@click.option("--method", type=click.Choice(["random", "bayes", "grid"]), default="random", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="another one, other trials")
@click.option(
    "--stop-early", "stop", type=click.Choice(["median", "asha"]), is_flag=False, flag_value="median", default=None,
    help="stop trials that will not win (alone: by the median)",
)  # fmt: skip
@click.option("--watch", default="", metavar="STAGE.METRIC", help="by what: chat.held_out_loss, or …:max [its loss]")
@click.option("--set", "settings", multiple=True, metavar="STAGE.KEY=VALUE", help="set any key of the recipe")
def sweep(recipe: str, **options: Any) -> None:
    """Try settings of RECIPE and find the best. What no varied setting reaches is made once; a sweep that was stopped
    goes on when the same command is given again.

    fledge sweep hatch --vary base.train.lr=1e-3..1e-1:log --minimize base.bits_per_byte_en --stop-early
    """
    from fledge.cli.sweep import run_sweep

    run_sweep(recipe_file(recipe), **options)


@cli.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="for programs")
@click.option("--verify", is_flag=True, help="read every file again and compare its digest")
def show(run: str, as_json: bool, verify: bool) -> None:
    """A run's stages, what each measured, where each lies."""
    from fledge.cli.view import show_run

    show_run(run, as_json, verify)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="for programs")
def runs(as_json: bool) -> None:
    """All runs of this store."""
    from fledge.cli.view import list_runs

    list_runs(as_json)


@cli.command()
@click.option("--dry-run", is_flag=True, help="only say what would go")
def gc(dry_run: bool) -> None:
    """Delete artifacts that no run refers to any more."""
    from fledge.cli.view import collect_garbage

    collect_garbage(dry_run)


# --- every stage on its own ----------------------------------------------------------------------------------------


class StageCommand(click.Command):
    """`fledge train sft --model … --data …`: the stage's schema is imported only when its flags are asked for."""

    def __init__(self, name: str, use: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help, callback=self._carry_out)
        self.use = use
        self.flags: Any = None

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if self.flags is None:
            from fledge.cli.stage_command import StageFlags

            self.flags = StageFlags(self.use)
            self.help, self.params = self.flags.stage.__doc__, self.flags.options()
        return super().get_params(ctx)

    def _carry_out(self, **given: Any) -> None:
        self.flags.run(**given)


def _stage_commands() -> None:
    groups: dict[str, click.Group] = {}
    for name, help_text in GROUPS.items():
        groups[name] = click.Group(name, help=help_text)
        cli.add_command(groups[name])
    for path, line in STAGES.items():
        group, _, command = path.rpartition(" ")
        (groups[group] if group else cli).add_command(StageCommand(command, path.replace(" ", "."), line))

    @groups["data"].command("inspect", short_help="what a file or folder of records holds")
    @click.argument("path")
    @click.option("--tokenizer", default="", metavar="FOLDER", help="count lengths in its tokens, too")
    @click.option("--html", default="", metavar="FILE", help="write a page with charts, in English and 简体中文")
    @click.option("--json", "as_json", is_flag=True, help="for programs")
    @click.option("--spot-check", type=click.IntRange(1), metavar="N", help="N kept and N rejected rows to judge")
    @click.option("--csv", "table", default="spot-check.csv", show_default=True, help="the table that it writes")
    @click.option("--judged", default="", metavar="FILE", help="read the judged table back: how often each was wrong")
    @click.option("--seed", type=int, default=0, show_default=True, help="which rows are shown")
    def inspect(path: str, **options: Any) -> None:
        """What a file or folder of records holds: schema, sizes, languages, lengths, variety, examples, rejected rows.

        With --spot-check it writes a table of rows to judge by hand; with --judged it reads that back and says how
        often keeping and rejecting was wrong, with an interval of 95 %.
        """
        from fledge.cli.view import inspect_data

        inspect_data(path, **options)

    @groups["data"].command("sample", short_help="some rows of a file or folder")
    @click.argument("path")
    @click.option("-n", "--rows", type=click.IntRange(1), default=10, show_default=True)
    @click.option("--seed", type=int, default=0, show_default=True, help="another one, other rows")
    @click.option("--by", type=click.Choice(["language", "label", "source"]), help="so many rows of each")
    @click.option("--to", default="", metavar="FORMAT", help="a spelling of fledge data convert")
    @click.option("--out", default="", metavar="FILE", help="write them there (.jsonl, .json, .csv, .parquet)")
    def sample(path: str, **options: Any) -> None:
        """Some rows of a file or folder, chosen by a hash of their id, as JSON lines or into a file."""
        from fledge.cli.view import sample_data

        sample_data(path, **options)


_stage_commands()


# --- using a model -------------------------------------------------------------------------------------------------


_DTYPES = click.Choice(DTYPES)
_ENGINE = "vllm, llama.cpp, openvino, onnx, or the URL of a server that runs already"


@cli.command(short_help="OpenAI's API and a chat page for a model")
@click.argument("model")
@click.option("--port", type=int, default=8000, show_default=True, help="0 takes a free one")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in")
@click.option("--dtype", type=_DTYPES, default="auto", show_default=True)
@click.option("--name", default="", help="the model's name in the API")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=FOLDER", help="a LoRA adapter on it, a model too")
@click.option("--engine", default="native", show_default=True, metavar="ENGINE", help=_ENGINE)
@click.option("--tool", "tools", multiple=True, metavar="TOOL", help="for clients' techniques: python, search=INDEX")
@tuning
def serve(
    model: str, port: int, host: str, dtype: str, name: str, adapters: tuple[str, ...], engine: str,
    tools: tuple[str, ...], tuning: dict[str, Any],
) -> None:  # fmt: skip
    """Serve MODEL (a folder, RUN, RUN/STAGE, or the URL of another server): OpenAI's API, and a chat page at /."""
    from fledge.cli.use import serve_model

    serve_model(model, host, port, dtype, name, adapters, engine, tools, tuning)


@cli.command()
@click.argument("model")
@click.option("--system", default="", help="a system prompt")
@click.option("--temperature", type=float, default=0.7, show_default=True)
@click.option("--max-tokens", type=int, default=256, show_default=True)
@click.option("--engine", default="native", show_default=True, metavar="ENGINE", help=_ENGINE)
@click.option("--index", default="", metavar="INDEX", help="show the model what each message finds there")
@click.option("--embedder", default="", metavar="MODEL", help="the model of the index's vectors")
@tuning
def chat(
    model: str, system: str, temperature: float, max_tokens: int, engine: str, index: str, embedder: str,
    tuning: dict[str, Any],
) -> None:  # fmt: skip
    """Talk to MODEL (a folder, RUN, RUN/STAGE, or the URL of a server) in the terminal."""
    from fledge.cli.use import chat_with

    chat_with(model, system, temperature, max_tokens, engine, tuning, index, embedder)


@cli.command(short_help="answer a batch of prompts from standard input")
@click.argument("model")
@click.option("--dtype", type=_DTYPES, default="auto", show_default=True)
@click.option("--engine", default="native", show_default=True, metavar="ENGINE", help=_ENGINE)
@tuning
def generate(model: str, dtype: str, engine: str, tuning: dict[str, Any]) -> None:
    """Answer prompts from standard input (a JSON object a line) on standard output."""
    from fledge.cli.use import generate_batch

    generate_batch(model, dtype, engine, tuning)


_BY = click.Choice(["auto", "words", "vectors", "both"])


@cli.command(short_help="passages of an index that answer a query")
@click.argument("index")
@click.argument("query")
@click.option("-k", type=click.IntRange(1), default=5, show_default=True, help="passages at most")
@click.option("--by", type=_BY, default="auto", show_default=True, help="words (BM25), vectors, or both")
@click.option("--embedder", default="", metavar="MODEL", help="the model of the index's vectors")
@click.option("--diversity", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="no two alike: 0 … 1")
@click.option("--json", "as_json", is_flag=True, help="for programs")
def find(index: str, query: str, **options: Any) -> None:
    """Search INDEX (a folder, RUN or RUN/STAGE; made by `fledge index`)."""
    from fledge.cli.ask import search_index

    search_index(index, query, **options)


@cli.command(short_help="answer questions from an index, and say where it stands")
@click.argument("index")
@click.argument("model")
@click.argument("question", default="")
@click.option("-k", type=click.IntRange(1), default=4, show_default=True, help="passages that the model is shown")
@click.option("--by", type=_BY, default="auto", show_default=True, help="words (BM25), vectors, or both")
@click.option("--embedder", default="", metavar="MODEL", help="the model of the index's vectors")
@click.option("--diversity", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="no two alike: 0 … 1")
@click.option("--abstain/--no-abstain", default=True, help="the model may say that the sources do not hold it")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--dtype", type=_DTYPES, default="auto", show_default=True)
@click.option("--engine", default="native", show_default=True, metavar="ENGINE", help=_ENGINE)
@click.option("--test", default="", metavar="FILE", help="questions with answers: measure with and without the index")
@click.option("--json", "as_json", is_flag=True, help="for programs")
def ask(index: str, model: str, question: str, **options: Any) -> None:
    """Answer QUESTION with MODEL from INDEX, citing passages. Without a question they are read line by line.

    With --test every line of FILE, {"question", "answers", "sources"}, is answered twice: without the index and with
    it.
    """
    from fledge.cli.ask import ask_index

    ask_index(index, model, question, **options)


@cli.command(short_help="which engines there are here, and what one of them can do")
@click.argument("words", nargs=-1, metavar="[MODEL | install NAME]")
@click.option("--engine", default="native", show_default=True, metavar="ENGINE", help=_ENGINE)
@click.option("--dtype", type=_DTYPES, default="auto", show_default=True)
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=FOLDER", help="a LoRA adapter to ask about, too")
@click.option("--json", "as_json", is_flag=True, help="for programs")
def engines(words: tuple[str, ...], **options: Any) -> None:
    """The engines of this machine; with MODEL (a folder, RUN, RUN/STAGE, or the URL of a server) what one can do with
    it, asked by small requests. `install NAME` makes the environment of an engine that needs one of its own.
    """
    from fledge.cli.use import install_engine, show_engines

    if words[:1] == ("install",) and (len(words) == 2 or not Path("install").exists()):
        return install_engine(" ".join(words[1:]))
    if len(words) > 1:
        raise click.UsageError(t("one model at a time: {words}", words=", ".join(words)))
    show_engines(words[0] if words else "", **options)


@cli.command(short_help="what this machine has, and how to get what is missing")
def doctor() -> None:
    """What this machine has, what is missing for what, and the command that brings it."""
    from fledge.cli.doctor import examine

    examine()


if __name__ == "__main__":
    main()
