"""The text datamodule, its resumable loader, and the bigram baseline."""

import math
import multiprocessing
import re
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_ep.checkpoint.loop_state import close_finished_epoch
from lightning_ep.data import (
    ResumableLoader,
    TextDataModule,
    corpus,
    data_ranks,
)
from lightning_ep.data.collate import FilledUp, without_positions
from lightning_ep.data.examples import bigram_cross_entropy


def samples(loader: ResumableLoader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


# --------------------------------------------------------------------------------------------------------- the loader


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_ranks_share_an_epoch_without_overlap(num_workers: int) -> None:
    data = torch.arange(29)
    ranks = [
        samples(ResumableLoader(data, 2, r, 3, shuffle=True, drop_last=True, num_workers=num_workers)) for r in range(3)
    ]
    assert [len(batches) for batches in ranks] == [4, 4, 4]
    seen = Counter(index for batches in ranks for batch in batches for index in batch)
    assert len(seen) == 24
    assert set(seen.values()) == {1}


def test_every_epoch_has_its_own_order_and_every_seed_too() -> None:
    loader = ResumableLoader(torch.arange(64), 8, shuffle=True, seed=1)
    first = samples(loader)
    assert samples(loader) == first
    loader.set_epoch(1)
    second = samples(loader)
    assert second != first
    assert sorted(chain(*second)) == list(range(64))
    assert samples(ResumableLoader(torch.arange(64), 8, shuffle=True, seed=2)) != first


@pytest.mark.parametrize(
    ("size", "batch_size", "world"), [(17, 4, 2), (16, 4, 2), (3, 4, 3), (9, 2, 4), (5, 2, 4), (101, 3, 8)]
)
def test_validation_gives_each_sample_once_in_equally_many_batches(size: int, batch_size: int, world: int) -> None:
    ranks = [samples(ResumableLoader(torch.arange(size), batch_size, r, world)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(size))
    lengths = [len(batch) for batches in ranks for batch in batches]
    assert max(lengths) <= batch_size
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) > 0


def test_validation_with_one_sample_per_batch_leaves_out_the_rest() -> None:
    ranks = [samples(ResumableLoader(torch.arange(7), 1, r, 3)) for r in range(3)]
    assert ranks == [[[0], [3]], [[1], [4]], [[2], [5]]]


def test_loader_refuses_a_dataset_without_a_batch_for_every_rank() -> None:
    with pytest.raises(ValueError, match=r"7 samples.*4 data ranks with batch_size=2 need at least 8"):
        ResumableLoader(torch.arange(7), 2, 0, 4, drop_last=True)


def test_resumes_on_another_number_of_data_ranks() -> None:
    saved = ResumableLoader(torch.arange(48), 4, 0, 2, shuffle=True, drop_last=True)
    taken = iter(saved)
    for _ in range(3):
        next(taken)
    rest = samples(ResumableLoader(torch.arange(48), 8, 0, 1, shuffle=True, drop_last=True))[3:]
    for world, batch_size in ((1, 8), (4, 2), (1, 4)):
        ranks = []
        for rank in range(world):
            loader = ResumableLoader(torch.arange(48), batch_size, rank, world, shuffle=True, drop_last=True)
            loader.load_state_dict(saved.state_dict())
            ranks.append(samples(loader))
        merged = chain(*(chain(*step) for step in zip(*ranks, strict=True)))
        assert list(merged) == list(chain(*rest))


@pytest.mark.parametrize(("size", "batch_size", "world"), [(18, 2, 4), (20, 4, 2), (37, 4, 2), (101, 3, 8), (29, 5, 1)])
def test_with_uneven_batches_resumes_without_losing_or_repeating_a_sample(
    size: int, batch_size: int, world: int
) -> None:
    def loaders(batch_size: int, world: int) -> list[ResumableLoader]:
        return [ResumableLoader(torch.arange(size), batch_size, rank, world, shuffle=True) for rank in range(world)]

    whole = [samples(loader) for loader in loaders(batch_size, world)]
    for stop in range(1, len(whole[0])):
        stopped = loaders(batch_size, world)
        for loader in stopped:
            taken = iter(loader)
            for _ in range(stop):
                next(taken)
        handed_out = [index for batches in whole for batch in batches[:stop] for index in batch]
        for here, size_here in ((world, batch_size), (1, batch_size), (2, 2 * batch_size)):
            resumed = loaders(size_here, here)
            for loader in resumed:
                loader.load_state_dict(stopped[0].state_dict())
            rest = [samples(loader) for loader in resumed]
            if (here, size_here) == (world, batch_size):
                assert rest == [batches[stop:] for batches in whole]
            assert sorted(handed_out + [i for batches in rest for batch in batches for i in batch]) == list(range(size))
            assert len({len(batches) for batches in rest}) == 1
            assert resumed[0].state_dict()["samples"] == size


def test_refuses_a_position_that_it_cannot_find() -> None:
    saved = ResumableLoader(torch.arange(48), 4, shuffle=True)
    next(iter(saved))
    with pytest.raises(ValueError, match=r"'dataset_size': 48.*'dataset_size': 50"):
        ResumableLoader(torch.arange(50), 4, shuffle=True).load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match=r"stops after 4 samples.*batch_size=3"):
        ResumableLoader(torch.arange(48), 3, shuffle=True, drop_last=True).load_state_dict(saved.state_dict())
    nearly = ResumableLoader(torch.arange(9), 2, shuffle=True)
    taken = iter(nearly)
    for _ in range(4):
        next(taken)
    with pytest.raises(ValueError, match=r"leaves 1 samples.*4 data ranks"):
        ResumableLoader(torch.arange(9), 2, 0, 4, shuffle=True).load_state_dict(nearly.state_dict())


