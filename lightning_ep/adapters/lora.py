"""What is adapted: `LoRA`, by PEFT's names, and putting PEFT's modules into a model."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION

from lightning_ep import transformers_adapter as adapter
from lightning_ep.adapters.pretrained import fill_adapter, find_adapter, read_config
from lightning_ep.hub.source import Source

if TYPE_CHECKING:
    import peft

_BEFORE = (0, 21)  # PEFT's wrapper of fused experts is read and replaced: other versions have not been
_INSTALL = f"pip install 'peft=={'.'.join(map(str, _BEFORE))}.*'"
_NOT_FOR_EXPERTS = ("lora_dropout", "use_dora", "lora_bias")


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al., 2021) of attention and fused experts, with a frozen model beneath; by PEFT's names.

    Defaults follow "LoRA Without Regret" (Schulman et al., Thinking Machines, 2025): adapters everywhere but in the
    router, ``alpha = 32``, and a learning rate ten times that of full fine-tuning (`CausalLM`'s, with an adapter).

    Args:
        r: Rank. Each expert has a product of this rank of its own.
        lora_alpha: The product is scaled by ``lora_alpha / r``.
        target_modules: Linear layers: the ends of their names, or a regular expression. Default: all of attention.
        experts: Adapt the fused experts, too.
        modules_to_save: Modules that are trained whole beside the adapters and saved with them, by the ends of their
            names: ``["embed_tokens", "lm_head"]`` with new tokens, the router.
        lora_dropout: Dropout before the adapters of linear layers.
        use_rslora: Scale by ``lora_alpha / sqrt(r)``.
        use_dora: Train the norms of rows apart (DoRA), of linear layers.
        lora_bias: Train a bias with B, of linear layers.
        rank_pattern: Other ranks, by regular expressions of names.
        alpha_pattern: Other values of ``lora_alpha``, likewise.
        init_lora_weights: True (A as PyTorch's linear layers, B zero), ``"gaussian"``, or False (both random).
        pretrained: A directory or the hub id of an adapter of PEFT with which to go on; what is adapted, and how, is
            then as it says.

    Raises:
        ValueError: For what PEFT has for linear layers only, while experts are adapted, and for values without meaning.
    """

    r: int = 8
    lora_alpha: int = 32
    target_modules: list[str] | str | None = None
    experts: bool = True
    modules_to_save: list[str] | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, int] | None = None
    init_lora_weights: bool | str = True
    pretrained: str | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"LoRA(r={self.r}): the rank must be 1 or more.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"LoRA(lora_dropout={self.lora_dropout}) is a probability: 0 or more, and less than 1.")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"LoRA(init_lora_weights={self.init_lora_weights!r}): other starts than True, False and 'gaussian' are "
                "computed from weights, which are not there before the model is sharded."
            )
        if self.target_modules == "all-linear":
            raise ValueError(
                "LoRA(target_modules='all-linear') would adapt routers in some families and not in others. Leave it "
                "out for all of attention, beside which experts=True adapts the experts; or name the layers."
            )
        given = [name for name in _NOT_FOR_EXPERTS if getattr(self, name)]
        if self.experts and given and self.pretrained is None:
            raise ValueError(
                f"LoRA({', '.join(f'{name}={getattr(self, name)}' for name in given)}) is not possible for experts: "
                "their product is one with the weights' (as in PEFT, whose wrapper of parameters has none of "
                f"{', '.join(_NOT_FOR_EXPERTS)}). Leave it out, or set experts=False."
            )
        if not self.experts and self.target_modules == []:
            raise ValueError("LoRA(target_modules=[], experts=False) adapts nothing.")

    def config(self, model: PreTrainedModel) -> peft.LoraConfig:
        """PEFT's configuration for a model.

        Raises:
            ValueError: If a name is that of none of its modules; says which are near.
        """
        from peft import LoraConfig

        names = [name for name, _ in model.named_modules()]
        if isinstance(self.target_modules, list):
            _refuse_unknown("target_modules", self.target_modules, names)
        _refuse_unknown("modules_to_save", self.modules_to_save or (), names)
        modules = _attention(model) if self.target_modules is None else self.target_modules
        options: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                *("r", "lora_alpha", "modules_to_save", "lora_dropout", "use_rslora", "use_dora", "lora_bias"),
                "init_lora_weights",
            )
        }
        return LoraConfig(
            **options,
            task_type="CAUSAL_LM",
            target_modules=modules,
            target_parameters=_experts(model) if self.experts else None,
            rank_pattern=self.rank_pattern or {},
            alpha_pattern=self.alpha_pattern or {},
            # One tensor stays one: trained and saved once.
            ensure_weight_tying=bool(self.modules_to_save) and adapter.tied(model),
        )


