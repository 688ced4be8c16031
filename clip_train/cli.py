"""The `clip-train` command. Starts fast: torch and everything heavy is imported by the command that needs it."""

from __future__ import annotations

import io
import logging
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from clip_train import __version__
from clip_train.cli_examples import add_examples
from clip_train.cli_models import classify, export, prompts, search
from clip_train.cli_runs import compare, runs
from clip_train.cli_shards import shards
from clip_train.distributed.ranks import own_rank
from clip_train.distributed.stop import follow_launcher
from clip_train.errors import ClipTrainError, UserError
from clip_train.exit_record import ended_before
from clip_train.redact import RedactingFormatter, redact
from clip_train.tokenizer.config import Cleaning

EXAMPLES = """\b
  clip-train train experiment=demo
      train a model, evaluate it, write runs/demo/report.html
  clip-train classify cat.jpg --labels "a corgi,a cat" --model runs/demo
      say which label fits a picture
  clip-train shards make PICTURES SHARDS
      turn a folder of pictures, each with a .txt, into shards

`clip-train COMMAND --help` explains a command, `clip-train help KEY` a config key."""

KEY_VALUE = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

app = typer.Typer(
    help=f"Train, evaluate and use CLIP models.\n\n{EXAMPLES}", no_args_is_help=True, add_completion=False,
    rich_markup_mode=None, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.add_typer(shards, name="shards")
app.add_typer(runs, name="runs")
tokenizers = typer.Typer(help="Learn a vocabulary.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tokenizers, name="tokenizer")
tests = typer.Typer(help="Prove promises on this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tests, name="selftest")


def main() -> None:
    """Run the command line and exit with its code: 2 for a user's mistake, 3 for damaged data or checkpoints."""
    follow_launcher()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # names of files again, for `classify -`
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files may hold what no encoding has
    if logging.lastResort is not None:  # shows warnings, as nothing else is set up
        logging.lastResort.setFormatter(RedactingFormatter())
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        code = app(args=arguments, standalone_mode=False)
    except ClipTrainError as error:
        if debug:
            print(redact(traceback.format_exc()), file=sys.stderr, end="")
        _print_error(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command line
            _print_error(error.format_message())
            code = 2
        else:  # a bug of ours
            print(redact(traceback.format_exc()), file=sys.stderr, end="")
            code = 1
    sys.exit(code or 0)


def _print_error(message: str) -> None:
    rank = own_rank()
    where = f" [rank {rank}]" if rank != "0" else ""
    print(f"error{where}: {redact(message)}", file=sys.stderr)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"clip-train {__version__}")
        raise typer.Exit


@app.command(context_settings=KEY_VALUE, add_help_option=False, short_help="Train a model, or continue a run.")
def train(context: typer.Context) -> None:
    """Train a model, or continue a run. Takes KEY=VALUE; with -m a grid of runs."""
    grid = {"-m", "--multirun"} & set(context.args)
    context.args = [a for a in context.args if a not in grid]
    if grid and not {"-h", "--help"} & set(context.args):
        if flags := [a for a in context.args if a.startswith("-")]:
            raise UserError(f"-m takes KEY=VALUE, not {flags[0]}")
        from clip_train.tools.grid import run_grid

        raise typer.Exit(run_grid(context.args))
    overrides = _overrides(context, command="train")
    if overrides is None:
        return
    from clip_train.config import load

    config = load("train", overrides)
    from clip_train.tools.launch.command import is_launch, launch

    if is_launch(config):
        raise typer.Exit(launch(config, overrides))
    if record := ended_before(Path(config.run_dir)):
        _print_error(f"not started again, this launch has ended: {record.reason}")
        raise typer.Exit(record.code)
    from clip_train.evaluate import keep_calibration_of_training
    from clip_train.tools.report import write_report
    from clip_train.train import train as run

    run(config)
    if own_rank() == "0":
        keep_calibration_of_training(Path(config.run_dir), names=config.evaluation)
        print(f"report: {write_report(Path(config.run_dir))}")


@app.command(context_settings=KEY_VALUE, add_help_option=False, short_help="Evaluate a model or a run.")
def evaluate(context: typer.Context) -> None:
    """Evaluate a model or a run. Takes KEY=VALUE."""
    overrides = _overrides(context, command="evaluate")
    if overrides is None:
        return
    from clip_train.config import load

    config = load("evaluate", overrides)
    if config.reference.python is not None:
        from clip_train.tools.reference.check import check_reference

        raise typer.Exit(check_reference(config))
    from clip_train.evaluate import evaluate as run
    from clip_train.tools.report import is_reported, write_report

    run(config)
    if config.output is None and is_reported(Path(config.checkpoint)) and own_rank() == "0":
        print(f"report: {write_report(Path(config.checkpoint))}")


@app.command(context_settings=KEY_VALUE, add_help_option=False, short_help="Search the best hyperparameters.")
def sweep(context: typer.Context) -> None:
    """Search the values with which a run does best. Takes KEY=VALUE."""
    overrides = _overrides(context, command="sweep")
    if overrides is not None:
        from clip_train.tools.sweep.command import sweep_command

        raise typer.Exit(sweep_command(overrides))


@app.command(context_settings=KEY_VALUE, add_help_option=False, short_help="Say what a run will take, before it runs.")
def plan(context: typer.Context) -> None:
    """Say what a run will take, before it runs. Takes KEY=VALUE as train does, plan.*, and --json."""
    as_json = "--json" in context.args
    context.args = [a for a in context.args if a != "--json"]
    overrides = _overrides(context, command="plan")
    if overrides is None:
        return
    from clip_train.tools.plan.command import plan_command

    raise typer.Exit(plan_command(overrides, as_json=as_json))


def _overrides(context: typer.Context, *, command: str) -> list[str] | None:
    """Return the KEY=VALUE arguments, or None when a flag was answered here."""
    arguments = list(context.args)
    flags = {a for a in arguments if a.startswith("-")}
    overrides = [a for a in arguments if a not in flags]
    if flags & {"-h", "--help"}:
        from clip_train.help import describe

        print(describe(command))
        return None
    from clip_train.requirements import require_versions

    require_versions()
    if command == "train" and "--dry-run" in flags:
        flags.remove("--dry-run")
        overrides.append("launch.dry_run=true")
    if flags - {"--cfg"}:
        from clip_train.tools.coming_from_open_clip import translate

        takes = f"`clip-train {command}` takes KEY=VALUE, --cfg, --debug and --help"
        raise UserError(translate(arguments) or f"unknown option {sorted(flags - {'--cfg'})[0]}: {takes}")
    if "--cfg" in flags:
        print(_composed(command, overrides), end="")
        return None
    return overrides


def _composed(command: str, overrides: list[str]) -> str:
    if command == "sweep":
        from clip_train.tools.sweep.settings import read_settings

        return read_settings(overrides).to_yaml()
    from clip_train.config import load, to_yaml

    return to_yaml(load(command, overrides))


@app.command(name="help", short_help="Explain one config key.")
def help_key(key: Annotated[str, typer.Argument(help="A key such as optim.lr")]) -> None:
    """Explain one config key: its type, default and meaning."""
    from clip_train.help import explain

    print(explain(key))


app.command()(classify)
app.command()(search)
app.command()(prompts)
app.command()(export)


@tokenizers.command(name="train")
def tokenizer_train(
    source: Annotated[str, typer.Argument(help="Folder of .tar files, or a pattern such as 'data/{000..331}.tar'.")],
    out: Annotated[Path, typer.Argument(help="The tokenizer.json to write.")],
    vocab_size: Annotated[int, typer.Option(help="Ids: 256 bytes, merges, start and end token.")],
    cleaning: Annotated[Cleaning, typer.Option(help="Of the captions, as tokenizer.cleaning.")] = Cleaning.clip,
    caption: Annotated[str, typer.Option(help="Where captions are, as data.caption: txt or json:FIELD.")] = "txt",
) -> None:
    """Learn a byte-pair vocabulary from the captions of shards."""
    from clip_train.tools.train_tokenizer import train_tokenizer

    print(train_tokenizer(source, out, vocab_size=vocab_size, cleaning=cleaning, caption=caption))


app.command()(compare)


@tests.command(name="reliability")
def selftest_reliability(
    seed: Annotated[int | None, typer.Option(help="Break the same things at the same moments again.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep what the checks write in this folder.")] = None,
) -> None:
    """Kill runs, damage checkpoints and fill a disk on this machine; print what held. Takes some minutes."""
    from clip_train.tools.selftest.command import selftest

    raise typer.Exit(selftest(seed=seed, keep=keep))


@app.command()
def doctor(
    run: Annotated[Path | None, typer.Option(help="Look for the signatures of a sick run in this run instead.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Also write a text report for a bug thread, no secrets.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Examine this machine for training, a line for each thing; exit code 1 if something fails."""
    from clip_train.tools.doctor.command import doctor_command

    raise typer.Exit(doctor_command(run_dir=run, bundle=bundle, as_json=as_json))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write RUN/report.html: one self-contained page with curves, results and pictures."""
    from clip_train.tools.report import write_report

    print(write_report(run))


add_examples(app)