def test_loader_leaves_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    samples(ResumableLoader(torch.arange(8), 2, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_data_ranks_come_from_the_strategy_if_it_has_them() -> None:
    assert data_ranks(None) == (0, 1)
    assert data_ranks(SimpleNamespace(strategy=SimpleNamespace(), global_rank=3, world_size=4)) == (3, 4)
    strategy = SimpleNamespace(data_rank=1, data_world_size=2)
    assert data_ranks(SimpleNamespace(strategy=strategy, global_rank=3, world_size=4)) == (1, 2)


# ------------------------------------------------------------------------------------------ resuming under a Trainer


class Recorder(LightningModule):
    """Records the samples of every training step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch.tolist())
        return self.layer(batch[:, None].float()).sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.layer(batch[:, None].float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


class Numbers(LightningDataModule):
    def __init__(self, num_workers: int = 0) -> None:
        super().__init__()
        self.num_workers = num_workers

    def train_dataloader(self) -> ResumableLoader:
        close_finished_epoch(self.trainer)
        return ResumableLoader(torch.arange(15), 2, shuffle=True, drop_last=True, num_workers=self.num_workers)

    def val_dataloader(self) -> ResumableLoader:
        return ResumableLoader(torch.arange(4), 2)


class SaveIn(Callback):
    """Saves once in the given hook at the given step."""

    def __init__(self, hook: str, step: int, path: Path) -> None:
        self.step = step
        self.path = path
        setattr(self, hook, self.save)

    def save(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


EPOCH = 7  # batches
UNTIL = {
    "epochs": {"max_epochs": 3},
    "steps": {"max_steps": 3 * EPOCH},
    "both": {"max_epochs": 3, "max_steps": 2 * EPOCH + 5},
    "limited": {"max_steps": 13, "limit_train_batches": 5},
}
VALIDATE = {"at epoch end": {}, "in mid-epoch": {"val_check_interval": 3}, "never": {"limit_val_batches": 0}}


def run(
    settings: dict, save: SaveIn | None = None, resume: Path | None = None, num_workers: int = 0
) -> tuple[list[list[int]], int, int]:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        callbacks=[save] if save else [],
        **settings,
    )
    trainer.fit(module, datamodule=Numbers(num_workers), ckpt_path=resume)
    return module.seen, trainer.global_step, trainer.current_epoch


@pytest.mark.parametrize("validate", VALIDATE)
@pytest.mark.parametrize("until", UNTIL)
def test_resume_sees_what_the_uninterrupted_run_sees(until: str, validate: str, tmp_path: Path) -> None:
    settings = UNTIL[until] | VALIDATE[validate]
    epoch = settings.get("limit_train_batches", EPOCH)
    seen, steps, epochs = run(settings)
    points = [
        ("on_train_batch_end", 2),
        ("on_train_batch_end", epoch),
        ("on_train_batch_end", epoch + 1),
        ("on_train_epoch_end", epoch),
        ("on_train_epoch_end", 2 * epoch),
        ("on_validation_end", 3),
        ("on_validation_end", epoch),
    ]
    tried = 0
    for number, (hook, step) in enumerate(points):
        first = tmp_path / f"{number}.ckpt"
        run(settings, SaveIn(hook, step, first))
        if not first.exists():
            continue  # no validation there
        tried += 1
        assert run(settings, resume=first) == (seen[step:], steps, epochs), (hook, step)
        # and once more: the first resume must leave counters from which a second one works
        again, second = step + 2, tmp_path / f"{number}-again.ckpt"
        run(settings, SaveIn("on_train_batch_end", again, second), resume=first)
        if second.exists():
            assert run(settings, resume=second) == (seen[again:], steps, epochs), (hook, step, again)
    assert tried >= 5


@pytest.mark.parametrize("step", [3, EPOCH, EPOCH + 4])
def test_resume_counts_what_was_handed_out_not_what_workers_prefetched(step: int, tmp_path: Path) -> None:
    settings = {"max_epochs": 2, "limit_val_batches": 0}
    seen, steps, epochs = run(settings)
    path = tmp_path / "mid.ckpt"
    assert run(settings, SaveIn("on_train_batch_end", step, path), num_workers=2)[0] == seen
    assert run(settings, resume=path, num_workers=2) == (seen[step:], steps, epochs)


# -------------------------------------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "für", "数"]
    for number in range(12):
        (root / f"{number:02}.txt").write_text(f"file {number}: " + " ".join(rng.choice(words, 300)), encoding="utf-8")
    return root


def text_module(texts: Path, cache: Path, **settings: object) -> TextDataModule:
    defaults = {"sequence_length": 32, "batch_size": 4, "vocab_size": 300, "validation_fraction": 0.2}
    return TextDataModule(str(texts), cache_dir=str(cache), **(defaults | settings))  # type: ignore[arg-type]


def prepared(*args: Path, **settings: object) -> TextDataModule:
    data = text_module(*args, **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def test_windows_are_the_texts(texts: Path, tmp_path: Path) -> None:
    data = prepared(texts, tmp_path)
    end = data.tokenizer.eos_token_id
    pieces = {}  # of each text, cut into windows from its beginning
    for path in sorted(texts.iterdir()):
        ids = [*data.tokenizer(path.read_text(encoding="utf-8"))["input_ids"], end]
        pieces[path] = [tuple(ids[begin : begin + 32]) for begin in range(0, len(ids), 32)]
        assert len(pieces[path]) > 2
    files = []
    for part in (data.train_dataset, data.val_dataset):
        found = Counter(documents(part, end))
        files.append({path for path in pieces if pieces[path][0] in found})
        assert found == Counter(piece for path in files[-1] for piece in pieces[path] if len(piece) > 1)
    assert files[0] | files[1] == set(pieces)
    assert len(files[0]) > len(files[1]) > 0


def documents(part: object, end: int) -> list[tuple[int, ...]]:
    """The runs of tokens in windows that see each other, without padding; all but the first are to be predicted."""
    found = []
    for window in part:  # type: ignore[attr-defined]
        ids, labels, positions = (window[name].tolist() for name in ("input_ids", "labels", "position_ids"))
        begins = [*(index for index, position in enumerate(positions) if position == 0), len(ids)]
        for begin, stop in pairwise(begins):
            if set(ids[begin:stop]) != {end}:
                found.append(tuple(ids[begin:stop]))
                assert labels[begin:stop] == [-100, *ids[begin + 1 : stop]]
            else:
                assert set(labels[begin:stop]) == {-100}
    return found


def test_long_texts_fill_windows(texts: Path, tmp_path: Path) -> None:
    data = prepared(texts, tmp_path)
    assert data.counts["train"]["fill_rate"] > 0.98
    assert data.counts["train"]["notes"]["long texts were cut"] == data.counts["train"]["sources"][str(texts)]["rows"]


def test_texts_may_see_those_before_them(texts: Path, tmp_path: Path) -> None:
    loaders = [prepared(texts, tmp_path, across_documents=x).train_dataloader() for x in (False, True)]
    padding = 0
    for apart, across in zip(*loaders, strict=True):
        mask = across.pop("attention_mask")
        assert across.keys() == {"input_ids", "labels"}
        assert all(torch.equal(values, apart[name]) for name, values in across.items())
        for labels, counts in zip(across["labels"], mask, strict=True):
            filled = int((labels != -100).nonzero().max()) + 1  # every token behind a document's first is predicted
            assert counts.tolist() == [1] * filled + [0] * (len(labels) - filled)
            padding += len(labels) - filled
    assert padding > 0


def test_a_batch_of_nothing_but_padding_has_a_mask_that_divides_nothing_by_zero() -> None:
    window = FilledUp([], 1, 8, pad_token_id=5)[0]  # type: ignore[arg-type]
    assert without_positions([window, window])["attention_mask"].tolist() == [[1] * 8] * 2
    full = {**window, "input_ids": torch.arange(8), "position_ids": torch.arange(8)}
    assert without_positions([full, window])["attention_mask"].tolist() == [[1] * 8, [0] * 8]


def test_batches_are_what_a_causal_language_model_takes(texts: Path, tmp_path: Path) -> None:
    data = prepared(texts, tmp_path)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert batch.keys() == {"input_ids", "labels", "position_ids"}
        assert {values.dtype for values in batch.values()} == {torch.int64}
        assert batch["input_ids"].shape[1] == 32
        assert batch["input_ids"].shape[0] in (3, 4)
        predicted = batch["labels"] != -100
        assert predicted.any()
        assert torch.equal(batch["input_ids"][predicted], batch["labels"][predicted])


def test_tokenizer_restores_any_text(texts: Path, tmp_path: Path) -> None:
    tokenizer = prepared(texts, tmp_path).tokenizer
    for text in ("alpha  beta\n\tnever seen: ñ 🙂", "x" * 50):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer) <= 300


def test_cache_is_used_again_and_follows_contents_and_arguments(texts: Path, tmp_path: Path, monkeypatch) -> None:
    prepared(texts, tmp_path / "cache")
    entries = set((tmp_path / "cache").iterdir())
    assert len(entries) == 1
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "train_tokenizer", None)  # a second run must not train again
        prepared(texts, tmp_path / "cache")
    prepared(texts, tmp_path / "cache", sequence_length=16)
    assert len(set((tmp_path / "cache").iterdir())) == 2
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in texts.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    before = prepared(copy, tmp_path / "cache")
    (copy / "00.txt").write_text("something else")
    after = prepared(copy, tmp_path / "cache")
    assert before.tokenizer.get_vocab() != after.tokenizer.get_vocab()


def test_default_cache_is_taken_from_the_environment(texts: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LIGHTNING_EP_CACHE", str(tmp_path / "here"))
    data = TextDataModule(str(texts), sequence_length=32, vocab_size=300)
    data.prepare_data()
    assert [path.name.split("-")[0] for path in (tmp_path / "here").iterdir()] == ["text"]


def _fill(target: Path, barrier: "multiprocessing.synchronize.Barrier") -> None:
    def build(directory: Path) -> None:
        (directory / "one").write_text("1")
        barrier.wait(20)  # both have begun, neither has finished
        (directory / "two").write_text("2")

    corpus.build_once(target, build)


def test_racing_processes_leave_one_whole_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    racers = [context.Process(target=_fill, args=(tmp_path / "cache", barrier)) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(30)
        assert racer.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["one", "two"]


def test_failed_preparation_leaves_nothing_behind(tmp_path: Path) -> None:
    def build(directory: Path) -> None:
        (directory / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        corpus.build_once(tmp_path / "cache", build)
    assert list(tmp_path.iterdir()) == []


def test_split_is_by_file_deterministic_and_near_the_fraction(tmp_path: Path) -> None:
    files = []
    for number in range(100):
        files.append(tmp_path / f"{number:03}")
        files[-1].write_bytes(b"x" * (50 + number))
    train, val = corpus.split_files(files, 0.1, seed=0)
    assert sorted(train + val) == files
    assert corpus.split_files(files, 0.1, seed=0) == (train, val)
    assert corpus.split_files(files, 0.1, seed=1)[1] != val
    share = sum(path.stat().st_size for path in val) / sum(path.stat().st_size for path in files)
    assert 0.1 <= share < 0.13


def test_standard_library_source_has_code_but_no_tests() -> None:
    files = corpus.find_files("stdlib")
    assert files == sorted(files)
    names = {path.name for path in files}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not any({"test", "site-packages", "idlelib"} & set(path.parts) for path in files)
    assert len(files) > 300
    assert all(len(corpus.read_text(path)) >= 0 for path in files)


def test_source_may_be_a_directory_a_file_or_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", "deep/b.txt", "deep/c.md", ".hidden", ".git/config"):
        (tmp_path / name).write_text("x")

    def found(source: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in corpus.find_files(source)]

    assert found(str(tmp_path)) == ["a.txt", "deep/b.txt", "deep/c.md"]
    assert found(f"{tmp_path}/**/*.txt") == ["a.txt", "deep/b.txt"]
    assert found(f"{tmp_path}/a.txt") == ["a.txt"]


@pytest.mark.parametrize("source", ["nowhere", "empty", "empty/*.txt"])
def test_missing_source_is_named(source: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = re.escape(f"source='{tmp_path}/{source}' has no text files")
    with pytest.raises(FileNotFoundError, match=message + ".*'corpus/"):
        TextDataModule(f"{tmp_path}/{source}", cache_dir=str(tmp_path)).prepare_data()


def test_wrong_arguments_say_what_to_do(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size=200 must be at least 257"):
        text_module(texts, tmp_path, vocab_size=200).prepare_data()
    with pytest.raises(ValueError, match=r"validation_fraction=1\.5 must lie between 0 and 1"):
        text_module(texts, tmp_path, validation_fraction=1.5).prepare_data()
    with pytest.raises(ValueError, match=r"split by file"):
        text_module(texts / "00.txt", tmp_path).prepare_data()
    (tmp_path / "latin").mkdir()
    for name in ("a", "b"):
        (tmp_path / "latin" / name).write_bytes("für".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin/a is not UTF-8|latin/b is not UTF-8"):
        text_module(tmp_path / "latin", tmp_path).prepare_data()
    with pytest.raises(FileNotFoundError, match=r"prepare_data\(\) first"):
        text_module(texts, tmp_path / "elsewhere").setup("fit")


def test_too_little_text_is_refused_before_training(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 training windows of sequence_length=100000.*Use more data, shorter"):
        prepared(texts, tmp_path, sequence_length=100_000)
    with pytest.raises(
        ValueError, match=r"training windows of sequence_length=32, but 1 data ranks with batch_size=1000"
    ):
        prepared(texts, tmp_path, batch_size=1000)


def test_vocabulary_larger_than_the_models_is_refused(texts: Path, tmp_path: Path) -> None:
    class Small(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.model = SimpleNamespace(config=SimpleNamespace(vocab_size=100))

    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(ValueError, match=r"vocab_size=100 is smaller than the tokenizer's \d+ tokens"):
        trainer.fit(Small(), datamodule=text_module(texts, tmp_path))


def test_overfit_batches_repeats_the_same_windows(texts: Path, tmp_path: Path) -> None:
    class Seen(Recorder):
        def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
            self.seen.append(batch["input_ids"].flatten().tolist())
            return self.layer.weight.sum()

        def validation_step(self, batch: dict, batch_idx: int) -> None:
            pass

    module = Seen()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        overfit_batches=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=text_module(texts, tmp_path))
    assert len(module.seen) == 6
    assert module.seen[:3] == module.seen[3:]


# ------------------------------------------------------------------------------------------------------------ bigram


def slow_kneser_ney(train: list[list[int]], val: list[list[int]], vocab_size: int) -> float:
    """The same model from its formula, one prediction at a time."""
    pairs = Counter((v, w) for window in train for v, w in pairwise(window))
    once, twice = (sum(count == n for count in pairs.values()) for n in (1, 2))
    d = once / (once + 2 * twice)

    def low(w: int) -> float:
        endings = Counter(second for _, second in pairs)
        return (max(endings[w] - d, 0) + d * len(endings) / vocab_size) / len(pairs)

    def p(v: int, w: int) -> float:
        total = sum(count for (first, _), count in pairs.items() if first == v)
        distinct = sum(first == v for first, _ in pairs)
        return low(w) if not total else max(pairs[v, w] - d, 0) / total + d * distinct / total * low(w)

    for v in range(vocab_size):
        assert math.isclose(sum(p(v, w) for w in range(vocab_size)), 1)
    losses = [-math.log(p(v, w)) for window in val for v, w in pairwise(window)]
    return sum(losses) / len(losses)


def test_bigram_matches_its_formula_and_sums_to_one() -> None:
    rng = np.random.default_rng(0)
    train = rng.zipf(1.5, (12, 9)).clip(max=9) - 1  # ids up to 8 of 11: 9 and 10 are never seen
    val = np.concatenate([rng.integers(0, 11, (4, 9)), train[:2]])
    expected = slow_kneser_ney(train.tolist(), val.tolist(), 11)
    assert bigram_cross_entropy(train, val, 11) == pytest.approx(expected, rel=1e-12)


def test_bigram_counts_and_predicts_what_has_a_label() -> None:
    rng = np.random.default_rng(0)
    documents = [rng.zipf(1.5, (12, 4)).clip(max=9) - 1 for _ in range(2)]  # two of four tokens in each window
    windows = np.concatenate(documents, axis=1)
    labels = windows.copy()
    labels[:, [0, 4]] = -100
    apart = np.concatenate(documents)
    expected = bigram_cross_entropy(apart, apart[:5], 11)
    assert bigram_cross_entropy(windows, apart[:5], 11, labels) == pytest.approx(expected, rel=1e-12)
    both = bigram_cross_entropy(windows, windows[:5], 11, labels, labels[:5])
    assert both == pytest.approx(bigram_cross_entropy(apart, np.concatenate([d[:5] for d in documents]), 11), rel=1e-12)
    assert both != pytest.approx(bigram_cross_entropy(windows, windows[:5], 11), rel=1e-3)


def test_bigram_predicts_inside_windows_only() -> None:
    train = np.array([[0, 1, 2, 3]] * 50)
    inside = bigram_cross_entropy(train, np.array([[0, 1, 2, 3]]), 4)
    assert inside < 0.05
    # 3 -> 0 happens between the windows only, so it is as new as any other pair
    assert bigram_cross_entropy(train, np.array([[3, 0]]), 4) > 0.5
