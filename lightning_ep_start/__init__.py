"""Where ``lightning-ep`` starts: its help, its commands and its recipes, without torch, which takes seconds."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

__version__ = "0.1.0"

COMMANDS: dict[str, str] = {
    "check": "lightning_ep.cli.check:check",
    "consolidate": "lightning_ep.cli.consolidate:consolidate",
    "export": "lightning_ep.cli.export:export",
    "generate": "lightning_ep.cli.generation:generate",
    "perplexity": "lightning_ep.cli.perplexity:perplexity",
    "routing": "lightning_ep.cli.routing_report:routing",
}
"""Commands that run without a Trainer: the name, and ``module:function`` to call. The function's signature and
docstring become the command's options and help; its module is imported only when the command is called."""

DATA_COMMANDS = ("prepare", "preview")
"""Commands on the data of a recipe, which take the options of ``fit``."""

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")

SENTENCES = {
    "fit": "Train a model.",
    "validate": "Evaluate a model or a checkpoint on the validation data.",
    "test": "Evaluate a model or a checkpoint on the test data.",
    "predict": "Run a model or a checkpoint on the data to predict.",
    "check": "Compare a layout with one process on these GPUs, and look at the links between them.",
    "prepare": "Prepare a recipe's data on CPUs, before GPUs are taken.",
    "preview": "Show what is learnt of a recipe's data.",
    "consolidate": "Write a checkpoint directory as one file.",
    "export": "Write a training checkpoint as a directory that transformers and vLLM read.",
    "generate": "Print what a model adds to a prompt, or chat with it.",
    "perplexity": "Evaluate a model on a text file.",
    "routing": "Show which experts a model sends texts to, and what they are for.",
    "plan": "Which layout, does it fit, how fast: estimates, without a GPU.",
    "recipes": "List, show or copy the recipes that come with this package.",
}

_HELP = """\
usage: lightning-ep COMMAND [options]

Trains mixture-of-experts transformers with expert parallelism. A run is a YAML
recipe, a file of yours or the name of one that comes with this package, and
every value in it can be overridden by an option:

  lightning-ep fit --config quickstart --trainer.max_steps 12

commands:
{commands}

In a recipe:
  strategy   lightning_ep.ExpertParallelStrategy (the default)
  model      lightning_ep.CausalLM, lightning_ep.DPO, or a LightningModule of your own
             Its routers are steered by BalancingLoss, RouterZLoss and BiasUpdates
             of lightning_ep.routing.
  optimizer  lightning_ep.AdamW, or any of torch's
  data       lightning_ep.data.ChatDataModule teaches what the assistant says in chats.
             lightning_ep.data.VisionChatDataModule has images in conversations,
             lightning_ep.data.PromptCompletionDataModule teaches completions, and
             lightning_ep.data.PreferenceDataModule which of two answers is better.
             lightning_ep.data.TextDataModule teaches texts, and
             lightning_ep.data.TextStreamDataModule those too large to prepare first.
             Or a LightningDataModule of your own; lightning_ep.data.PackedDataModule
             is a base for those that pack documents.
  callbacks  lightning_ep.callbacks.Throughput logs tokens per second, and what share of the
             GPU's arithmetic that takes.
             lightning_ep.callbacks.ExpertLoadMonitor logs and draws how tokens are spread
             over experts.
             lightning_ep.callbacks.GenerateSamples prints continuations of prompts, or
             answers to questions.
             lightning_ep.callbacks.GradeAnswers logs how good answers are.
             lightning_ep.callbacks.HuggingFaceExport writes what transformers reads.
             lightning_ep.callbacks.WritePredictions writes what predict gives.
             And those of lightning.pytorch.callbacks.

  lightning-ep COMMAND --help           shows the options of a command.
  lightning-ep fit --model.help CLASS   shows those of a class; --data.help,
                                        --trainer.strategy.help, --trainer.callbacks.help too.
  lightning-ep --version                shows the version.
"""


