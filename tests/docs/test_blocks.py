"""No block of a page goes unlooked at: a test runs it, or it says why not, and then at least its names exist."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import yaml

import lightning_ep
from lightning_ep import cli
from lightning_ep_start import COMMANDS, DATA_COMMANDS, TRAINER_COMMANDS, recipes
from tests.docs.command_lines import why_not
from tests.docs.pages import PAGES, ROOT, Block, block, blocks, commands
from tests.ranks import run_ranks
from tests.reference import why_no_adapters
from tests.talking import write_talking
from tests.tiny import TinyModule, loader, quiet

NAMES = {*TRAINER_COMMANDS, *DATA_COMMANDS, *COMMANDS, "plan", "recipes"}
READ_ALL = ("test_parts_of_recipes_train", "test_commands_and_their_options_exist")
LANGUAGES = {"bash", "json", "python", "text", "yaml"}
EVERY = [block for page in PAGES for block in blocks(page)]


def of(*languages: str) -> Any:
    return pytest.mark.parametrize("block", [b for b in EVERY if b.language in languages], ids=str)


def messages(file: str) -> list[re.Pattern[str]]:
    """The longer texts of a file, with anything in the place of values; texts that are added are one."""
    found = []
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp):
            pattern = _pattern(node)
            if len(pattern.replace(".*", "")) > 50:
                found.append(re.compile(pattern))
    return found


def _pattern(node: ast.expr) -> str:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _pattern(node.left) + _pattern(node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_pattern, node.values))
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"(\\ |\\\n)+", " *", re.escape(node.value))
    return ".*"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    for one in blocks(page):
        if not one.language:
            assert "lightning-ep" not in one.text or one.how, f"{one}: a drawing has no commands; name its test"
        elif one.how != "run":
            assert one.language in LANGUAGES, one
            assert one.how in ("excerpt", "printed", "read"), f"{one}: who runs it? See tests/docs/pages.py"
            assert len(one.by) > 10, f"{one}: why is it not run?"
        if one.how == "run":
            file, _, name = one.by.partition("::")
            text = (ROOT / file).read_text()
            assert f"\ndef {name}(" in text, f"{one} names a test that is not there"
            reads = Path(page).name in text or name in READ_ALL
            assert reads, f"{one}: {file} does not read this page"
        if one.how == "printed":
            assert any(form.fullmatch(" ".join(one.text.split())) for form in messages(one.by)), (
                f"{one}: not in {one.by}"
            )
        if one.how == "excerpt":
            lines = {line.strip() for line in (ROOT / one.by).read_text().splitlines()}
            assert [line for line in one.text.splitlines() if line.strip() not in lines] == [], one


def test_blocks_that_are_only_read_are_the_exception() -> None:
    """Of Python and YAML, which need no GPU to be tried at a small size."""
    counted = Counter((one.language, one.how) for one in EVERY)
    for language in ("python", "yaml"):
        assert counted[language, "read"] <= 0.2 * sum(n for (one, _), n in counted.items() if one == language), counted


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that pages name, and recipes where pages have one only in mind."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("my_run.yaml", "chats.yaml", "run.yaml"):
        (folder / name).write_text(recipes.files()["sft_quickstart"].read_text())
    for one in EVERY:
        if one.file and one.language == "yaml":
            (folder / one.file).write_text(one.text)
    return folder


@of("bash")
def test_commands_and_their_options_exist(block: Block, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    found = commands(block)
    assert found, block
    wrong = {line: reason for line in found if (reason := why_not(line))}
    assert not wrong, f"{block}: {wrong}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_sentences_exist(page: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those without words in capitals, which stand for something; a bare name says that there is such a command."""
    monkeypatch.chdir(desk)
    for words in re.findall(r"`lightning-ep ([^`]+)`", (ROOT / page).read_text()):
        name, *rest = words.split()
        if rest and not re.search(r"\b[A-Z]{2,}\b|\.\.\.", words):
            assert not why_not(f"lightning-ep {words}"), f"{page}: {words}"
        assert name in (*NAMES, "COMMAND") or name.startswith("-"), f"{page}: {words}"


