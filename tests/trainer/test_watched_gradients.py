"""What users hang on parameters and gradients: it sees whole gradients, or they hear that it never would."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ep import ExpertParallelStrategy
from tests.reference import tiny_model
from tests.rows import WORLD, RowFailures, Rows, refused
from tests.tiny import SMALL, Samples, TinyModule, loader, quiet

row = Rows()


def _fit(root: Path, module: TinyModule, **flags: Any) -> None:
    quiet(root, max_steps=1, use_distributed_sampler=False, **flags).fit(module, loader(2))


@row()
def norms_of_lightnings_helper(root: Path) -> None:
    """Of every parameter and of all, for both norms and for experts in FSDP and beside it, as one process has them."""
    plain: Any = nn.Module()
    plain.model = tiny_model(**SMALL)
    for batch in DataLoader(Samples(2), batch_size=2):
        plain.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
    for norm_type in (2, "inf"):
        expected = grad_norm(plain, norm_type)

        class Normed(TinyModule):
            def on_before_optimizer_step(self, optimizer: Any, norm_type: Any = norm_type) -> None:
                self.norms = grad_norm(self, norm_type)
                self.log_dict(self.norms)

        for ep in (1, 2):
            _fit(root, module := Normed(), strategy=ExpertParallelStrategy(ep=ep))
            assert module.norms == {name: pytest.approx(float(norm), rel=1e-5) for name, norm in expected.items()}
    with refused("positive number"):
        grad_norm(plain, 0)


class _Hooked(TinyModule):
    """Hooks parameters of a model that is made in `__init__`, or when it is sharded."""

    def __init__(self, late: bool) -> None:
        super().__init__(in_init=not late)
        self.seen: list[Tensor] = []
        if not late:
            self.model.lm_head.weight.register_hook(self.seen.append)

    def on_fit_start(self) -> None:
        self.model.lm_head.weight.register_hook(self.seen.append)


@row()
def hooks_that_nobody_would_call(root: Path) -> None:
    with refused("model.lm_head.weight", "shards take the place", "register_post_accumulate_grad_hook"):
        _fit(root, _Hooked(late=False))
    with refused("model.lm_head.weight", "gathered copies", "register_post_accumulate_grad_hook"):
        _fit(root, _Hooked(late=True))


@row()
def hooks_after_accumulation(root: Path) -> None:
    class Seeing(TinyModule):
        def on_fit_start(self) -> None:
            self.norms: list[float] = []
            for param in self.model.parameters():
                param.register_post_accumulate_grad_hook(lambda p: self.norms.append(p.grad.to_local().norm().item()))

    _fit(root, module := Seeing())
    assert len(module.norms) == len(list(module.model.parameters()))


class _Watched(TinyModule):
    def __init__(self, logger: WandbLogger, late: bool, log: str) -> None:
        super().__init__(in_init=not late)
        self.watch = lambda: logger.watch(self, log=log, log_freq=1)
        if not late:
            self.watch()

    def on_fit_start(self) -> None:
        if not hasattr(self, "_wandb_hook_names"):
            self.watch()


@row()
def wandb_watch(root: Path) -> None:
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(root)}
    root.mkdir(exist_ok=True)
    logger = WandbLogger(save_dir=root, project="tests")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _fit(root, _Watched(logger, late=False, log="gradients"), logger=logger)
    said = [str(w.message) for w in caught if "wandb.watch" in str(w.message)]
    assert len(said) == (1 if os.environ["RANK"] == "0" else 0)
    assert all("will draw no gradients" in text and "grad_norm" in text for text in said)
    for late, log in ((True, "gradients"), (True, "all"), (False, "parameters")):
        with refused("wandb.watch", "rank 0 alone", "full_tensor"):
            _fit(root, _Watched(logger, late, log), logger=logger)


@row()
def generation_in_inference_mode_before_training(root: Path) -> None:
    class Generating(TinyModule):
        def on_fit_start(self) -> None:
            with torch.inference_mode():
                arguments: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "synced_gpus": True}
                prompt = torch.arange(5, device=self.device)[None]
                self.text = self.model.generate(prompt, **arguments)[0].tolist()

        def on_train_batch_end(self, *_: Any) -> None:
            self.on_fit_start()

    for ep in (1, 2):
        quiet(root, max_steps=2, strategy=ExpertParallelStrategy(ep=ep)).fit(plain := TinyModule(), loader(4 * WORLD))
        quiet(root, max_steps=2, strategy=ExpertParallelStrategy(ep=ep)).fit(found := Generating(), loader(4 * WORLD))
        assert len(found.text) == 9
        assert found.losses == pytest.approx(plain.losses, rel=1e-6)


@pytest.mark.parametrize("name", row)
def test_works_or_is_refused(name: str, row_failures: RowFailures) -> None:
    row_failures.check(name)
