"""Documents share windows whole, by best fit, and a packed window is to a model what its documents are one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_ep import transformers_adapter as adapter
from lightning_ep.context_parallel import find_documents
from lightning_ep.data.windows import COLUMNS, Fill, Sample, Window, best_fit, fill_window
from lightning_ep.loss import summed_loss
from lightning_ep.ops.cross_entropy import shifted
from tests.reference import VOCAB, grad_or_zero, relative_error, tiny_model


def by_brute_force(lengths: list[int], size: int) -> list[list[int]]:
    """Best-fit decreasing as its definition says: look at every window for every document."""
    windows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        rooms = [(size - sum(lengths[other] for other in window), n) for n, window in enumerate(windows)]
        fitting = [(room, n) for room, n in rooms if room >= lengths[index]]
        if fitting:
            windows[min(fitting)[1]].append(index)
        else:
            windows.append([index])
    return windows


def optimum(lengths: list[int], size: int) -> int:
    """The fewest windows possible, by trying everything."""

    def place(rest: tuple[int, ...], rooms: tuple[int, ...], best: int) -> int:
        if not rest or len(rooms) >= best:
            return min(best, len(rooms))
        for n, room in enumerate(rooms):
            if room >= rest[0] and room not in rooms[:n]:
                best = place(rest[1:], (*rooms[:n], room - rest[0], *rooms[n + 1 :]), best)
        return place(rest[1:], (*rooms, size - rest[0]), best)

    return place(tuple(sorted(lengths, reverse=True)), (), len(lengths) + 1)


@pytest.mark.parametrize("seed", range(40))
def test_the_fullest_window_that_has_room_gets_the_longest_document(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 30))
    lengths = rng.integers(1, size + 1, int(rng.integers(0, 60))).tolist()
    found = list(best_fit(lengths, size))
    assert found == sorted(sorted(window) for window in by_brute_force(lengths, size))
    assert sorted(index for window in found for index in window) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in window) <= size for window in found)


@pytest.mark.parametrize("seed", range(20))
def test_windows_are_nearly_as_few_as_possible(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 13, 9).tolist()
    assert optimum(lengths, 12) <= len(list(best_fit(lengths, 12))) <= 11 / 9 * optimum(lengths, 12) + 1


def test_documents_of_one_buffer_share_windows_with_each_other_only() -> None:
    lengths = np.random.default_rng(0).integers(1, 20, 50).tolist()
    found = list(best_fit(lengths, 20, buffer=16))
    expected = []
    for begin in range(0, 50, 16):
        for window in best_fit(lengths[begin : begin + 16], 20):
            expected.append([begin + index for index in window])
    assert found == expected
    assert {window[0] // 16 for window in found} == {0, 1, 2, 3}


def test_many_short_documents_fill_windows() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1, 20_000).astype(int).clip(1, 4096)
    windows = list(best_fit(lengths, 4096))
    assert windows == list(best_fit(lengths.tolist(), 4096))
    assert lengths.sum() / (4096 * len(windows)) > 0.999


@pytest.mark.parametrize(("lengths", "index", "tokens"), [([3, 9, 1], 1, 9), ([3, 1, 0], 2, 0)])
def test_documents_that_no_window_holds_are_named(lengths: list[int], index: int, tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"Document {index} has {tokens} tokens.*1 to 8"):
        list(best_fit(lengths, 8))


def document(seed: int, length: int) -> Sample:
    rng = np.random.default_rng(seed)
    return Sample(rng.integers(0, VOCAB, length).tolist(), (rng.random(length) < 0.7).tolist())


def test_a_window_is_its_documents_and_padding() -> None:
    first, second = Sample([5, 6, 7], [True, False, True]), Sample([8, 9], [True, True])
    window = fill_window([first, second], 7, pad_token_id=9)
    assert window.input_ids.tolist() == [5, 6, 7, 8, 9, 9, 9]
    # what a first token is predicted from would be the document before
    assert window.labels.tolist() == [-100, -100, 7, -100, 9, -100, -100]
    assert window.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert {values.dtype for values in window} == {np.dtype(np.int32)}
    fill = Fill(7)
    fill.add(window, documents=2, tokens=5)
    assert (fill.windows, fill.documents, fill.tokens, fill.supervised) == (1, 2, 5, 2)
    assert (fill.fill_rate, fill.supervised_share) == (5 / 7, 2 / 5)


def test_padding_attends_to_little() -> None:
    positions = torch.from_numpy(fill_window([document(0, 50)], 4096, 0).position_ids)[None]
    runs = find_documents(positions, None)
    assert runs.bounds is not None
    lengths = runs.bounds.diff().tolist()
    assert lengths[0] == 50
    assert sum(lengths) == 4096
    # linear in the padding, not quadratic, and few runs, of which each is work for a kernel
    assert sum(n * n for n in lengths[1:]) <= 128 * 4096
    assert len(lengths) < 40


def batch(windows: list[Window]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.stack([getattr(w, name) for w in windows])).long() for name in COLUMNS}


LENGTHS = {"padded": [9, 1, 14, 5], "full": [9, 1, 14, 8], "one": [32], "one, padded": [20], "long padding": [3]}


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
def test_a_packed_window_trains_like_its_documents_one_by_one(lengths: list[int], ours: bool) -> None:
    documents = [document(seed, length) for seed, length in enumerate(lengths)]
    documents[-1].supervised[-1] = True  # type: ignore[index]
    separate = tiny_model().double()  # fp32 alone gives errors of 1e-6
    loss, tokens = torch.zeros((), dtype=torch.float64), 0
    for ids, supervised in documents:
        if len(ids) < 2:
            continue  # nothing to predict
        targets = torch.tensor(ids)[1:].masked_fill(~torch.tensor(supervised)[1:], -100)
        logits = separate(input_ids=torch.tensor([ids])).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        tokens += int((targets != -100).sum())
    (loss / tokens).backward()

    packed = tiny_model().double()
    inputs = batch([fill_window(documents, 32, pad_token_id=3)])
    labels = inputs.pop("labels")
    assert int((labels[:, 1:] != -100).sum()) == tokens
    if ours:
        adapter.keep_documents_apart(packed)
        total, _ = summed_loss(packed, shifted(labels), inputs)
        found = total / tokens
    else:  # as in a plain loop with transformers
        found = packed(**inputs, labels=labels, use_cache=False, num_items_in_batch=tokens).loss
    found.backward()

    assert relative_error(found.detach(), (loss / tokens).detach()) < 1e-6
    for (name, param), (_, expected) in zip(packed.named_parameters(), separate.named_parameters(), strict=True):
        assert relative_error(grad_or_zero(param), grad_or_zero(expected)) < 1e-6, name
