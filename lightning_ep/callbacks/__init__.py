"""What users add to a Trainer."""

from lightning_ep.callbacks.expert_load import ExpertLoadMonitor
from lightning_ep.callbacks.generate import GenerateSamples
from lightning_ep.callbacks.grade import GradeAnswers
from lightning_ep.callbacks.huggingface_export import HuggingFaceExport
from lightning_ep.callbacks.predictions import WritePredictions
from lightning_ep.callbacks.throughput import Throughput

__all__ = [
    "ExpertLoadMonitor",
    "GenerateSamples",
    "GradeAnswers",
    "HuggingFaceExport",
    "Throughput",
    "WritePredictions",
]
