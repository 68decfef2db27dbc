"""A LightningDataModule of conversations with images and sound."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig
from typing_extensions import override

from lightning_ep import transformers_adapter as adapter
from lightning_ep.data.chat import ChatDataModule
from lightning_ep.data.chat_template import ChatTemplate
from lightning_ep.data.collate import Collate
from lightning_ep.data.conversations import Conversation, conversation
from lightning_ep.data.media import MediaFile
from lightning_ep.data.media_texts import MediaTexts, RendersMedia
from lightning_ep.data.preparation import Rows
from lightning_ep.data.rendering import RendersConversations
from lightning_ep.data.row_files import Row, Source
from lightning_ep.data.row_media import RowMedia
from lightning_ep.data.tokenizers import checkpoint_of
from lightning_ep.data.vision_windows import VisionWindows, batch_of, rows_of
from lightning_ep.hub.companions import PROCESSOR_FILES, read_files, write_files_to
from lightning_ep.hub.meta_models import small_files

_ROWS_PER_TASK = 32  # each may be megabytes


class VisionChatDataModule(ChatDataModule):
    """Conversations with images and sound, through the model's processor; only what the assistant writes is learnt.

    Rows are those of `ChatDataModule`, in whose messages images and, for models that hear, clips of sound may be: as
    parts, or as ``<image>`` and ``<audio>`` in a text, for those of the row's columns ``images`` and ``audios``. Each
    is a path, a data URL, or bytes (``{"bytes": ...}``, as columns of `datasets` have them). Rows without may be among
    them (docs/start/images.md shows each form). Videos are refused.

    Preparing reads every image and clip, so that one that is missing or broken is refused with its file and line.
    Workers decode them again when a batch is made; the cache has their paths, and the bytes of what came as bytes.

    Batches are ``input_ids`` and ``labels``, int64 ``[batch_size, sequence_length]``, ``position_ids`` of the same
    shape or, for models with places in time, height and width, ``[4, batch_size, sequence_length]``, and what the
    processor gives for all images and clips of the batch, if it has any: ``pixel_values`` and ``image_grid_thw``;
    ``input_features``, float32 ``[clips, mel bins, frames]``, and ``feature_attention_mask``, int ``[clips, frames]``.
    Each document has the positions, and attends to the tokens, that it would alone.

    Args:
        source: One source or several; see `ChatDataModule`.
        validation_source: Rows to validate on. Default: ``validation_fraction`` of each source is held out.
        image_folder: Where paths of images and clips go on from. Default: the directory of the row's file.
        min_pixels: The least pixels (height x width) that an image is scaled to. Default: the processor's.
        max_pixels: The most; an image of Qwen3-VL is a token per 1,024 pixels. Default: the processor's.
        pack: Let documents share a row of ``sequence_length``. Without it each has a row, and rows of a batch are as
            long as its longest document: for models with linear attention (Qwen3.5), which cannot keep documents apart.
        chat_template: As in `ChatDataModule`, like all that follow.
        template_kwargs: Variables of the template.
        split_turns: Make a sample of each assistant's turn.
        too_long: Longer conversations lose whole turns, with their images and clips, or are left out. A clip that is
            longer than a window by itself is malformed, or left out with its conversation ("drop").
        malformed: Rows that cannot be read or rendered, also for an image or clip, are refused, or left out and
            counted.
        num_workers: Processes per loader that decode images and clips.
        **packed: Those of `PackedDataModule`.

    Raises:
        ValueError: As `ChatDataModule`; and in ``prepare_data`` if the checkpoint has no processor of images, or pixels
            are given that it does not know.
        ModuleNotFoundError: There, at the first clip, if what reads sound is not installed (the extra ``audio``).
    """

    kind = "vision"

    def __init__(
        self,
        source: str | Source | list[str | Source],
        validation_source: str | Source | list[str | Source] | None = None,
        image_folder: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        pack: bool = True,
        chat_template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        split_turns: bool = False,
        too_long: Literal["shorten", "drop"] = "shorten",
        malformed: Literal["refuse", "skip"] = "refuse",
        num_workers: int = 4,
        **packed: Any,
    ) -> None:
        super().__init__(
            source,
            validation_source,
            chat_template=chat_template,
            template_kwargs=template_kwargs,
            split_turns=split_turns,
            too_long=too_long,
            malformed=malformed,
            num_workers=num_workers,
            **packed,
        )
        self.image_folder = image_folder
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.packs = pack
        self.processor: Any = None

    @override
    def prepare_data(self) -> None:
        if self._predicts:
            raise ValueError(
                "predict takes documents one by one, which VisionChatDataModule does not give: validate instead, or "
                "pass a DataLoader of your own."
            )
        super().prepare_data()

    @override
    def sources(self) -> Sequence[Rows]:
        return [replace(rows, rows_per_task=_ROWS_PER_TASK) for rows in super().sources()]

    @override
    def validation_sources(self) -> Sequence[Rows] | None:
        found = super().validation_sources()
        return None if found is None else [replace(rows, rows_per_task=_ROWS_PER_TASK) for rows in found]

    @override
    def settings(self) -> Sequence[object]:
        # Paths of media go on from here where they and those of sources are relative, and are kept as they are then.
        own = (str(Path.cwd()), self.image_folder, self.min_pixels, self.max_pixels, self.packs)
        return *super().settings(), *own, self._files_of_processor()

    @override
    def use_tokenizer(self, directory: Path) -> None:
        self._directory_of_processor = directory
        super().use_tokenizer(directory)

    @override
    def check(self) -> None:
        if find_spec("PIL") is None:
            raise ValueError("VisionChatDataModule reads images with Pillow: pip install pillow.")
        pixels = self.min_pixels, self.max_pixels
        self.processor = adapter.load_processor(self._directory_of_processor, self.tokenizer, *pixels)
        if self.processor is None or getattr(self.processor, "image_token", None) is None:
            raise ValueError(
                f"{self._directory_of_processor} has no processor that gives images places in a text (no "
                "preprocessor_config.json, or of another kind). ChatDataModule reads conversations without images."
            )
        self._media_texts = MediaTexts(self.processor)
        self.placeholders = list(self.processor.image_token_ids)
        if "audio" in self._media_texts.kinds:
            self.placeholders += self.processor.audio_token_ids
        super().check()

    @override
    def renders(self, template: ChatTemplate) -> RendersConversations:
        return RendersMedia(
            self.tokenizer,
            template,
            self.sequence_length,
            self.split_turns,
            self.too_long,
            self.malformed,
            self._media_texts,
        )

    @override
    def read_row(self, row: Row) -> Conversation:
        folder = Path(self.image_folder).expanduser() if self.image_folder is not None else row.folder or Path()
        media = RowMedia(row.columns(), row.where, folder, self._media_texts.kinds)
        read = conversation(row.columns(), row.where, media.content)
        media.check_used()
        return read

    @override
    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        config = self._model_config()
        positions = adapter.MediaPositions(config)
        if positions.masks_by_images:
            raise ValueError(
                f"Models of the type {config.model_type!r} let tokens of an image see one another, by masks that are "
                "not known here for packed conversations. Train on batches of your own: CausalLM takes any."
            )
        shared = self.processor, positions
        self.train_dataset = VisionWindows(self.train_dataset, MediaFile(self.directory / "train"), *shared)
        if self.val_dataset is not None:
            self.val_dataset = VisionWindows(self.val_dataset, MediaFile(self.directory / "val"), *shared)

    @override
    def collate_function(self) -> Collate:
        return batch_of if self.packs else rows_of

    @property
    def saved_with_model(self) -> Any:
        """The tokenizer, and the processor's files with the pixels that are set."""
        return _WithProcessor(self.tokenizer, self._files_with_pixels())

    def _model_config(self) -> Any:
        config = getattr(self._module(), "model_config", None)
        checkpoint = checkpoint_of(self._module()) or self._tokenizer_source
        if config is None and checkpoint is not None:
            config = AutoConfig.from_pretrained(small_files(checkpoint))
        if config is None:
            raise ValueError(
                "VisionChatDataModule needs the model's configuration, which says where the tokens of an image are. "
                "Give the module an attribute `model_config` or `pretrained_path`, as CausalLM has."
            )
        return config

    def _files_of_processor(self) -> dict[str, bytes]:
        files = self._tokenizer_files()
        return read_files(files[0].parent, PROCESSOR_FILES) if files else {}

    def _files_with_pixels(self) -> dict[str, bytes]:
        files = self._files_of_processor()
        size = self.processor.image_processor.size
        for name, content in files.items():
            values = json.loads(content)
            of_images = values.get("image_processor", values if name == "preprocessor_config.json" else None)
            if of_images is not None and adapter.sets_pixels(self.processor.image_processor):
                of_images["size"] = {key: size[key] for key in ("shortest_edge", "longest_edge")}
                of_images.pop("min_pixels", None)
                of_images.pop("max_pixels", None)
                files[name] = json.dumps(values, indent=2).encode()
        return files


@dataclass(frozen=True)
class _WithProcessor:
    """What is saved with a model in place of a tokenizer."""

    tokenizer: Any
    files: dict[str, bytes]

    @property
    def eos_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    def save_pretrained(self, directory: str) -> None:
        self.tokenizer.save_pretrained(directory)
        write_files_to(Path(directory), self.files)
