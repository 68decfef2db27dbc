"""`docs/reference/workarounds.md` says all that is changed of other libraries' objects, and names all their privates.

Three things could make it untrue: a change that has no row, a row whose change is gone, and a name that moved.
"""

from __future__ import annotations

import ast
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

import lightning_ep
from tests.test_private_dependencies import LIBRARIES, MARKS, PRIVATE, UNDOCUMENTED, _defined

PACKAGE = Path(lightning_ep.__file__).parent
ROOT = PACKAGE.parent
PAGE_NAME = "docs/reference/workarounds.md"
PAGE = (ROOT / PAGE_NAME).read_text()
CHANGES, NAMES = PAGE.split("\n## ")[1:3]  # its two parts

# Calls that change what is not ours: an object that they are called on or given, or all of the process.
CHANGING = {
    *("register", "register_parameter", "register_sharding"),
    *("register_hook", "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"),
    *("set_experts_implementation", "_auto_add_worker_init_fn", "fset", "increment_completed", "increment_processed"),
    *("filterwarnings", "simplefilter", "setLevel", "addFilter", "set_verbosity_error", "disable_progress_bar"),
    *("manual_seed", "set_rng_state", "set_state", "setstate", "_set_num_threads_if_needed", "_register_signal"),
    *("set_wakeup_fd", "register_at_fork", "signal"),
}
IN_PLACE = {"add", "append", "clear", "discard", "extend", "insert", "pop", "remove", "setdefault", "update"}
# What looks like such a change and is made to an object of ours: file, what is set, whose it is.
OURS = [
    ("moe/experts.py", {"has_run"}, "an ExpertContext"),
    ("moe/idle_experts.py", {"leave"}, "an ExpertContext"),
    ("moe/tower_experts.py", {"leave"}, "an ExpertContext"),
    ("adapters/lora.py", {"base_model_name_or_path", "revision"}, "a LoraConfig that it has made"),
    ("adapters/pretrained.py", {"inference_mode", "init_lora_weights"}, "a LoraConfig that it has read"),
    ("causal_lm.py", {"model"}, "a CausalLM"),
    ("cli/export.py", {"base_model_name_or_path", "revision"}, "the LoraConfig of an adapter that it has read"),
    ("cli/export.py", {"generation_config"}, "a model that `meta_model` has made"),
    ("callbacks/grade.py", {"distributed_available_fn"}, "a copy of the metric"),
    ("cli/compared.py", {"manual_seed"}, "a generator of its own"),
    ("cli/compared.py", {"set_experts_implementation"}, "the model that the command has built"),
    ("cli/chats.py", {"chat_template", "response_template"}, "the tokenizer that the command has loaded"),
    ("cli/generation.py", {"manual_seed"}, "the command's process"),
    ("ops/one_by_one.py", {"manual_seed"}, "a generator of its own"),
    ("tensor_parallel/styles.py", {"value"}, "a SequenceLength"),
    (
        "cli/opened.py",
        {"data", "generation_config", "strict_loading"},
        "the model and module that the command has built",
    ),
    ("cli/recipe_data.py", {"callbacks", "logger"}, "the arguments that the command has parsed"),
    ("cli/recipe_data.py", {"environ"}, "the command's process"),
    ("cli/recipe_data.py", {"trains"}, "a PackedDataModule"),
    ("cli/saved_model.py", {"generation_config"}, "a model that `meta_model` has made"),
    ("context_parallel/attention.py", {"masks"}, "a SequencePiece"),
    ("data/chat.py", {"chat_template", "response_template"}, "the tokenizer that the data module has loaded"),
    ("data/corpus.py", {"pre_tokenizer", "decoder"}, "a tokenizer in the making"),
    ("data/packed_stream.py", {"environ"}, "a worker process's own"),
    ("callbacks/expert_load.py", {"active"}, "a Watched"),
    ("cli/routing_report.py", {"active"}, "a Watched"),
    ("data/packed_stream.py", {"manual_seed"}, "a generator of its own"),
    ("data/packed_stream.py", {"position"}, "a PackedStream"),
    ("data/preparation.py", {"environ"}, "a worker process's own"),
    ("data/resumable_loader.py", {"manual_seed"}, "a generator of its own"),
    ("distributed/agreement.py", {"__cause__"}, "an exception that it raises"),
    ("data/preference.py", {"dropped", "notes"}, "a Samples"),
    ("ops/kernels/launch.py", {"base", "block_shape", "padding", "shape", "strides"}, "a descriptor in the making"),
    ("trainer/garbage.py", {"step"}, "a _Spare"),
    (
        "hub/adapter_files.py",
        {"base_model_name_or_path", "inference_mode", "target_modules", "target_parameters"},
        "a copy of a LoraConfig",
    ),
    ("hub/adapter_files.py", {"places"}, "what it remembers of a model"),
    ("hub/beneath.py", {"beside", "problems", "tensors"}, "a Beneath"),
    ("hub/companions.py", {"eos_token_id"}, "a copy of the generation config"),
    ("hub/directory.py", {"architectures", "dtype"}, "a copy of the config"),
    ("hub/export.py", {"generation_config"}, "a model that `meta_model` has made"),
    ("hub/meta_models.py", {"data", "dtype", "generation_config"}, "a model in the making, on meta"),
    ("hub/reader.py", {"staging"}, "a threading.local of ours"),
    ("hub/trace.py", {"pieces", "extent"}, "a Traced"),
    ("hub/rules.py", {"__dict__"}, "a stand-in"),
    ("hub/load.py", {"problems"}, "the Problems of a Match"),
    ("layers/recompute.py", {"leave", "left", "outputs", "random", "saved_before", "tensor"}, "notes of a checkpoint"),
    ("process_groups.py", {"_timeout"}, "options in the making"),
    ("moe/master_weights.py", {"keep_copies"}, "a MasterWeights"),
    ("ops/registered_experts.py", {"__dict__"}, "a stand-in"),
    ("routing/choices.py", {"manual_seed"}, "a generator of its own"),
    ("routing/observe.py", {"choice", "logits"}, "a _Watched"),
    ("routing/observe.py", {"route"}, "an ExpertContext"),
    ("strategy.py", {"guard"}, "a ShardedPrecision"),
    ("trainer/signals.py", {"received_sigterm"}, "a SignalFlags"),
    ("transformers_adapter/conversion.py", {"sources"}, "a Conversion"),
]


