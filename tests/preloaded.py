"""What the server of ranks has behind it when it forks one (`tests/ranks.py`), so that no rank does it again.

Nothing here may start a thread that works, or a process group.
"""

import contextlib
import gc
import importlib

gc.disable()  # of what imports make, next to nothing can be collected
for name in (
    *("datasets", "lightning.pytorch", "peft", "pytest"),
    *("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
    *("transformers.conversion_mapping", "transformers.models.qwen3_moe.modeling_qwen3_moe"),
):
    importlib.import_module(name)
# A table of 900 compiled patterns, which is made when it is first asked for.
importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("any")
# The server would die of an error in ours; the ranks that import them report one better.
with contextlib.suppress(Exception):
    for name in ("lightning_ep", "lightning_ep.data", "tests.parity", "tests.rows"):
        importlib.import_module(name)
gc.freeze()  # nor is it looked at again after every call
gc.enable()
