"""Models by name: what a ``config.json`` of each family says, and the published ones that come with this package."""

from __future__ import annotations

import difflib
import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ep.planner.widths import LatentAttention, LinearAttention, ModelWidths

_SHIPPED = Path(__file__).with_name("models.json")

# Ours: what families call it, the first that a configuration has.
_NAMES = {
    "hidden": ("hidden_size",),
    "layers": ("num_hidden_layers",),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "top_k": ("num_experts_per_tok",),
    "moe_intermediate": ("moe_intermediate_size", "intermediate_size"),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads", "num_attention_heads"),
    "vocab": ("vocab_size",),
}


@dataclass(frozen=True)
class Family:
    """What a family has that its configuration does not say.

    Attributes:
        qk_norm: As `ModelWidths` has it; ``config`` where ``use_qk_norm`` says it.
        biases: Always there; ``attention_bias`` and ``qkv_bias`` add to them.
        attention_bias: What ``attention_bias`` gives biases to.
        sinks: Whether heads have sinks.
        gated_attention: Whether queries come with a gate.
        tp: Whether its plan splits attention (`lightning_ep.tensor_parallel`).
        cp: Whether its sequences can be split (`lightning_ep.context_parallel`) at a cost that is known here: that of
            layers that run on whole sequences is not.
    """

    qk_norm: str = "none"
    biases: tuple[str, ...] = ()
    attention_bias: tuple[str, ...] = ("qkv", "output")
    sinks: bool = False
    gated_attention: bool = False
    tp: bool = True
    cp: bool = True


# Read in transformers 5.23; tests count the parameters of each family's models.
FAMILIES = {
    "qwen3_moe": Family(qk_norm="head"),
    "qwen2_moe": Family(),
    "qwen3_next": Family(qk_norm="head", gated_attention=True, tp=False, cp=False),
    "mixtral": Family(attention_bias=()),
    "olmoe": Family(qk_norm="all"),
    "gpt_oss": Family(biases=("router", "experts"), sinks=True, tp=False),
    "glm4_moe": Family(qk_norm="config", attention_bias=("qkv",)),
    "deepseek_v2": Family(attention_bias=()),
    "deepseek_v3": Family(attention_bias=(), tp=False),
}


@dataclass(frozen=True)
class Model:
    """A model that can be planned.

    Attributes:
        name: A hub id, or the file that it was read from.
        widths: Of its layers.
        layers: Decoder layers.
        family: What else is known of its kind.
        positions: Tokens that it was made for; 0 if nothing says.
        config: What was read, as ``config.json`` has it.
        source: Where that is from.
        note: What a trainer must know of the published weights.
    """

    name: str
    widths: ModelWidths
    layers: int
    family: Family
    positions: int
    config: dict[str, Any]
    source: str
    note: str = ""