def _own_instance(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls", "ctx")


def _changed(node: ast.AST) -> str | None:
    """What a statement or call changes of an object other than the one whose method it is in."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        node = node.value
        return node.attr if isinstance(node, ast.Attribute) and not _own_instance(node.value) else None
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
        return None if _own_instance(node.value) else node.attr
    if not isinstance(node, ast.Call):
        return None
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in ("setattr", "delattr") and not _own_instance(node.args[0]):
        return str(node.args[1].value) if isinstance(node.args[1], ast.Constant) else name
    if name in CHANGING:
        return name
    if name in IN_PLACE and isinstance(function, ast.Attribute):
        held = function.value
        return held.attr if isinstance(held, ast.Attribute) and not _own_instance(held.value) else None
    return None


def _found() -> set[tuple[str, str]]:
    """Every file with every name that it changes of an object that is not ours."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        found |= {(file, name) for node in ast.walk(ast.parse(path.read_text())) if (name := _changed(node))}
    return found


CHANGED = _found() - {(file, name) for file, names, _ in OURS for name in names}


def _spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def _rows() -> list[tuple[set[str], set[str]]]:
    """Of every row of the first part the files whose changes it is about, and all that it says of them."""
    rows = []
    for line in CHANGES.splitlines():
        if line.startswith("|") and not line.startswith(("| where", "|---")):
            spans = _spans(line.split(" | ")[0])
            files = {span.partition(":")[0] for span in spans if ".py" in span}
            rows.append((files, {span for span in spans if ".py" not in span}))
    return rows


def _sources() -> list[tuple[str, str]]:
    """Every ``file: name, name`` or ``file`` of the page, as pairs of a file and one dotted name."""
    sources = []
    for span in _spans(PAGE):
        file, _, names = span.partition(": ")
        if re.fullmatch(r"[\w/]+\.py", file):
            sources += [(file, name) for name in names.split(", ")]
    return sources


def _own(file: str) -> Path:
    return (ROOT if file.startswith(("tests/", "benchmarks/")) else PACKAGE) / file


def _defines(path: Path, name: str) -> bool:
    """Whether a file defines the last part of a dotted name: class, function, variable or key."""
    name = re.escape(name.rpartition(".")[2])
    return bool(re.search(rf"(def|class) {name}\b|^\s*(self\.)?{name}\b\s*[:=]|\"{name}\"", path.read_text(), re.M))


def test_the_walk_finds_what_is_known_to_be_changed() -> None:
    known = {
        ("checkpoint/model_checkpoint.py", "_link_checkpoint"),
        ("fsdp/passes.py", "forward"),
        ("fsdp/passes.py", "register_forward_pre_hook"),
        ("fsdp/state.py", "_training_state"),
        ("layers/recompute.py", "_compiled_call_impl"),
        ("loss.py", "forward"),
        ("tensor_parallel/parameters.py", "__class__"),
        ("trainer/signals.py", "callbacks"),
        ("transformers_adapter/attention_interface.py", "find_packed_sequence_indices"),
        ("transformers_adapter/record.py", "__dict__"),
    }
    assert known <= CHANGED, known - CHANGED


@pytest.mark.parametrize(
    ("statement", "changed"),
    [
        ("module.forward = f", "forward"),
        ("del module.forward", "forward"),
        ("module.__class__ = c", "__class__"),
        ("self.model.forward, x = f", "forward"),
        ("config.a, config.b = before", "a"),
        ("param.count += 1", "count"),
        ("module._parameters[name] = p", "_parameters"),
        ("setattr(module, 'forward', f)", "forward"),
        ("setattr(module, name, f)", "setattr"),
        ("module.register_forward_hook(f)", "register_forward_hook"),
        ("trainer.callbacks.append(c)", "callbacks"),
        ("warnings.filterwarnings('ignore')", "filterwarnings"),
        ("self.forward = f", None),
        ("ctx.saved = x", None),
        ("setattr(self, name, f)", None),
        ("self._found[name] = x", None),
        ("found[name] = x", None),
        ("found.append(x)", None),
    ],
)
def test_what_the_walk_takes_for_a_change(statement: str, changed: str | None) -> None:
    found = {name for node in ast.walk(ast.parse(statement)) if (name := _changed(node))}
    assert changed in found if changed else not found


@pytest.mark.parametrize(("file", "name"), sorted(CHANGED))
def test_every_change_is_on_the_page(file: str, name: str) -> None:
    assert any(file in files and name in says for files, says in _rows()), (
        f"{file} changes {name!r} of an object that is not of the package: say so in {PAGE_NAME}, in a row "
        f"whose first column names `{file}` and `{name}`. If the object is ours, add it to OURS in {__file__}"
    )


def test_every_row_is_about_a_change() -> None:
    rows = _rows()
    assert len(rows) > 40
    for files, says in rows:
        assert any(file in files and name in says for file, name in CHANGED), f"nothing changes {says} in {files}"


def test_what_is_ours_is_still_there() -> None:
    missing = {(file, name) for file, names, _ in OURS for name in names} - _found()
    assert not missing, f"leave out of OURS: {missing}"


@pytest.mark.parametrize("entry", sorted({*PRIVATE, *UNDOCUMENTED}))
def test_every_listed_name_is_on_the_page(entry: str) -> None:
    name = entry.partition(":")[2]
    spans = _spans(NAMES)
    assert any(span == name or span.endswith(f".{name}") for span in spans), f"{PAGE_NAME} lacks `{name}`"


def test_names_are_used_where_the_page_says() -> None:
    entries = {entry.partition(":")[2].rpartition(".")[2] for entry in (*PRIVATE, *UNDOCUMENTED)}
    checked = 0
    for section in NAMES.split("\n### ")[1:]:
        heading, *lines = section.splitlines()
        for line in lines:
            if not line.startswith("|") or "nowhere" in line:
                continue
            names = {span.rpartition(".")[2] for span in _spans(line) if ".py" not in span} & entries
            files = [span for span in _spans(line) if span.endswith(".py")]
            files = files or [span for span in _spans(heading) if span.endswith(".py")]
            used = {name for file in files for name in names if re.search(rf"\b{name}\b", _own(file).read_text())}
            assert used == names, f"{files} do not use {names - used}"
            checked += len(used)
    assert checked > 100


@pytest.mark.parametrize("mark", sorted({mark for marks in MARKS.values() for mark in marks}))
def test_every_mark_is_on_the_page(mark: str) -> None:
    assert mark in _spans(NAMES)


def test_every_private_name_on_the_page_is_known() -> None:
    known = {part for entry in (*PRIVATE, *UNDOCUMENTED) for part in re.split("[.:]", entry)}
    known |= {mark for marks in MARKS.values() for mark in marks}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        known |= set(_defined(tree))
        assigned = [node.value for node in tree.body if isinstance(node, ast.Assign)]
        known |= {str(value.value) for value in assigned if isinstance(value, ast.Constant)}
    names = [span for span in _spans(PAGE) if re.fullmatch(r"[\w.]+", span) and not span.endswith(".py")]
    private = {part for name in names for part in name.split(".") if re.match("_[^_]", part)}
    assert len(private) > 50
    assert private <= known, f"neither in tests/test_private_dependencies.py nor ours: {private - known}"


def test_files_and_functions_of_the_package_exist() -> None:
    own = [(file, name) for file, name in _sources() if file.partition("/")[0] not in LIBRARIES]
    assert len(own) > 100
    for file, name in own:
        path = _own(file)
        assert path.is_file(), f"{PAGE_NAME} names {file}, which does not exist"
        assert not name or _defines(path, name), f"{PAGE_NAME} names {name} in {file}, which is not there"


@pytest.mark.parametrize("library", LIBRARIES)
def test_sources_of_the_libraries_say_what_the_page_says(library: str) -> None:
    sources = [(file, name) for file, name in _sources() if file.partition("/")[0] == library]
    assert sources
    spec = find_spec(library)
    assert spec is not None
    assert spec.origin is not None
    installed = version(library).partition("+")[0]
    if f"{library} {installed}" not in " ".join(PAGE.split()):
        pytest.skip(f"the page is about sources of another version of {library} than {installed}")
    for file, name in sources:
        path = Path(spec.origin).parent.parent / file
        assert path.is_file(), f"{PAGE_NAME} names {file}, which {library} {installed} does not have"
        assert _defines(path, name), f"{PAGE_NAME} names {name} in {file}, which {library} {installed} does not have"
