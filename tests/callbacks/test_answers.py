"""Chats that are answered during training, as plain transformers answer them, and how good the answers are called."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy
from torchmetrics.text import CharErrorRate
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ep import CausalLM, ExpertParallelStrategy
from lightning_ep.callbacks import GenerateSamples, GradeAnswers
from lightning_ep.data.windows import Sample, fill_window, last_answers
from tests.ranks import run_ranks
from tests.talking import greedy, greedy_ids, write_talking
from tests.tiny import quiet

LENGTH = 6  # tokens of an answer
ASKED = [{"role": "user", "content": "zeta"}]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talking(tmp_path_factory.mktemp("hub") / "tiny")


class Module(LightningModule):
    """A user's module: nothing of lightning_ep."""

    def __init__(self, hub: Path) -> None:
        super().__init__()
        self.model: Any = AutoModelForCausalLM.from_pretrained(hub)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def _validate(hub: Path, callback: Any, windows: Any = None, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False}
    trainer = Trainer(callbacks=[callback], **{**defaults, **settings})
    trainer.validate(Module(hub), DataLoader(windows or [torch.zeros(1)], batch_size=1), verbose=False)
    return trainer


# --------------------------------------------------------------------------------------------------------------- chats


def test_chats_are_answered_through_the_template(hub: Path, capsys: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(hub)
    talk = [*ASKED, {"role": "assistant", "content": "eta"}, {"role": "user", "content": "theta"}]
    expected = []
    for chat in (ASKED, talk):
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        expected.append(f"{chat[-1]['content']}\n> {greedy(hub, prompt, 5)}")
    assert expected[0] != expected[1]
    callback = GenerateSamples(["zeta", talk], chat=True, max_new_tokens=5, temperature=0, tokenizer=tokenizer)
    _validate(hub, callback)
    assert capsys.readouterr().out == "".join(f"--- sample at step 0\n{text}\n" for text in expected) + "---\n"


class Board(TensorBoardLogger):
    """Keeps what TensorBoard's writer, which is not installed, is given."""

    name, version, save_dir, log_dir = "tests", 0, ".", "."

    def __init__(self) -> None:
        self.texts: list[tuple[str, str, int]] = []

    @property
    def experiment(self) -> Any:
        return self

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.append((tag, text, step))

    def save(self) -> None:
        pass

    def finalize(self, status: str) -> None:
        pass

    log_metrics = log_graph = lambda *_, **__: None


def test_samples_are_text_in_tensorboard(hub: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(hub)
    callback = GenerateSamples(["zeta", "eta"], max_new_tokens=5, temperature=0, tokenizer=tokenizer)
    board = Board()
    trainer = _validate(hub, callback, logger=board)
    texts = callback._generate(trainer, trainer.lightning_module)
    assert board.texts == [(f"samples/{number}", f"    {text}", 0) for number, text in enumerate(texts)]


def test_samples_are_a_table_in_wandb(hub: Path, tmp_path: Path) -> None:
    logged: list[Any] = []

    class Run:
        """Stands in for a run of wandb, which would start a service."""

        id = name = project = "tests"

        def log(self, values: dict[str, Any], **_: Any) -> None:
            logged.append(values)

    callback = GenerateSamples(["zeta"], max_new_tokens=5, temperature=0, tokenizer=AutoTokenizer.from_pretrained(hub))
    trainer = _validate(hub, callback, logger=WandbLogger(save_dir=tmp_path, offline=True, experiment=Run()))
    (table,) = [values["samples"] for values in logged if "samples" in values]
    assert table.columns == ["step", "text"]
    assert table.data == [["0", *callback._generate(trainer, trainer.lightning_module)]]


@pytest.mark.parametrize(
    ("prompts", "template", "message"),
    [
        ([ASKED], None, "prompts that are lists of messages are for chats"),
        (["zeta"], "", r"GenerateSamples\(chat=True\) needs a chat template"),
        (["zeta"], "{{ raise_exception('no zeta') }}", "template refuses a prompt of GenerateSamples: no zeta"),
    ],
)
def test_what_no_template_can_ask_is_refused(prompts: Any, template: str | None, message: str, hub: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(hub)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        _validate(hub, GenerateSamples(prompts, chat=template is not None, tokenizer=tokenizer))


# -------------------------------------------------------------------------------------------------------------- grades


@pytest.fixture(scope="module")
def documents(hub: Path) -> list[tuple[list[int], list[int]]]:
    """Twelve prompts of unequal length with answers, of which every third is not what the model says."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(12):
        prompt = torch.randint(3, 200, (2 + number % 5,), generator=generator).tolist()
        answer = greedy_ids(hub, prompt, LENGTH)
        found.append((prompt, answer if number % 3 else [answer[0] ^ 1, *answer[1:]]))
    return found


def _windows(documents: list[tuple[list[int], list[int]]]) -> list[dict[str, Tensor]]:
    """Three documents in each, and padding."""
    samples = [Sample([*p, *a], [False] * len(p) + [True] * len(a)) for p, a in documents]
    filled = [fill_window(samples[begin : begin + 3], 48, 0) for begin in range(0, len(samples), 3)]
    return [{key: torch.tensor(value).long() for key, value in window._asdict().items()} for window in filled]


def test_answers_are_the_last_supervised_tokens_of_documents(documents: Any) -> None:
    batch = torch.utils.data.default_collate(_windows(documents))
    assert list(last_answers(batch)) == documents
    ids, labels = torch.arange(8)[None], torch.tensor([[-100, 1, 2, -100, 4, 5, -100, -100]])
    assert list(last_answers({"input_ids": ids, "labels": labels})) == [([0, 1, 2, 3], [4, 5])]
    assert not list(last_answers({"input_ids": ids, "labels": torch.full_like(ids, -100)}))
    assert not list(last_answers({"input_ids": ids, "labels": ids})), "nothing is asked"


def _answered(root: Path, hub: Path, windows: list[dict[str, Tensor]]) -> str:
    callback = GenerateSamples(max_new_tokens=LENGTH, temperature=0, tokenizer=AutoTokenizer.from_pretrained(hub))
    trainer = quiet(root, strategy=ExpertParallelStrategy(ep=2), callbacks=[callback])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        trainer.validate(CausalLM(str(hub)), DataLoader(windows, batch_size=1), verbose=False)
    return printed.getvalue()


def test_without_prompts_questions_of_the_data_are_answered_on_all_ranks(
    documents: Any, hub: Path, tmp_path: Path
) -> None:
    first, second = run_ranks(2, _answered, tmp_path, hub, _windows(documents), init_process_group=False)
    tokenizer = AutoTokenizer.from_pretrained(hub)
    expected = ""
    for prompt, answer in documents[:2]:  # of which the first is no answer of the model's
        question, said, right = (tokenizer.decode(x, skip_special_tokens=True).strip() for x in (
            prompt, greedy_ids(hub, prompt, LENGTH), answer
        ))  # fmt: skip
        expected += f"--- sample at step 0\n{question}\n> {said}\n(expected: {right})\n"
    assert first == f"{expected}---\n"
    assert second == ""


def test_data_without_questions_are_refused_where_there_are_no_prompts(hub: Path) -> None:
    callback = GenerateSamples(tokenizer=AutoTokenizer.from_pretrained(hub))
    with pytest.raises(ValueError, match=r"GenerateSamples found no question.*for other data give prompts"):
        _validate(hub, callback)
    with pytest.raises(ValueError, match="chat=True is for prompts"):
        GenerateSamples(chat=True)


class Number(Metric):
    """How many answers there are: what ranks must not add up, since each has all."""

    number: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("number", torch.tensor(0.0), "sum")

    def update(self, preds: list[str], target: list[str]) -> None:
        self.number += len(preds)

    def compute(self) -> Tensor:
        return self.number


def _grade(root: Path, hub: Path, windows: list[dict[str, Tensor]], tp: int) -> tuple[dict[str, Any], list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(hub)
    settings: dict[str, Any] = {"max_new_tokens": LENGTH, "batch_size": 2, "tokenizer": tokenizer}
    callbacks = [
        GradeAnswers(samples=9, **settings),
        GradeAnswers(CharErrorRate(), name="val/errors", **settings),
        GradeAnswers(Number() + Number(), name="val/twice", **settings),
    ]
    trainer = quiet(root, strategy=ExpertParallelStrategy(ep=2, tp=tp), callbacks=callbacks)
    module = CausalLM(str(hub))
    calls: list[int] = []
    module.configure_model = _counted(module, module.configure_model, calls)  # type: ignore[method-assign]
    trainer.validate(module, DataLoader(windows, batch_size=1), verbose=False)
    return {key: value.item() for key, value in trainer.callback_metrics.items() if key != "val/loss"}, calls


def _counted(module: CausalLM, configure: Any, calls: list[int]) -> Any:
    def configure_model() -> None:
        configure()
        model: Any = module.model
        generate = model.generate

        def counted(**arguments: Any) -> Tensor:
            calls.append(len(arguments["input_ids"]))
            return generate(**arguments)

        model.generate = counted

    return configure_model


@pytest.mark.parametrize("tp", [1, 2])
def test_answers_of_all_ranks_are_graded_once(tp: int, documents: Any, hub: Path, tmp_path: Path) -> None:
    ranks = run_ranks(2, _grade, tmp_path, hub, _windows(documents), tp, init_process_group=False)
    # Without tp the loader gives windows 0 and 2 to one rank, 1 and 3 to the other; of 9 questions they have 5 and 4.
    mine = [0, 1, 2, 6, 7], [3, 4, 5, 9]
    asked = list(range(9)) if tp == 2 else [*mine[0], *mine[1]]
    tokenizer = AutoTokenizer.from_pretrained(hub)
    said = [tokenizer.decode(greedy_ids(hub, prompt, LENGTH)).strip() for prompt, _ in documents]
    expected = [tokenizer.decode(answer).strip() for _, answer in documents]
    right = [said[i] == expected[i] for i in asked]
    assert 0 < sum(right) < 9
    errors = CharErrorRate()(said, expected).item()
    for metrics, _ in ranks:
        assert metrics["val/exact_match"] == pytest.approx(sum(right) / 9)
        assert metrics["val/errors"] == pytest.approx(errors)
        assert metrics["val/twice"] == 2 * 12
    # In step: three rounds of two for 9 questions on two ranks, the last of which is short on one; then all 12, twice.
    rounds = [[2, 2, 1, *[2] * 6], [2, 2, 1, *[2] * 6]] if tp == 1 else [[2, 2, 2, 2, 1, *[2] * 12]] * 2
    assert [calls for _, calls in ranks] == rounds


def test_grades_come_at_every_nth_validation_and_not_in_the_sanity_check(documents: Any, hub: Path) -> None:
    class Counts(GradeAnswers):
        answered = 0

        def _answer(self, *arguments: Any) -> Any:
            self.answered += 1
            return super()._answer(*arguments)

    class Trains(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return next(self.model.parameters()).sum() * 0

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    tokenizer = AutoTokenizer.from_pretrained(hub)
    callback = Counts(samples=2, every_n_validations=2, max_new_tokens=2, tokenizer=tokenizer)
    trainer = Trainer(
        callbacks=[callback], max_epochs=4, limit_train_batches=1, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    windows = DataLoader(_windows(documents), batch_size=2)
    trainer.fit(Trains(hub), windows, windows)
    assert callback.answered == 2
    assert "val/exact_match" in trainer.callback_metrics


def test_what_cannot_be_graded_is_refused(hub: Path) -> None:
    with pytest.raises(ValueError, match="samples=0, batch_size=-1 must be at least 1"):
        GradeAnswers(samples=0, batch_size=-1)
    tokenizer = AutoTokenizer.from_pretrained(hub)
    with pytest.raises(TypeError, match=r"two lists of texts, for which BinaryAccuracy raises"):
        _validate(hub, GradeAnswers(BinaryAccuracy(), tokenizer=tokenizer))
    with pytest.raises(TypeError, match=r"`input_ids` and `labels` in validation batches, not Tensor"):
        _validate(hub, GradeAnswers(tokenizer=tokenizer))
    ids = torch.arange(8)
    with pytest.raises(ValueError, match="found no question"):
        _validate(hub, GradeAnswers(tokenizer=tokenizer), [{"input_ids": ids, "labels": ids}])