def read_widths(config: Mapping[str, Any]) -> tuple[ModelWidths, int]:
    """The widths and the number of layers in the values of a ``config.json``.

    Raises:
        ValueError: If the family is not known, a value is missing, or there is something that is not counted here.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type={kind!r} is not planned; known are {', '.join(FAMILIES)}.")
    family = FAMILIES[kind]
    found: dict[str, Any] = {ours: _value(config, ours, names) for ours, names in _NAMES.items()}
    layers = found.pop("layers")
    widths = ModelWidths(
        **found,
        head_dim=config.get("head_dim") or (256 if kind == "qwen3_next" else found["hidden"] // found["heads"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=_qk_norm(family, config),
        biases=_biases(family, config),
        sinks=family.sinks,
        gated_attention=family.gated_attention,
        latent=_latent(config) if kind.startswith("deepseek") else None,
        linear=_linear(config, layers) if kind == "qwen3_next" else None,
        **_dense(config, found, layers),
        **_windows(config, layers),
    )
    return widths, layers


def _value(config: Mapping[str, Any], ours: str, names: tuple[str, ...]) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"the configuration has {names[0]}={value!r}: a positive integer must say its {ours}.")
    return value


def _qk_norm(family: Family, config: Mapping[str, Any]) -> Any:
    return ("head" if config.get("use_qk_norm") else "none") if family.qk_norm == "config" else family.qk_norm


def _biases(family: Family, config: Mapping[str, Any]) -> tuple[str, ...]:
    default = config["model_type"] == "gpt_oss"
    found = family.attention_bias if config.get("attention_bias", default) else ()
    if config["model_type"] == "qwen2_moe":
        found = ("qkv",) if config.get("qkv_bias", True) else ()
    return (*found, *family.biases)


def _latent(config: Mapping[str, Any]) -> LatentAttention:
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return LatentAttention(config.get("q_lora_rank") or 0, *(_value(config, name, (name,)) for name in names))


def _linear(config: Mapping[str, Any], layers: int) -> LinearAttention:
    kinds = config.get("layer_types")
    every = config.get("full_attention_interval", 4)
    count = kinds.count("linear_attention") if kinds else layers - layers // every
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    sizes = (_value(config, name, (f"linear_{name}",)) for name in names)
    return LinearAttention(count / layers, *sizes)


def _dense(config: Mapping[str, Any], found: Mapping[str, int], layers: int) -> dict[str, Any]:
    """Layers without experts, and experts that every token goes to."""
    step, named = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    dense = sum(layer in named or (layer + 1) % step != 0 for layer in range(layers))
    dense = max(dense, config.get("first_k_dense_replace") or 0)
    shared = config.get("shared_expert_intermediate_size") or 0
    shared += (config.get("n_shared_experts") or 0) * found["moe_intermediate"]
    return {
        "dense_layers": dense,
        "dense_intermediate": config.get("intermediate_size", 0) if dense else 0,
        "shared_intermediate": shared,
        "shared_gate": "shared_expert_intermediate_size" in config,
    }


def _windows(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    window = config.get("sliding_window") or 0
    if not window or config.get("use_sliding_window") is False:
        return {}
    kinds = config.get("layer_types")
    if kinds is None and config["model_type"] == "gpt_oss":
        return {"window": window, "windowed": (layers + 1) // 2 / layers}
    return {"window": window, "windowed": kinds.count("sliding_attention") / layers if kinds else 1.0}


@functools.cache
def shipped() -> dict[str, dict[str, Any]]:
    """Published models by their hub ids: ``config``, ``source``, what is ``published`` of their size, a ``note``."""
    return json.loads(_SHIPPED.read_text())


def find_model(name: str) -> Model:
    """The model of a hub id, a directory, or a ``config.json``; nothing is downloaded.

    Raises:
        ValueError: If there is none, with those that there are; or as `read_widths`.
    """
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        return _model(name, _read(file), str(file))
    short = {entry.rpartition("/")[2].lower(): entry for entry in shipped()}
    entry = name if name in shipped() else short.get(name.lower())
    if entry is not None:
        about = shipped()[entry]
        return _model(entry, about["config"], about["source"], about.get("note", ""))
    cached = _cached(name)
    if cached is not None:
        return _model(name, _read(cached), str(cached))
    near = difflib.get_close_matches(name.rpartition("/")[2].lower(), short, n=1)
    hint = f" Did you mean {short[near[0]]}?" if near else ""
    raise ValueError(
        f"there is no model {name!r}: it is no directory with a config.json and no such file, the hub's cache here "
        f"does not have it (`hf download {name} config.json` fetches it), and it is none of those that come with this "
        f"package: {', '.join(shipped())}.{hint}"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is no JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no configuration of a model.")
    return config


def _cached(name: str) -> Path | None:
    """``config.json`` of a hub id in the hub's cache, of its newest revision there."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))).expanduser()
    found = hub.glob(f"models--{name.replace('/', '--')}/snapshots/*/config.json")
    return max(found, key=lambda file: file.stat().st_mtime, default=None)


def _model(name: str, config: dict[str, Any], source: str, note: str = "") -> Model:
    try:
        widths, layers = read_widths(config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    positions = config.get("max_position_embeddings") or 0
    return Model(name, widths, layers, FAMILIES[config["model_type"]], positions, config, source, note)
