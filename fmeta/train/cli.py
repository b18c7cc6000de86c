"""The command ``fmeta``: parses arguments, runs a command, turns errors into one line and an exit code."""

from __future__ import annotations

import difflib
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Union, cast

import tyro

from fmeta.parallel import Elsewhere, launched
from fmeta.train.adapt_command import AdaptCommand
from fmeta.train.arguments import CompareCommand, EvalCommand, ListCommand, plainly_spelled
from fmeta.train.config import Config
from fmeta.train.export_command import ExportCommand, export_command
from fmeta.train.recipes import RECIPES
from fmeta.types import MetaLearningWarning

ABOUT = """Meta-learning: train a recipe, then look into its run folder.

`fmeta train sinusoid` is a good start: it needs no data and takes a minute or two on two cores.
`fmeta train RECIPE --help` shows every option of a recipe with its default.

Exit codes: 0 done; 1 an error, said in one line (--debug shows where it came from); 2 a wrong command line;
130 stopped by Ctrl-C."""
STATED = (ValueError, TypeError, NotImplementedError, RuntimeError, OSError, ImportError)
"""What is shown as one line. Anything else is a bug of fmeta, and shown whole."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: what follows ``fmeta``; the process's own by default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        with short_warnings():
            return run([argument for argument in given if argument != "--debug"])
    except KeyboardInterrupt:
        print(f"fmeta{who()}: stopped.", file=sys.stderr)
        return 130
    except Elsewhere:
        return 1
    except BrokenPipeError:  # `fmeta list | head`
        sys.stdout = Path(os.devnull).open("w")  # or Python complains when it closes it
        return 0
    except STATED as error:
        if debug:
            raise
        print(f"fmeta{who()}: {error}", file=sys.stderr)
        return 1


def who() -> str:
    """Which process speaks, where it is not the first or the only one."""
    return f" (rank {launched().rank})" if launched().rank else ""


def run(arguments: list[str]) -> int:
    """Parse the arguments and do what they say."""
    arguments = plainly_spelled(resume_spelled_out(arguments))
    with only_the_first_speaks():
        wrong = unknown_word(arguments)
        if wrong:
            print(f"fmeta: {wrong}", file=sys.stderr)
            return 2
        command = parse(arguments)
    # Imported late, so that help and errors of the command line come without delay.
    from fmeta.parallel import keep_freed_memory
    from fmeta.train import commands

    keep_freed_memory()
    line = shlex.join(["fmeta", *arguments])
    if isinstance(command, ListCommand):
        return 0 if launched().rank else commands.show_list(Path("runs"))
    if isinstance(command, AdaptCommand):
        return command.carry_out()
    if isinstance(command, EvalCommand):
        return commands.evaluate(command.run, line, **options_of(command, "run"))
    if isinstance(command, ExportCommand):
        return export_command(command)
    if isinstance(command, CompareCommand):
        return commands.compare_runs(list(command.runs), **options_of(command, "runs"))
    return commands.train(command.config, line)


def options_of(command: EvalCommand | CompareCommand, besides: str) -> dict[str, Any]:
    """All but the run folders, by name."""
    return {entry.name: getattr(command, entry.name) for entry in fields(command) if entry.name != besides}


def parse(arguments: list[str]) -> Any:
    """The command with its options, as tyro builds it; leaves the process on a wrong command line."""
    train = make_dataclass(
        "TrainCommand", [("config", recipe_choice(default_configs(arguments)))], frozen=True
    )
    commands: dict[str, tuple[Any, str]] = {
        "train": (train, "Train a recipe: `fmeta train RECIPE --help` shows its options."),
        "eval": (EvalCommand, described(EvalCommand)),
        "compare": (CompareCommand, described(CompareCommand)),
        "adapt": (AdaptCommand, described(AdaptCommand)),
        "export": (ExportCommand, described(ExportCommand)),
        "list": (ListCommand, described(ListCommand)),
    }
    choices = [
        Annotated[kind, tyro.conf.subcommand(name, description=text)]
        for name, (kind, text) in commands.items()
    ]
    style = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    kind = cast("Any", Union[tuple(choices)])  # noqa: UP007
    return tyro.cli(kind, prog="fmeta", description=ABOUT, args=arguments, config=style)


def recipe_choice(configs: dict[str, Config[Any]]) -> Any:
    """One subcommand a recipe, with these configs as defaults and the recipe's own words as help."""
    choices = [
        Annotated[
            Config[type(config.task)] if type(config) is Config else type(config),  # type: ignore[misc]
            tyro.conf.subcommand(name, default=config, description=described(RECIPES[name])),
        ]
        for name, config in configs.items()
    ]
    return Union[tuple(choices)]  # noqa: UP007


def default_configs(arguments: list[str]) -> dict[str, Config[Any]]:
    """The recipes' configs; for a run that is resumed, its own in place of its recipe's."""
    configs = {name: recipe() for name, recipe in RECIPES.items()}
    if "--resume" in arguments and "--help" not in arguments and "--out" in arguments[:-1]:
        from fmeta.train.folder import read_config

        saved = read_config(Path(arguments[arguments.index("--out") + 1]))
        configs[saved.recipe] = saved
    return configs


def resume_spelled_out(arguments: list[str]) -> list[str]:
    """``--resume RUN`` as ``--out RUN --resume``."""
    spelled = [part for argument in arguments for part in _split_value(argument, "--out", "--resume")]
    if "--resume" not in spelled:
        return spelled
    place = spelled.index("--resume")
    value = spelled[place + 1 : place + 2]
    if value and not value[0].startswith("-"):
        return [*spelled[:place], "--out", value[0], "--resume", *spelled[place + 2 :]]
    return spelled


def _split_value(argument: str, *names: str) -> list[str]:
    name, equals, value = argument.partition("=")
    return [name, value] if equals and name in names else [argument]


def unknown_word(arguments: list[str]) -> str:
    """What is wrong with the first words, with the nearest right one; empty if nothing is."""
    words = [argument for argument in arguments[:2] if not argument.startswith("-")]
    expected = [("command", ["train", "eval", "compare", "adapt", "export", "list"])]
    if words[:1] == ["train"]:
        expected.append(("recipe", list(RECIPES)))
    for word, (kind, known) in zip(words, expected, strict=False):
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else "`fmeta --help` says more."
            return f"there is no {kind} {word!r}, only {', '.join(known)}. {hint}"
    return ""


def described(thing: Callable[..., Any]) -> str:
    """A docstring as flowing text."""
    paragraphs = (thing.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


@contextmanager
def only_the_first_speaks() -> Iterator[None]:
    """Drop what the other processes print: all parse the same command line."""
    with ExitStack() as stack:
        if launched().rank:
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


@contextmanager
def short_warnings() -> Iterator[None]:
    """Show fmeta's own warnings as a line of text; others, from libraries, as Python does."""
    shown = warnings.showwarning

    def show(message: Any, category: Any, *rest: Any, **more: Any) -> None:
        if issubclass(category, MetaLearningWarning):
            print(f"fmeta{who()}: {message}", file=sys.stderr)
        else:
            shown(message, category, *rest, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown
