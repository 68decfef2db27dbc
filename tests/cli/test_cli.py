"""The command line: subcommands on modules given by class path, and how it starts its other processes."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from lightning_ep import __version__, callbacks, cli, data
from lightning_ep.cli import training
from tests.ranks import run_ranks

REPOSITORY = Path(__file__).parents[2]

TINY = ["--model", f"{__name__}.TinyModule", "--data", f"{__name__}.TinyData"]
ON_CPU = ["--trainer.strategy", "auto", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
BRIEF = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
LOGGED = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs", "--trainer.logger.version", "same"]


class TinyModule(LightningModule):
    """A linear layer.

    Args:
        width: Number of features.
    """

    seen: list[str] = []  # noqa: RUF012

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append("training_step")
        return self(batch).mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.seen.append("validation_step")

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.seen.append("test_step")

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append("predict_step")
        return self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TinyData(LightningDataModule):
    """Rows of ones.

    Args:
        rows: How many.
    """

    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        self.rows = rows

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(self.rows, 4), batch_size=2)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def _greet(name: str, loud: bool = False) -> None:
    """Greets.

    Args:
        name: Whom.
        loud: Whether to shout.
    """
    print(f"hello {name.upper() if loud else name}")


@pytest.fixture(autouse=True)
def _in_an_empty_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-ep"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    TinyModule.seen.clear()


def _exit_code(*args: str) -> int | str | None:
    with pytest.raises(SystemExit) as info:
        cli.main(list(args))
    return info.value.code


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code("--version") == 0
    assert capsys.readouterr().out.split() == ["lightning-ep", __version__]


def test_help_shows_the_subcommands_and_the_arguments_of_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code("--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("fit", "validate", "test", "predict"))
    assert _exit_code("fit", "--trainer.strategy.help", "lightning_ep.ExpertParallelStrategy") == 0
    assert "--trainer.strategy.ep" in capsys.readouterr().out


def test_strategy_is_expert_parallel_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code("fit", *TINY, "--trainer.strategy.ep", "2", "--print_config") == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["strategy"]["class_path"] == "lightning_ep.ExpertParallelStrategy"
    assert config["trainer"]["strategy"]["init_args"]["ep"] == 2


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_parse_and_can_be_overridden(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code("fit", "--config", str(recipe), "--trainer.max_steps", "12", "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] == 12


@pytest.mark.parametrize(
    ("subcommand", "step"),
    [("fit", "training_step"), ("validate", "validation_step"), ("test", "test_step"), ("predict", "predict_step")],
)
def test_subcommands_run(subcommand: str, step: str) -> None:
    extra = ["--trainer.max_epochs", "1"] if subcommand == "fit" else []
    cli.main([subcommand, *TINY, *ON_CPU, *BRIEF, *LOGGED, *extra])
    assert step in TinyModule.seen


def test_config_is_saved_with_the_logs_and_trains_again_into_the_same_directory() -> None:
    cli.main(["fit", *TINY, "--model.width", "4", *ON_CPU, *BRIEF, *LOGGED, "--trainer.max_steps", "1"])
    saved = Path("logs/lightning_logs/same/config.yaml")
    config = yaml.safe_load(saved.read_text())
    assert config["model"] == {"class_path": f"{__name__}.TinyModule", "init_args": {"width": 4}}
    assert config["seed_everything"] == 1
    cli.main(["fit", "--config", str(saved), "--trainer.max_steps", "2"])
    assert yaml.safe_load(saved.read_text())["trainer"]["max_steps"] == 2


def test_a_config_of_the_user_in_the_working_directory_is_left_alone() -> None:
    recipe = Path("config.yaml")
    recipe.write_text("# mine\nseed_everything: 3\n")
    cli.main(
        ["fit", "--config", "config.yaml", *TINY, *ON_CPU, *BRIEF, "--trainer.logger", "false", "--trainer.max_steps=1"]
    )
    assert recipe.read_text().startswith("# mine")


def test_an_unknown_option_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code("fit", *TINY, "--trainer.max_step", "1") == 2
    assert "max_step" in capsys.readouterr().err


QUICKSTART = ["--config", str(REPOSITORY / "recipes/quickstart.yaml")]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["fitt"], "no command 'fitt' (did you mean fit?): fit, validate, test, predict, prepare, preview, "),
        (
            ["fit", *QUICKSTART, "--trainer.max_step", "3"],
            "no option 'trainer.max_step' (did you mean trainer.max_steps?)",
        ),
        (
            ["fit", *QUICKSTART, "--model.init_args.optimizer.init_args.lrr", "3"],
            "lightning_ep.AdamW (did you mean lr?)",
        ),
        (["fit", *QUICKSTART, "--trainer.strategy.init_args.epp", "2"], "ExpertParallelStrategy (did you mean ep?)"),
        (["fit", *QUICKSTART, "--trainer.max_steps", "three"], "trainer.max_steps: expected int; given: three"),
        (["fit", "--model", "lightning_ep.CausalM"], "no lightning_ep.CausalM (did you mean CausalLM?)"),
        (["fit", *QUICKSTART, "--model.init_args.model.num_expert", "4"], "num_expert (did you mean num_experts"),
        (["fit", *QUICKSTART, "--trainer.strategy.init_args.ep", "3"], "ep must divide 2"),
        (["fit", "--config", "missing.yaml"], "File does not exist"),
        (["fit"], "fit needs --config with a YAML file or with the name of a recipe ("),
        (["validate", "--trainer.devices", "2"], "validate needs --config"),
        (["fit", "--config", "qickstart"], "and no recipe of that name (did you mean quickstart?): "),
        (["fit", "--config=recipes/quickstart.yaml"], "; --config quickstart takes the recipe that comes with the"),
        (["recipes", "sho"], "invalid choice: 'sho'"),
        (["recipes", "show", "qickstart"], "no recipe 'qickstart' (did you mean quickstart?): "),
        (["export", "a", "b", "--dtipe", "c"], "no option 'dtipe' (did you mean dtype?)"),
        (["export", "missing", "out"], "There is no checkpoint missing"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value[:30],
)
def test_an_error_is_one_line_with_the_nearest_name(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _exit_code(*arguments) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text and "Seed set" not in text]
    assert len(errors) == 1, errors
    assert errors[0].startswith("lightning-ep: error: ")
    assert line in errors[0]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _exit_code(*arguments) == 2
    assert "error" not in capsys.readouterr().err


class NoLabels(TinyData):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([{"input_ids": torch.ones(4, dtype=torch.int64)}] * 4, batch_size=2)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


def _said_by_rank(arguments: list[str]) -> tuple[int | str | None, list[str]]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as info:
        cli.main(arguments)
    return info.value.code, [line for line in said.getvalue().splitlines() if "error" in line]


def test_what_a_run_refuses_before_its_first_batch_is_one_line_of_each_rank() -> None:
    odd = ["--model.init_args.model.num_experts", "7", "--trainer.callbacks", "[]", "--trainer.logger", "false"]
    arguments = ["fit", *QUICKSTART, *odd, "--data", "tests.cli.test_cli.TinyData"]
    found = run_ranks(2, _said_by_rank, arguments, init_process_group=False)
    assert [code for code, _ in found] == [2, 2]
    (first,), (second,) = (lines for _, lines in found)
    assert first.startswith("lightning-ep: error: ")
    assert second.startswith("error on rank 1: ")
    assert "7" in first


def test_what_is_wrong_with_a_batch_is_shown_with_its_place() -> None:
    one = [
        "--trainer.devices",
        "1",
        "--trainer.strategy.ep",
        "1",
        "--trainer.callbacks",
        "[]",
        "--trainer.logger",
        "false",
    ]
    with pytest.raises(ValueError, match="no labels"):
        cli.main(["fit", *QUICKSTART, *one, "--data", "tests.cli.test_cli.NoLabels"])


def test_help_comes_without_torch_and_names_what_a_recipe_may_hold() -> None:
    code = (
        "import sys, lightning_ep_start as s\ntry: s.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert shown.stdout.splitlines()[-1] == "False"
    names = [f"lightning_ep.callbacks.{name}" for name in callbacks.__all__]
    names += [f"lightning_ep.data.{name}" for name in data.__all__ if name.endswith("DataModule")]
    assert not [name for name in names if name not in shown.stdout]
    assert not [name for name in (*cli.COMMANDS, "fit", "predict") if f"  {name} " not in shown.stdout]


def test_the_resume_command_is_that_of_the_run_with_another_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["lightning-ep", "fit", "--config", "my recipe.yaml", "--ckpt_path", "last", "--trainer.max_steps=3"]
    monkeypatch.setattr(sys, "argv", words)
    command = training.SaveConfig(None, None).resume_command(Path.cwd() / "saved" / "x.ckpt")
    assert shlex.split(command)[-5:] == [
        "--config", "my recipe.yaml", "--trainer.max_steps=3", "--ckpt_path", "saved/x.ckpt",
    ]  # fmt: skip


def test_a_command_without_a_trainer_is_one_table_entry(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "greet", f"{__name__}:_greet")
    cli.main(["greet", "ada", "--loud", "true"])
    assert capsys.readouterr().out == "hello ADA\n"
    assert _exit_code("greet", "--help") == 0
    shown = capsys.readouterr().out
    assert "Whether to shout." in shown
    assert "Greets." in shown
    assert _exit_code("--help") == 0
    assert "greet" in capsys.readouterr().out


_USERS_MODULE = """
import warnings
from pathlib import Path
from tests.cli.test_cli import TinyData, TinyModule

class Module(TinyModule):
    def on_fit_start(self):
        warnings.warn(f"a warning of rank {self.global_rank}")
        Path(f"rank-{self.global_rank}").write_text(str(self.trainer.world_size))
"""


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["console script", "python -m"])
def test_each_entry_starts_its_other_processes_and_lets_rank_0_speak(entry: str, tmp_path: Path) -> None:
    (tmp_path / "users_module.py").write_text(_USERS_MODULE)
    # What pip installs for a console script, in a directory of its own as in an environment's bin/.
    script = tmp_path / "bin" / "lightning-ep"
    script.parent.mkdir()
    script.write_text("import sys\nfrom lightning_ep.cli import main\nsys.exit(main())\n")
    start = [str(script)] if entry == "console script" else ["-m", "lightning_ep"]
    options = ["--model", "users_module.Module", "--data", "users_module.TinyData", "--trainer.strategy", "ddp"]
    options += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.max_steps", "1", *BRIEF, *LOGGED]
    done = subprocess.run(
        [sys.executable, *start, "fit", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == ["2", "2"]
    assert "a warning of rank 0" in done.stderr
    assert "rank 1" not in done.stdout + done.stderr
    assert (tmp_path / "logs/lightning_logs/same/config.yaml").exists()
