"""LightningDataModules, and the loader they share."""

from lightning_ep.data.chat import ChatDataModule
from lightning_ep.data.packed_data import PackedDataModule
from lightning_ep.data.preference import PreferenceDataModule
from lightning_ep.data.preparation import Rows, Samples
from lightning_ep.data.prompt_completion import PromptCompletionDataModule
from lightning_ep.data.resumable_loader import ResumableLoader, data_ranks
from lightning_ep.data.row_files import Source
from lightning_ep.data.text import TextDataModule
from lightning_ep.data.text_stream import TextStreamDataModule
from lightning_ep.data.vision_chat import VisionChatDataModule

__all__ = [
    "ChatDataModule",
    "PackedDataModule",
    "PreferenceDataModule",
    "PromptCompletionDataModule",
    "ResumableLoader",
    "Rows",
    "Samples",
    "Source",
    "TextDataModule",
    "TextStreamDataModule",
    "VisionChatDataModule",
    "data_ranks",
]
