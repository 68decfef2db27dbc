"""LoRA on a sharded model: what is adapted, and how adapters of experts live with their experts."""

from lightning_ep.adapters.lora import LoRA, adapters_off, add_adapter

__all__ = ["LoRA", "adapters_off", "add_adapter"]