def add_adapter(module: nn.Module, lora: LoRA) -> nn.Module:
    """Puts PEFT's modules into a model, in place, and freezes the rest.

    To be called before the model is sharded; on meta (`from_pretrained`, `from_config`) it stays there. The adapter is
    called ``"default"``, and the model has PEFT's methods of transformers (``disable_adapters``, ``save_pretrained``).

    Args:
        module: A transformers model, or a module with one inside.
        lora: What is adapted, and how.

    Returns:
        The module.

    Raises:
        ImportError: If PEFT is not there, or in a version that has not been tried.
        ValueError: If the model cannot be adapted so; it has not been changed then.
    """
    _check_version()
    models = adapter.pretrained_models(module)
    if len(models) != 1:
        raise ValueError(f"{type(module).__name__} holds {len(models)} transformers models; pass the one to adapt.")
    (model,) = models.values()
    if adapter.peft_configs(model):
        raise ValueError(f"{type(model).__name__} has an adapter already.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"{type(model).__name__} is quantized, and adapters are trained beside weights in bf16 or fp32. Use the "
            "unquantized checkpoint."
        )
    found = None if lora.pretrained is None else find_adapter(lora.pretrained)
    config = lora.config(model) if found is None else read_config(found)
    if config.use_dora and any(param.is_meta for param in model.parameters()):
        raise ValueError(
            "LoRA(use_dora=True) starts from norms of weights, which are not there before the model is sharded. Build "
            "the model in memory: transformers' AutoModelForCausalLM.from_pretrained in `configure_model`, then "
            "`add_adapter`."
        )
    put_in(model, config)
    if found is not None:
        fill_adapter(model, found)
    if (source := adapter.recall(model, Source)) is not None:
        config.base_model_name_or_path, config.revision = source.typed, source.revision
    adapter.remember(model, lora)
    return module


def put_in(model: PreTrainedModel, config: peft.LoraConfig) -> None:
    """Puts PEFT's modules into a model as a configuration of PEFT says; on meta, they stay there."""
    on_meta = any(param.is_meta for param in model.parameters())
    with torch.device("meta") if on_meta else nullcontext():
        model.add_adapter(config)


@contextmanager
def adapters_off(module: nn.Module) -> Generator[None, None, None]:
    """Inside, a model computes as without its adapters (and with the originals of ``modules_to_save``).

    PEFT's `disable_adapters` also has parameters want no gradient, and FSDP2 keeps for gathered parameters what they
    said in their first forward.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: list[Any] = [m for m in module.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was_off in zip(layers, before, strict=True):
            layer._disable_adapters = was_off


def _check_version() -> None:
    try:
        import peft
    except ImportError:
        raise ImportError(f"LoRA needs PEFT: {_INSTALL}.") from None
    found = tuple(int(part) for part in peft.__version__.split(".")[:2])
    if found != _BEFORE:
        raise ImportError(
            f"peft {peft.__version__} is installed, and LoRA is known to work with {'.'.join(map(str, _BEFORE))}: "
            f"{_INSTALL}."
        )
    if found < tuple(int(part) for part in MIN_PEFT_VERSION.split(".")[:2]):
        raise ImportError(
            f"transformers {transformers.__version__} takes adapters of peft {MIN_PEFT_VERSION} or later, and LoRA is "
            f"known to work with {'.'.join(map(str, _BEFORE))}: {_INSTALL} 'transformers<5.24'."
        )


def _attention(model: PreTrainedModel) -> list[str]:
    """The linear layers of attention: the ends of their names where these say which, else whole names.

    Without those of a kind that PEFT does not know (DeepSeek-V4's, of groups), gates by the name that experts' had
    before they were fused, for which PEFT takes them (AFMoE's), and what Mamba and its kernels take the weight of.
    """
    inside = [f"{name}." for name in adapter.attention_modules(model)]
    known = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and _is_plain(m)]
    mamba = [name for name, m in model.named_modules() if hasattr(m, "in_proj") and hasattr(m, "conv1d")]
    left_out = {f"{name}.{part}" for name in mamba for part in ("out_proj", "dt_proj")}
    linear = [name for name in known if name.rpartition(".")[2] != "gate_proj" and name not in left_out]
    wanted = {name for name in linear if any(name.startswith(prefix) for prefix in inside)}
    ends = {name.rpartition(".")[2] for name in wanted}
    others = [name for name, _ in model.named_modules() if name not in wanted and name.rpartition(".")[2] in ends]
    return sorted(wanted if others else ends)


def _is_plain(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward


def _experts(model: PreTrainedModel) -> list[str]:
    """The ends of the names of the experts' matrices."""
    found = {
        ".".join([*name.split(".")[-2:], key])
        for name, experts in adapter.experts_modules(model).items()
        for key, param in experts.named_parameters()
        if param.ndim == 3
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no fused experts to adapt. Set LoRA(experts=False).")
    return sorted(found)


def _refuse_unknown(option: str, wanted: Iterable[str], names: list[str]) -> None:
    ends = {".".join(name.split(".")[i:]) for name in names for i in range(name.count(".") + 1)}
    unknown = [name for name in wanted if name not in ends]
    if unknown:
        short = {end for end in ends if "." not in end and not re.fullmatch(r"\d*", end)}
        near = "; ".join(f"{name!r}{adapter.near(name, short)}" for name in unknown)
        raise ValueError(f"LoRA({option}): no module of the model has a name that ends in {near}.")
