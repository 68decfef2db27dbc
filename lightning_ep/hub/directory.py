"""The directory around exported weights: config, index, tokenizer, README; complete or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedModel

from lightning_ep.distributed.agreement import from_all_ranks
from lightning_ep.hub.companions import companions, has_chat_template, read_files, write_files_to
from lightning_ep.hub.durable import sync
from lightning_ep.hub.problems import Problems
from lightning_ep.hub.safetensors_file import INDEX_NAME, SINGLE_NAME
from lightning_ep.hub.writer import OutputFile

ExportDtype = Literal["float32", "bfloat16", "float16"]


class HubDirectory:
    """An export in the making: written beside its place, moved there when it is complete.

    Args:
        path: Where it will be.
        into_existing: If there is a directory already its weights are replaced and other files too, as
            `save_pretrained` of transformers does.

    Raises:
        FileExistsError: If something is there already.
    """

    def __init__(self, path: Path, into_existing: bool = False) -> None:
        self.path = path
        self.temporary = self.temporary_of(path)
        if not (into_existing and path.is_dir()):
            refuse_existing(path)

    @staticmethod
    def temporary_of(path: Path) -> Path:
        """Where an export to ``path`` is while it is incomplete."""
        return path.with_name(f"{path.name}.incomplete")

    def create(self) -> None:
        """Makes the temporary directory, empty."""
        if self.temporary.exists():
            shutil.rmtree(self.temporary)
        self.temporary.mkdir(parents=True)

    def write_config(
        self, model: PreTrainedModel, dtype: torch.dtype, tokenizer: Any | None, files_from: Path | None
    ) -> None:
        """Writes all that is not weights.

        Args:
            model: The model on meta.
            dtype: What its parameters are in the files.
            tokenizer: Anything with ``save_pretrained``.
            files_from: A directory with code to copy, and a tokenizer if there is no ``tokenizer``.
        """
        config = deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.dtype = dtype
        config.save_pretrained(self.temporary)
        if files_from is not None:
            write_files_to(self.temporary, read_files(files_from, ("*.py",)))
        chats = self.write_companions(model, tokenizer, files_from)
        if not (self.path / "README.md").exists():
            card = _model_card(self.path.name, type(model).__name__, dtype, model.can_generate(), chats)
            (self.temporary / "README.md").write_text(card)

    def write_companions(self, model: PreTrainedModel, tokenizer: Any | None, files_from: Path | None) -> bool:
        """Writes what goes with a model beside config and weights (`companions`); whether it can write chats."""
        files = companions(model, tokenizer, files_from)
        write_files_to(self.temporary, files)
        return has_chat_template(files)

    def finish(self, files: Sequence[OutputFile], problems: Problems) -> None:
        """Writes the index, checks that every rank's files are there, and moves the directory to its place."""
        size = 0
        for file in files:
            expected = sum(spec.nbytes for spec in file.specs)
            path = self.temporary / file.name
            found = path.stat().st_size if path.exists() else 0
            if found <= expected:
                problems.add(
                    "incomplete files",
                    f"{file.name} of rank {file.rank}: {found:,} bytes, {expected:,} and a header expected. Is "
                    f"{self.path.parent} on a filesystem that all nodes share?",
                )
            size += expected
        if problems.found:
            return
        if files[0].name != SINGLE_NAME:
            weight_map = {spec.key: file.name for file in files for spec in file.specs}
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            (self.temporary / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        self.publish()

    def publish(self) -> None:
        """Moves the directory, which is complete, to its place."""
        for path in (*self.temporary.rglob("*"), self.temporary):
            sync(path)
        if self.path.exists() and any(self.path.iterdir()):
            self._replace()
        else:
            if self.path.exists():
                self.path.rmdir()
            self.temporary.rename(self.path)
        sync(self.path.parent)

    def _replace(self) -> None:
        for old in (*self.path.glob("model*.safetensors"), self.path / INDEX_NAME):
            old.unlink(missing_ok=True)
        for new in self.temporary.iterdir():
            if new.is_dir():
                shutil.rmtree(self.path / new.name, ignore_errors=True)
            new.replace(self.path / new.name)
        self.temporary.rmdir()


def refuse_existing(path: Path) -> None:
    """Raises FileExistsError unless ``path`` is free or an empty directory."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists already and is not replaced; export to another `path`, or remove it.")


def check_same_path(path: Path, problems: Problems) -> None:
    """Raises CheckpointError on every rank if ranks would write to different directories. Every rank must call it."""
    if len(set(from_all_ranks(str(path.absolute())))) > 1:
        problems.add("path", f"ranks name different directories, as {path}: all write to one.")
    problems.raise_on_all_ranks()


def check_place(path: Path, needed: int, mine: bool, problems: Problems) -> None:
    """Raises CheckpointError on every rank if a temporary directory is not everyone's, or too small; removes it.

    Args:
        path: What was to be written.
        needed: Bytes of its weights.
        mine: Whether this rank has made the directory.
        problems: Where that is noted.
    """
    temporary = HubDirectory.temporary_of(path)
    if not temporary.is_dir():
        problems.add(
            "other nodes", f"{path.parent} is not on a filesystem that all nodes share: put the export on one."
        )
    problems.raise_on_all_ranks()
    if mine:
        free = shutil.disk_usage(temporary).free
        if needed > free:
            problems.add("space", f"the weights take {needed:,} bytes, and {free:,} are free there.")
        shutil.rmtree(temporary)
    problems.raise_on_all_ranks()


def _model_card(name: str, model_class: str, dtype: torch.dtype, generates: bool, chats: bool) -> str:
    """The README of an export: what the hub reads of it, how to run the model, and how to upload it."""
    known = hasattr(transformers, model_class)
    loader = model_class if known else "AutoModelForCausalLM" if generates else "AutoModel"
    code = "" if known else ", trust_remote_code=True"
    task = "pipeline_tag: text-generation\n" if generates else ""
    talk = "lightning-ep generate . --chat" if chats else 'lightning-ep generate . --prompt "Once upon a time"'
    run = f"""
Serve it with vLLM, inside this directory; on several GPUs add `--tensor-parallel-size N --enable-expert-parallel`:

```bash
vllm serve . --served-model-name {name}
```

Or with transformers, with what `pip install "transformers[serving]"` adds; its clients name the model by the path
that it was started with:

```bash
transformers serve . --device cpu
```

Try it in a terminal:

```bash
{talk}
```
"""
    return f"""---
library_name: transformers
{task}tags:
- lightning_ep
---

# {name}

A `{model_class}` with weights in {str(dtype).removeprefix("torch.")}, exported by lightning_ep.
{run if generates else ""}
Load it with transformers:

```python
from transformers import {loader}

model = {loader}.from_pretrained("."{code})
```

Upload it to the Hugging Face hub (after `hf auth login`):

```bash
hf upload YOUR_NAME/{name} .
```
"""
