"""The command ``lightning-ep routing``: which experts a trained model sends a text to, and what they specialise in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_ep.cli.chats import ChatOptions, opened_for_chats
from lightning_ep.cli.generation import model_length
from lightning_ep.cli.opened import Opened
from lightning_ep.cli.perplexity import batches_of, read_documents
from lightning_ep.data.conversations import conversation
from lightning_ep.data.row_files import Row, open_source
from lightning_ep.loss import summed_loss
from lightning_ep.ops.cross_entropy import IGNORE
from lightning_ep.routing import pictures
from lightning_ep.routing.history import findings
from lightning_ep.routing.load_table import write_loads
from lightning_ep.routing.metrics import Measures
from lightning_ep.routing.watched import Watched
from lightning_ep.routing.words import short_names

_NAMED = 5  # experts of each kind
_RARE = 0.25  # of an even share: experts that get less of a source are not said to be for it


def routing(
    checkpoint: str,
    files: list[str],
    sequence_length: int | None = None,
    output: str = "routing",
    **opening: Any,
) -> None:
    """Prints how a model spreads the tokens of texts or chats over its experts, and draws it.

    Several files are compared: which experts are for what. The command says what ExpertLoadMonitor logs in training:
    balance, entropy, experts without a token, and how unequal the ranks' work would be at some sizes of ep. Under
    torchrun the model is sharded over all processes: torchrun --nproc-per-node 8 -m lightning_ep routing ...

    Args:
        checkpoint: A training checkpoint, a directory in the hub's layout (an export), or the id of a model on the hub.
        files: One or more: a text file, which is one document, or JSON lines (.jsonl) with a document each under
            "text" or a chat under "messages". Each is a source.
        sequence_length: Tokens of a window. Default: the positions that the model was made for.
        output: Folder for the pictures.
        **opening: Options of `opened_for_chats`.

    Raises:
        ValueError: If a file is not as described, the model has no experts, or chats have no template.
        CheckpointError: If there is no such checkpoint, it is damaged, or it has no tokenizer.
    """
    if sequence_length is not None and sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length} must be at least 1.")
    paths = [Path(file) for file in files]
    rows = {name: _rows(path) for name, path in zip(_names(paths), paths, strict=True)}
    with opened_for_chats(checkpoint, **opening) as (found, chats):
        length = sequence_length or model_length(found.model.config)
        if math.isinf(length):
            raise ValueError("the model's configuration does not say how long its sequences are: --sequence_length.")
        watched = Watched(found.model, found.layout, found.rank, training=False)
        sums = {
            name: _sums(found, watched, name, list(_ids(found, chats, of)), int(length)) for name, of in rows.items()
        }
        if found.rank == 0:
            sources = {name: watched.metric.measures(sums_MC) for name, sums_MC in sums.items()}
            every = watched.metric.measures(torch.stack(list(sums.values())).sum(0))
            names = short_names(watched.layers)
            print("\n".join(_lines(every, sources, names)))
            print(_draw(Path(output), every, sources, watched.layers))


def _names(paths: Sequence[Path]) -> list[str]:
    """What sources are called: their files' names, or whole paths where these are the same."""
    names = [path.name for path in paths]
    found = names if len(set(names)) == len(names) else [str(path) for path in paths]
    if len(set(found)) < len(found):
        raise ValueError(f"a file is named twice: {', '.join(found)}.")
    return found