@of("yaml")
def test_recipes_are_such(block: Block, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    keys = yaml.safe_load(block.text).keys()
    if not keys <= {"trainer", "model", "data", "seed_everything"}:
        assert block.how == "run", f"{block}: no part of a recipe"
        return
    (tmp_path / "part.yaml").write_text(block.text)
    wrong = why_not(f"lightning-ep fit --config sft_quickstart --config {tmp_path}/part.yaml")
    assert not wrong, f"{block}: {wrong}"


def _train(words: list[str], root: Path) -> None:
    os.chdir(root)
    cli.main(words)


TINY = """
trainer:
  {accelerator: cpu, devices: 1, max_steps: 2, limit_val_batches: 1, log_every_n_steps: 1, enable_progress_bar: false,
   logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: runs}}}
model: {class_path: lightning_ep.CausalLM, init_args: {model: tiny}}
data:
  class_path: lightning_ep.data.TextDataModule
  init_args: {source: texts, sequence_length: 16, batch_size: 1, validation_fraction: 0.2}
"""


def test_parts_of_recipes_train(tmp_path: Path) -> None:
    """Blocks of YAML that name this test, each laid over a tiny recipe."""
    write_talking(tmp_path / "tiny")
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / f"texts/{number}.txt").write_text("zeta eta theta " * 20)
    (tmp_path / "tiny.yaml").write_text(TINY)
    mine = [one for one in EVERY if one.by.endswith("::test_parts_of_recipes_train")]
    assert len(mine) >= 4
    for number, one in enumerate(mine):
        (tmp_path / f"{number}.yaml").write_text(re.sub(r"Qwen/[\w-]+", "tiny", one.text))
        words = ["fit", "--config", "tiny.yaml", "--config", f"{number}.yaml", "--trainer.logger.name", str(number)]
        run_ranks(1, _train, words, tmp_path, init_process_group=False)
        assert "train/loss" in (tmp_path / f"runs/{number}/version_0/metrics.csv").read_text(), one


@cache
def _files_of_pages() -> dict[str, str]:
    """The Python files that pages have a reader make, by name."""
    return {one.file: one.text for one in EVERY if one.language == "python" and one.file is not None}


@of("python")
def test_python_compiles_and_its_imports_exist(block: Block) -> None:
    if block.how == "excerpt":
        return
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (text := _files_of_pages().get(f"{node.module}.py")) is not None:
            defined = {part.name for part in ast.parse(text).body if isinstance(part, ast.ClassDef | ast.FunctionDef)}
            assert {alias.name for alias in node.names} <= defined, f"{block}: {node.module}.py has {defined}"
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lightning_ep":
            assert hasattr(lightning_ep, node.attr), f"{block}: lightning_ep.{node.attr}"


@of("json")
def test_rows_are_json(block: Block) -> None:
    for line in block.text.splitlines() if block.text.count("\n{") else [block.text]:
        assert set(json.loads(line)) & {"messages", "prompt", "chosen", "conversations"}, block


def samples(size: int) -> L.LightningDataModule:
    return L.LightningDataModule.from_datasets(loader(size).dataset, batch_size=2, num_workers=0)


def on_one_cpu(code: str, **others: str) -> str:
    """Code of a page with the sizes of this machine; what stands on the left must be there."""
    sizes = {r"devices=\d+": "devices=1, accelerator='cpu', logger=False", r"ep=\d": "ep=1", **others}
    for printed, ours in sizes.items():
        code, found = re.subn(printed, ours, code)
        assert found, printed
    return code


def test_the_readme_trains_a_module_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"module": TinyModule(), "datamodule": samples(4)}
    exec(
        on_one_cpu(block("README.md", "from lightning.pytorch"), **{'"bf16-mixed"': '"bf16-mixed", max_steps=2'}), names
    )
    assert names["trainer"].global_step == 2


def test_contributing_shows_what_a_family_declares(capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("CONTRIBUTING.md", "import torch\n"), {})
    assert capsys.readouterr().out.splitlines() == [
        "kept from the fused path by {None}",
        "16 layers, 16 routers",
        "kept from cp by None",
    ]


def test_layouts_has_the_one_call_of_a_module_under_cp(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(block("docs/choose/layouts.md", "def training_step"), names)
    module = TinyModule()
    module.training_step = names["training_step"].__get__(module)  # type: ignore[method-assign]
    trainer = quiet(tmp_path, strategy=lightning_ep.ExpertParallelStrategy(ep=1), max_steps=2)
    trainer.fit(module, loader(4))
    assert trainer.global_step == 2


def test_resume_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = "docs/operate/resume.md"
    names: dict[str, Any] = {"module": TinyModule(), "datamodule": samples(8)}
    exec(on_one_cpu(block(page, "from lightning"), **{"10_000": "4", "steps=500": "steps=2"}), names)
    assert names["trainer"].global_step == 4
    assert (tmp_path / "checkpoints/last.ckpt").exists()
    again = quiet(tmp_path, strategy=lightning_ep.ExpertParallelStrategy(ep=1), max_steps=2, limit_val_batches=0)
    (tmp_path / "weights.ckpt").symlink_to(tmp_path / "checkpoints/last.ckpt")
    exec(block(page, "trainer.validate"), {**names, "trainer": again})
    assert again.global_step == 2, "it starts anew, from those weights"


@pytest.mark.skipif(why_no_adapters() is not None, reason=str(why_no_adapters()))
def test_lora_is_a_call_in_a_module(tmp_path: Path) -> None:
    write_talking(tmp_path / "tiny")
    code = block("docs/start/lora.md", "self.model =")
    assert "Qwen/Qwen3-30B-A3B" in code
    names: dict[str, Any] = {"self": SimpleNamespace(), "lightning_ep": lightning_ep}
    exec(code.replace("Qwen/Qwen3-30B-A3B", str(tmp_path / "tiny")), names)
    model = names["self"].model
    adapters = [name for name, param in model.named_parameters() if param.requires_grad]
    assert any("experts" in name for name in adapters)
    assert all("lora" in name for name in adapters)
