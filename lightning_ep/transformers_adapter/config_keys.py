"""Which keys a configuration knows: those that its class declares or takes, or that its model reads.

transformers keeps keys that it does not know as attributes of the config, and nobody looks at them: ``num_expert: 4``
gives a model with the default number of experts. Files from the hub carry such keys, so this is for what users type.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

_TAKEN = re.compile(r"""kwargs(?:\.(?:get|pop)\(|\[)\s*["'](\w+)["']|["'](\w+)["'] (?:not )?in kwargs""")
_QUOTED = re.compile(r"""["'](\w+)["']""")
_SET = re.compile(r"\bself\.(\w+)(?:: [^=\n]+)? = ")
_ROPE_READ = re.compile(r"""rope_(?:parameters|scaling)\w*(?:\[\w+\])?(?:\.get\(|\[)\s*["'](\w+)["']""")
_COMMON = ("modeling_utils.py", "masking_utils.py", "modeling_rope_utils.py")


def unknown_keys(typed: Mapping[str, Any], config: PreTrainedConfig, also: Iterable[str] = frozenset()) -> list[str]:
    """Keys that ``config`` was given and nobody reads, each with its path and the nearest names that are read.

    Args:
        typed: What the user wrote, nested configurations as dicts.
        config: The configuration built from it.
        also: Keys that are known beside those of its class.
    """
    problems = []
    for key, value in typed.items():
        attribute = _own(config, key)
        if not _is_known(key, value, config) and key not in also:
            problems.append(key + _did_you_mean(key, config))
        elif not isinstance(value, Mapping):
            continue
        elif isinstance(attribute, PreTrainedConfig):
            # What the class around it writes into it by default.
            written = set(_QUOTED.findall(_source(type(config))))
            problems += [f"{key}.{problem}" for problem in unknown_keys(value, attribute, written)]
        elif key in ("rope_parameters", "rope_scaling"):
            problems += [f"{key}.{problem}" for problem in _unknown_rope_keys(value, config)]
        elif key == "per_layer_config":
            for layer, values in value.items():
                wrong = [name for name in values if not _is_known(name, values[name], config)]
                problems += [f"{key}.{layer}.{name}{_did_you_mean(name, config)}" for name in wrong]
    return problems


def near(name: str, names: Iterable[str]) -> str:
    """A phrase with the names that ``name`` may be a misspelling of; empty if there are none."""
    found = difflib.get_close_matches(name, sorted(names), n=2)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def _is_known(key: str, value: Any, config: PreTrainedConfig) -> bool:
    if key in _declared(config):
        return True
    if key not in vars(config):
        # Not kept as it is: taken by the class under a name that it composes. But transformers drops what belongs to
        # generation.
        return key not in vars(GenerationConfig())
    owners = _owners(key, config)
    if owners:  # some composite classes hand on what they do not declare
        return any(_own(part, key) == value for part in owners.values())
    classes = {cls.__name__ for cls in inspect.getmro(type(config))}
    return any(_reads(file, key, classes) for file in _readers(type(config)))


def _owners(key: str, config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """Nested configurations that declare ``key``, by name."""
    parts = {name: _own(config, name) for name in config.sub_configs}
    return {n: p for n, p in parts.items() if isinstance(p, PreTrainedConfig) and key in _declared(p)}


def _own(config: PreTrainedConfig, key: str) -> Any:
    """The value of a key, without asking a configuration whose layers differ for the value of all of them."""
    return vars(config).get(config.attribute_map.get(key, key))


def _did_you_mean(key: str, config: PreTrainedConfig) -> str:
    if key in vars(GenerationConfig()):
        return " (a setting of generation, which a model's configuration does not hold)"
    nested = [f"{name}.{key}" for name in _owners(key, config)]
    return f" (did you mean {' or '.join(nested)}?)" if nested else near(key, _declared(config))


def _unknown_rope_keys(typed: Mapping[str, Any], config: PreTrainedConfig) -> Iterator[str]:
    layer_types = config.nested_rope_parameter_keys(dict(typed))
    known = {*RopeParameters.__annotations__, "type", *config.ignore_keys_at_rope_validation}
    for file in _readers(type(config)):
        known.update(_ROPE_READ.findall(file.read_text()))
    for key, value in typed.items():
        if key in layer_types and isinstance(value, Mapping):
            yield from (f"{key}.{problem}" for problem in _unknown_rope_keys(value, config))
        elif key not in known and key not in layer_types:
            yield key + near(key, {*known, *(getattr(config, "layer_types", None) or ())})


def _declared(config: PreTrainedConfig) -> frozenset[str]:
    """Names of fields and properties of a configuration class, and of arguments that it takes or passes on."""
    return _names(type(config))  # type: ignore[arg-type]  # the class defines __eq__, which is not about the class


@functools.cache
def _names(config_class: type) -> frozenset[str]:
    names = {"model_type", "auto_map", "quantization_config", "_name_or_path"}  # of files, whatever the class
    for cls in inspect.getmro(config_class)[:-1]:
        names.update(vars(cls).get("__dataclass_fields__", ()))
        names.update(name for name, value in vars(cls).items() if isinstance(value, property) and name[0] != "_")
        names.update(*vars(cls).get("attribute_map", {}).items())
        if "__init__" in vars(cls):  # code from the hub declares no fields
            names.update(inspect.signature(vars(cls)["__init__"]).parameters)
        names.update(*_TAKEN.findall(_source(cls)), _SET.findall(_source(cls)))
    return frozenset(names - {"self", "args", "kwargs", ""})


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # made in an interpreter
        return ""


def _readers(config_class: type[PreTrainedConfig]) -> list[Path]:
    """Files that read a configuration: those beside its class, and transformers' common ones."""
    own = Path(inspect.getfile(config_class))
    return [own, *sorted(own.parent.glob("modeling_*.py")), *(Path(transformers.__file__).parent / n for n in _COMMON)]


def _reads(file: Path, key: str, classes: set[str]) -> bool:
    """Whether a file reads ``config.key`` or ``self.config.key`` of what may be one of ``classes``."""
    source = file.read_text()
    if key not in source:  # nothing to parse
        return False
    lines = source.splitlines()
    for part in ast.parse(source).body:
        if not any(key in line for line in lines[part.lineno - 1 : part.end_lineno]):
            continue
        nodes = list(ast.walk(part))
        hints = {name.id for hint in map(_annotation, nodes) for name in ast.walk(hint) if isinstance(name, ast.Name)}
        configs = {name for name in hints if name.endswith("Config")}
        if (not configs or configs & classes) and any(_is_read(node, key) for node in nodes):
            return True
    return False  # or of another configuration of the same family


def _is_read(node: ast.AST, key: str) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == key and _is_config(node.value)
    return (  # getattr(config, "key", default)
        isinstance(node, ast.Call)
        and len(node.args) > 1
        and _is_config(node.args[0])
        and getattr(node.args[1], "value", None) == key
    )


def _annotation(node: ast.AST) -> ast.AST:
    annotation = getattr(node, "annotation", None)
    return annotation if annotation is not None else ast.Tuple([])


def _is_config(node: ast.AST) -> bool:
    return getattr(node, "id", getattr(node, "attr", None)) == "config"
