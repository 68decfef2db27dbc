"""Real chat templates, from trl's wheel, each with a byte-level tokenizer that has the special tokens of its family.

Only files of trl are read: importing it would take seconds, and its templates are all that is wanted.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from lightning_ep.data.chat_template import ChatTemplate
from lightning_ep.data.corpus import train_tokenizer

TEXT = [Path(__file__).read_text(), "Hello there! How are you? 2 + 2 is 4. <think>\nLet me see.\n</think>\n\n" * 20]


class Family(NamedTuple):
    special: str  # tokens that end or begin messages, and the like
    other: str  # added tokens that the family does not call special
    bos: str | None
    eos: str
    stops: str  # those of its generation_config


QWEN = Family(
    "<|endoftext|> <|im_start|> <|im_end|>",
    "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>",
    None,
    "<|im_end|>",
    "<|im_end|> <|endoftext|>",
)
LLAMA = Family(
    "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>",
    "",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|end_of_text|> <|eom_id|> <|eot_id|>",
)
GPT_OSS = Family(
    "<|startoftext|> <|endoftext|> <|return|> <|constrain|> <|channel|> <|start|> <|end|> <|message|> <|call|>",
    "",
    "<|startoftext|>",
    "<|return|>",
    "<|return|> <|endoftext|> <|call|>",
)
GLM = Family(
    "<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> /nothink",
    "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <arg_key> </arg_key> <arg_value> "
    "</arg_value>",
    None,
    "<|endoftext|>",
    "<|endoftext|> <|user|> <|observation|>",
)
DEEPSEEK = Family(  # written with other bars and underscores: see `deepseek`
    "<|begin_of_sentence|> <|end_of_sentence|>",
    "<|User|> <|Assistant|> <think> </think> <|tool_calls_begin|> <|tool_calls_end|> <|tool_call_begin|> "
    "<|tool_call_end|> <|tool_sep|> <|tool_outputs_begin|> <|tool_outputs_end|> <|tool_output_begin|> "
    "<|tool_output_end|>",
    "<|begin_of_sentence|>",
    "<|end_of_sentence|>",
    "<|end_of_sentence|>",
)
GEMMA = Family("<bos> <eos> <start_of_turn> <end_of_turn>", "", "<bos>", "<end_of_turn>", "<eos> <end_of_turn>")
PHI = Family(
    "<|endoftext|> <|system|> <|user|> <|assistant|> <|end|>", "", None, "<|endoftext|>", "<|endoftext|> <|end|>"
)
MIXTRAL = Family("<s> </s>", "[INST] [/INST]", "<s>", "</s>", "</s>")


def deepseek(text: str) -> str:
    """With the bars and underscores of DeepSeek's tokens."""
    return re.sub(r"<\|(\w+)\|>", lambda token: f"<\uff5c{token[1].replace('_', chr(0x2581))}\uff5c>", text)


DEEPSEEK = Family(*(value and deepseek(value) for value in DEEPSEEK))

FAMILIES = {
    "qwen3": QWEN,
    "qwen3_training": QWEN,
    "qwen3_instruct_2507": QWEN,
    "qwen3_5_think": QWEN,
    "qwen2_5": QWEN,
    "llama3": LLAMA,
    "llama3_1": LLAMA,
    "llama3_training": LLAMA,
    "gptoss": GPT_OSS,
    "gptoss_training": GPT_OSS,
    "glm4moe": GLM,
    "deepseekv3": DEEPSEEK,
    "deepseekv3_training": DEEPSEEK,
    "gemma3": GEMMA,
    "phi3": PHI,
    "phi3_training": PHI,
    "gemma3_training": GEMMA,
    "glm4moe_training": GLM,
    "qwen2_5_training": QWEN,
    "qwen3_instruct_2507_training": QWEN,
    "mixtral": MIXTRAL,
}

# By hand, after the pattern that Mixtral-8x7B-Instruct documents: one space on either side of what is said.
_MIXTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant take part.') }}{% endif %}{% endfor %}"
)


def template_text(name: str) -> str:
    if name == "mixtral":
        return _MIXTRAL
    spec = find_spec("trl")
    assert spec is not None, "trl's templates are read: pip install -e '.[test]'"
    assert spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text()


@cache
def family_tokenizer(name: str) -> Any:
    """A tokenizer that says nothing of its family but its special tokens and template."""
    family = FAMILIES[name]
    tokenizer: PreTrainedTokenizerFast = train_tokenizer(iter(TEXT), 400)
    special = [AddedToken(token, special=True, normalized=False) for token in family.special.split()]
    tokenizer.add_tokens([*special, *(AddedToken(token, normalized=False) for token in family.other.split())])
    if family.bos:  # as real ones do: a second BOS would be seen
        from tokenizers.processors import TemplateProcessing

        bos = tokenizer.convert_tokens_to_ids(family.bos)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, bos)]
        )
        tokenizer.bos_token = family.bos
    tokenizer.eos_token = tokenizer.pad_token = family.eos  # pad = eos: masks come from positions
    tokenizer.chat_template = template_text(name)
    return tokenizer


def stop_ids(name: str) -> list[int]:
    return family_tokenizer(name).convert_tokens_to_ids(FAMILIES[name].stops.split())


def chat_template(name: str, **variables: Any) -> ChatTemplate:
    tokenizer = family_tokenizer(name)
    return ChatTemplate(tokenizer, tokenizer.chat_template, variables, stop_ids(name))