_DATA_HELP = {
    "prepare": """\
usage: lightning-ep prepare CONFIG [options]

Makes the windows that `fit` with the same recipe and options trains on, unless
they are in the cache, and says what is in them. It needs CPUs only.""",
    "preview": """\
usage: lightning-ep preview CONFIG [options]

Shows five documents of a recipe's data with what is learnt of them, and counts
what the first rows of each source give. It takes seconds and prepares nothing.""",
}

_DATA_OPTIONS = """

CONFIG is a YAML recipe, a file of yours or the name of one that comes with this
package. The options are those of `fit`, for example:

  lightning-ep {name} quickstart --data.sequence_length 256

  lightning-ep fit --help               shows them.
  lightning-ep fit --data.help CLASS    shows those of a data module.
"""


def main(args: list[str] | None = None) -> None:
    """Runs the command line; see `lightning_ep.cli.main`, which is imported only where it is needed."""
    answer(sys.argv[1:] if args is None else args)
    from lightning_ep.cli import main

    main(args)


_asked: list[str] | None = None  # the arguments of `lightning-ep plan`, whose room of the package knows no torch


def answer_first() -> None:
    """Answers what needs no torch while the package begins to be imported, from its first line.

    ``lightning-ep plan`` needs one room of the package, and none of what the package imports after that line. For
    ``python -m lightning_ep`` this does what `main` does for the console script: Python imports a package before it
    runs its ``__main__``. Until then the first of ``sys.argv`` is ``-m``.
    """
    if _asked is not None:
        _plan(_asked)
    module = sys.orig_argv[-len(sys.argv) :][:1]
    if sys.argv[:1] == ["-m"] and module in (["lightning_ep"], ["-mlightning_ep"]):
        answer(sys.argv[1:])


@contextmanager
def _readers_may_leave() -> Iterator[None]:
    """Ends the program without a traceback where nobody reads on, as behind ``| head``."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python's end flushes what is left
        sys.exit(1)


@_readers_may_leave()
def answer(arguments: list[str]) -> None:
    """Ends the program where an answer needs no torch: the help, a list of recipes, a mistake in a name."""
    from lightning_ep_start import recipes

    commands = (*TRAINER_COMMANDS, *DATA_COMMANDS, *COMMANDS, "plan", "recipes")
    if arguments in (["-h"], ["--help"]):
        print(_HELP.format(commands="\n".join(f"  {name:<12} {SENTENCES.get(name, '')}".rstrip() for name in commands)))
        sys.exit(0)
    if arguments == ["--version"]:
        print(f"lightning-ep {__version__}")
        sys.exit(0)
    if not arguments:
        fail(f"no command: give one of {', '.join(commands)}.")
    if not arguments[0].startswith("-") and arguments[0] not in commands:
        fail(f"there is no command {arguments[0]!r}{did_you_mean(arguments[0], commands)}: {', '.join(commands)}.")
    if arguments[0] == "recipes":
        recipes.main(arguments[1:])
        sys.exit(0)
    if arguments[0] == "plan":
        global _asked
        _asked = arguments[1:]
        importlib.import_module("lightning_ep")  # where it is not imported yet, its first line answers
        _plan(_asked)
    if arguments[0] in DATA_COMMANDS:
        if arguments[1:] in (["-h"], ["--help"]):
            print(_DATA_HELP[arguments[0]] + _DATA_OPTIONS.format(name=arguments[0]), end="")
            sys.exit(0)
        recipes.check(recipes.with_flag(arguments))
    if arguments[0] in TRAINER_COMMANDS:
        recipes.check(arguments)


def _plan(arguments: list[str]) -> NoReturn:
    global _asked
    _asked = None
    command = importlib.import_module("lightning_ep.planner.command")
    command.main(arguments)
    sys.exit(0)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A phrase with the name that is nearest to another, if any is near."""
    found = difflib.get_close_matches(name, sorted(names), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def fail(text: str) -> NoReturn:
    """Ends the program with a line, which only the first of several processes prints."""
    say(f"error: {text}")
    sys.exit(2)


def say(text: str) -> None:
    """Prints a line beside the output of the first of several processes."""
    if all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")):
        print(f"lightning-ep: {text}", file=sys.stderr)