def _rows(path: Path) -> list[str | Row]:
    """Texts, and rows that hold a chat."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    if path.suffix in (".jsonl", ".ndjson"):
        source = open_source(str(path))
        rows = source.read(range(source.count))
        if any("text" not in row.columns() for row in rows):
            return list(rows)
    return list(read_documents(path))


def _ids(found: Opened, chats: ChatOptions, rows: Sequence[str | Row]) -> Iterator[list[int]]:
    for row in rows:
        if isinstance(row, str):
            yield found.tokenizer(row, verbose=False)["input_ids"]
            continue
        chat = conversation(row.columns(), row.where)
        yield chats.ids(found.tokenizer, chat.messages, chat.tools)


@torch.no_grad()
def _sums(found: Opened, watched: Watched, name: str, documents: Sequence[Sequence[int]], length: int) -> Tensor:
    """The sums of a source over all ranks, on the CPU; every rank must call it."""
    windows = [ids[begin : begin + length] for ids in documents for begin in range(0, len(ids), length)]
    batches = batches_of(windows, length)
    if not batches:
        raise ValueError(f"{name} has no tokens.")
    ranks = found.layout.data_world_size
    mine = batches[found.layout.data_rank(found.rank) :: ranks]
    for step in tqdm(range(math.ceil(len(batches) / ranks)), name, leave=False, disable=found.rank != 0):
        # A rank without a batch of its own takes part for its experts, with one that nobody looks at.
        watched.active = step < len(mine)
        batch = mine[step] if watched.active else batches[-1]
        ids_BS = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
        mask_BS = torch.zeros_like(ids_BS)
        for row, window in enumerate(batch):
            ids_BS[row, : len(window)] = torch.tensor(window)
            mask_BS[row, : len(window)] = 1
        inputs = {"input_ids": ids_BS.to(found.device), "attention_mask": mask_BS.to(found.device)}
        summed_loss(found.model, torch.full_like(inputs["input_ids"], IGNORE), inputs)  # without making logits
    watched.active = True
    return watched.take().wait()


# ------------------------------------------------------------------------------------------------------- what is said


def _lines(every: Measures, sources: dict[str, Measures], names: Sequence[str]) -> Iterator[str]:
    columns = {"all": every, **sources} if len(sources) > 1 else sources
    width = max(12, *(len(name) + 2 for name in columns))
    head = "".join(f"{name:>{width}}" for name in columns)
    yield f"{'':<44}{head}"
    for title, values in _table(columns).items():
        yield f"{title:<44}{''.join(f'{value:>{width}}' for value in values)}"
    for finding in findings(every):
        yield f"{finding.sentence(names[finding.layer])}."
    yield f"most popular: {'; '.join(_extreme(every, names, descending=True))}"
    yield f"least popular: {'; '.join(_extreme(every, names, descending=False))}"
    if len(sources) > 1:
        for name in sources:
            yield f"for {name}: {'; '.join(_special(name, sources, names)) or 'no expert more than for the others'}"
        yield _where_they_differ(sources, names)


def _table(columns: dict[str, Measures]) -> dict[str, list[str]]:
    """The rows of the table by their titles."""
    rows: dict[str, list[str]] = {"tokens": [f"{int(each.tokens_M.max()):,}" for each in columns.values()]}
    means = [each.means() for each in columns.values()]
    rows["max violation, mean of the layers"] = [f"{of['max_violation']:.3f}" for of in means]
    rows["max violation, worst layer"] = [f"{of['max_violation_worst_layer']:.3f}" for of in means]
    rows["coefficient of variation"] = [f"{of['load_variation']:.3f}" for of in means]
    rows["router entropy, share of ln E"] = [f"{of['entropy']:.3f}" for of in means]
    rows["experts without a token"] = [f"{int(of['dead_experts'])}" for of in means]
    experts = next(iter(columns.values())).load_ME.shape[1]
    for ep in (2, 4, 8, 16, 32, 64):
        if experts % ep == 0 and ep < experts:
            rows[f"straggler factor at ep={ep}"] = [f"{straggler(each.load_ME, ep):.2f}" for each in columns.values()]
    return rows


def straggler(load_ME: Tensor, ep: int) -> float:
    """Pairs of the busiest of so many ranks over the mean, if all tokens were of one EP group; mean of the layers."""
    ranks_MD = load_ME.nan_to_num(nan=0.0).view(load_ME.shape[0], ep, -1).sum(2)
    return (ranks_MD.amax(1) / ranks_MD.mean(1)).nanmean().item()


def _extreme(every: Measures, names: Sequence[str], descending: bool) -> Iterator[str]:
    loads = every.load_ME.nan_to_num(nan=0.0 if descending else math.inf)
    for place in loads.flatten().argsort(descending=descending, stable=True)[:_NAMED].tolist():
        layer, expert = divmod(place, loads.shape[1])
        if (load := loads[layer, expert].item()) < math.inf:
            yield f"layer {names[layer]} expert {expert}, {load:{'.1f' if load >= 1 else '.2g'}} times the mean"


def _special(name: str, sources: dict[str, Measures], names: Sequence[str]) -> Iterator[str]:
    """Experts that get more of this source's tokens than of the others', the most telling first."""
    own_ME = sources[name].load_ME.nan_to_num(nan=0.0)
    ratio_ME = lift(name, sources)
    telling_ME = (own_ME * ratio_ME.clamp(max=1e6).log()).masked_fill(own_ME < _RARE, 0.0).nan_to_num(nan=0.0)
    for place in telling_ME.flatten().argsort(descending=True, stable=True)[:_NAMED].tolist():
        layer, expert = divmod(place, own_ME.shape[1])
        if ratio_ME[layer, expert] > 1.5:
            times = ratio_ME[layer, expert].item()
            often = f"{times:.1f} times as often as in the others" if math.isfinite(times) else "in no other"
            yield f"layer {names[layer]} expert {expert} ({own_ME[layer, expert]:.1f} times the mean, {often})"


def lift(name: str, sources: dict[str, Measures]) -> Tensor:
    """How much more often a token of a source goes to each expert than one of the others, ``[M, E]``."""
    others_ME = torch.stack([each.load_ME for other, each in sources.items() if other != name]).mean(0)
    return sources[name].load_ME / others_ME


def _where_they_differ(sources: dict[str, Measures], names: Sequence[str]) -> str:
    """Layers by the largest distance in total variation between the choices of two sources."""
    shares_NME = torch.stack([each.load_ME.nan_to_num(nan=0.0) for each in sources.values()])
    shares_NME = shares_NME / shares_NME.sum(-1, keepdim=True)
    apart_M = (shares_NME[:, None] - shares_NME[None]).abs().sum(-1).div(2).amax((0, 1))
    layers = apart_M.argsort(descending=True, stable=True)[:_NAMED].tolist()
    said = ", ".join(f"layer {names[layer]} ({apart_M[layer]:.0%} of the choices)" for layer in layers)
    return f"sources are told apart most in {said}"


def _draw(folder: Path, every: Measures, sources: dict[str, Measures], layers: Sequence[str]) -> str:
    loads = {"load": every.load_ME, **{name: each.load_ME for name, each in sources.items() if len(sources) > 1}}
    table = write_loads(folder / "expert_load.csv", loads, layers)
    if not pictures.available():
        return f"every expert: {table}; no pictures: matplotlib is not installed. `pip install matplotlib` brings it."
    figure, _ = pictures.heat_map(every.load_ME, layers)
    paths = [pictures.save(figure, folder / "expert_load.png")]
    if len(sources) > 1:
        figure = pictures.specialisation({name: lift(name, sources) for name in sources}, layers)
        paths.append(pictures.save(figure, folder / "specialisation.png"))
    return f"every expert: {table}; pictures: {', '.join(map(str, paths))}"
