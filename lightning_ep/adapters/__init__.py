"""LoRA on a sharded model: what is adapted, and how adapters of experts live with their experts."""

from lightning_ep.adapters.lora import LoRA, add_adapter

__all__ = ["LoRA", "add_adapter"]
