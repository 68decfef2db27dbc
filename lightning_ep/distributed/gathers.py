"""Gathers by the name that torch has for them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

gather_single: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name before torch 2.13
