"""docs/internals.md: what we change or lean on in other libraries is still there, and stands in its tables.

A test `test_some_row` belongs to the row `some-row`. It imports nothing of ours that makes the change, so that it can
say what has gone where ours would only fail.
"""

import ast
import copy
import dataclasses
import importlib
import inspect
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.families import NAMES, batch, make_config, make_model
from helpers.paths import ROOT

PACKAGE, TABLE = ROOT / "src/efficientllm", ROOT / "docs/internals.md"
FAMILIES = pytest.mark.parametrize("name", NAMES)
OURS = {  # files that set attributes of nothing but our own objects, or of ones made for us to set
    "cli.py": "argparse's namespace",
    "delivery/onnx_runtime.py": "onnxruntime's SessionOptions",
    "pruning/scoring.py": "the tracker of units",
    "run/session.py": "the Trainer",
    "terminal/completion.py": "our own parser's actions, for shtab to read",
}


class Target:
    """What a row depends on; every complaint names the row."""

    def __init__(self, row: str) -> None:
        self.row = row

    def fail(self, what: str) -> None:
        pytest.fail(f"{what}: see docs/internals.md, row {self.row}", pytrace=False)

    def needs(self, condition: Any, what: str) -> None:
        if not condition:
            self.fail(what)

    def find(self, path: str) -> Any:
        """Returns what a dotted path names."""
        parts = path.split(".")
        for count in range(len(parts), 0, -1):
            try:
                found: Any = importlib.import_module(".".join(parts[:count]))
            except ModuleNotFoundError:
                continue
            for part in parts[count:]:
                if not hasattr(found, part):
                    self.fail(f"{path} is gone")
                found = getattr(found, part)
            return found
        return self.fail(f"{path} is gone")

    def takes(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """Returns what a path names, if it can be called with such arguments (values do not matter)."""
        found = self.find(path)
        self.accepts(found, path, *args, **kwargs)
        return found

    def accepts(self, function: Callable[..., Any], path: str, *args: Any, **kwargs: Any) -> None:
        signature = inspect.signature(function)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            self.fail(f"{path}{signature} is not called as we call it ({error})")

    def says(self, path: str, words: str) -> None:
        """Needs words in the source of what a path names."""
        self.needs(words in inspect.getsource(self.find(path)), f"{path} says no more '{words}'")


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Target:
    return Target(request.node.originalname.removeprefix("test_").replace("_", "-"))


def norms(model: Any) -> list[tuple[str, Any]]:
    return [(name, each) for name, each in model.named_modules() if "norm" in type(each).__name__.lower()]


# --- changed in place ------------------------------------------------------------------------------------------------


@FAMILIES
def test_loss_forward(name: str, target: Target) -> None:
    model, tokens = make_model(name), batch()
    target.needs(hasattr(model, "model") and hasattr(model, "lm_head"), f"{type(model).__name__} has no model, lm_head")
    target.accepts(type(model).forward, "forward", model, input_ids=tokens, use_cache=False)
    states = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    config = model.config
    logits = states @ model.lm_head.weight.T / getattr(config, "logits_scaling", 1.0)
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    found = model(input_ids=tokens, use_cache=False).logits
    target.needs(torch.allclose(found, logits, atol=1e-5), f"{type(model).__name__} makes its logits in another way")
    model.__dict__["forward"] = lambda **_: "ours"
    target.needs(model(input_ids=tokens) == "ours", "torch.nn.Module does not call the instance's own forward")


@FAMILIES
def test_packed_rows(name: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    where = target.find("transformers.masking_utils")
    target.takes("transformers.masking_utils.find_packed_sequence_indices", position_ids=batch())
    asked = []
    monkeypatch.setattr(where, "find_packed_sequence_indices", asked.append)
    make_model(name).model(input_ids=batch(), use_cache=False)
    target.needs(asked, f"{name} asks no more by masking_utils' global find_packed_sequence_indices")


@FAMILIES
def test_teacher_forward(name: str, target: Target) -> None:
    model = make_model(name)
    states = model.model(input_ids=batch(), use_cache=False).last_hidden_state
    width = model.lm_head.weight.shape[1]
    target.needs(states.shape[-1] == width, f"{type(model.model).__name__} gives no longer what the head reads")
    model.__dict__["forward"] = lambda input_ids: "ours"
    target.needs(model(input_ids=batch()) == "ours", "torch.nn.Module does not call the instance's own forward")


@FAMILIES
def test_layer_forward(name: str, target: Target) -> None:
    model = make_model(name)
    seen = []

    def ours(number: int, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(number)
        return stock(*args, **kwargs)

    for number, layer in enumerate(model.model.layers):
        layer.forward = partial(ours, number, layer.forward)
    model(input_ids=batch(), use_cache=False).logits.sum().backward()
    target.needs(seen == [0, 1], f"{name} does not call the forward of each of model.layers once")
    target.takes("torch.utils.checkpoint.checkpoint", print, 1, use_reentrant=False, context_fn=print)
    target.takes("torch.utils.checkpoint.create_selective_checkpoint_contexts", print)
    target.find("torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE")
    target.find("torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE")
    target.find("torch.compiler.reset")


def test_wrap_logger(target: Target) -> None:
    logger = target.find("torch._higher_order_ops.wrap.log")
    target.needs(logger.name == "torch._higher_order_ops.wrap", f"torch._higher_order_ops.wrap logs as {logger.name}")
    target.says("torch._higher_order_ops.wrap", "context_fn is passed to torch.utils.checkpoint under torch.compile")


def test_dynamo_config(target: Target) -> None:
    name = "torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint"
    target.needs(isinstance(target.find(name), bool), f"{name} is no switch")


@FAMILIES
def test_stream_hooks(name: str, target: Target) -> None:
    for path, module in make_model(name).named_modules():
        if not isinstance(module, nn.Linear) and any(True for _ in module.parameters(recurse=False)):
            known = isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
            target.needs(known, f"{name}: '{path}' is neither embedding nor norm ({type(module).__name__})")
    target.needs(not torch.is_autocast_enabled("cpu"), "torch.is_autocast_enabled(device) answers something else")
    target.needs(torch.get_autocast_dtype("cpu") == torch.bfloat16, "torch.get_autocast_dtype(device) is another")


def test_parameter_data(target: Target) -> None:
    param = nn.Parameter(torch.ones(3))
    param.data = param.data.to(torch.bfloat16)
    target.needs(param.dtype == torch.bfloat16 and param.is_leaf, "Parameter.data takes no other dtype")


def test_save_pretrained(target: Target, tmp_path: Path) -> None:
    model_class = target.find("transformers.PreTrainedModel")
    target.needs("save_pretrained" in vars(model_class), "transformers.PreTrainedModel.save_pretrained is gone")
    target.takes("transformers.PreTrainedModel.save_pretrained", None, "folder", max_shard_size="1GB")
    target.says("transformers.Trainer._save", ".save_pretrained(")
    model, called = make_model("llama"), []
    model.__dict__["save_pretrained"] = called.append
    model.save_pretrained(tmp_path)
    target.needs(called == [tmp_path], "a model's own save_pretrained is not called before its class's")


@FAMILIES
def test_norm_epsilon(name: str, target: Target) -> None:
    model = make_model(name)
    for path, norm in norms(model):
        found = [each for each in ("variance_epsilon", "eps") if hasattr(norm, each)]
        target.needs(len(found) == 1, f"{name}: '{path}' ({type(norm).__name__}) has {found or 'no'} epsilon")
        X = torch.rand(4, len(norm.weight), dtype=torch.float64)
        was = norm(X)
        setattr(norm, found[0], torch.tensor(getattr(norm, found[0]), dtype=torch.float64))
        target.needs(torch.equal(norm(X), was), f"{name}: '{path}' takes no tensor for its {found[0]}")
        getattr(norm, found[0]).fill_(3.0)
        target.needs(not torch.allclose(norm(X), was), f"{name}: '{path}' does not read its {found[0]}")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("gemma")])
def test_embed_scale(name: str, target: Target) -> None:
    embedding = make_model(name).get_input_embeddings()
    for attribute in ("scalar_embed_scale", "embed_scale"):
        target.needs(hasattr(embedding, attribute), f"{name}'s {type(embedding).__name__} has no {attribute}")
    was = embedding(batch())
    embedding.embed_scale.fill_(2 * embedding.scalar_embed_scale)
    target.needs(torch.allclose(embedding(batch()), 2 * was), f"{name} does not multiply by embed_scale")


@FAMILIES
def test_kept_inputs(name: str, target: Target) -> None:
    model, empty = make_model(name), []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.kept_inputs = []
            module.register_forward_pre_hook(lambda module, args, path=path: None if args else empty.append(path))
    model(input_ids=batch(), use_cache=False)
    target.needs(not empty, f"{name} gives '{(empty or [''])[0]}' its input by name, not by place")
    module.__dict__.pop("kept_inputs")
    target.needs(not hasattr(module, "kept_inputs"), "torch.nn.Module keeps plain attributes elsewhere")


def test_optimizer_hooks(target: Target) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    calls: list[str] = []

    def before(given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target.needs(given is optimizer and args[0] is optimizer, "a pre-hook gets the optimizer in another place")
        return args[:1], {**kwargs, "closure": lambda: calls.append("closure")}

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step(lambda: calls.append("not this"))
    target.needs(calls == ["closure", "after"], f"an optimizer's step calls its hooks otherwise ({calls})")


def test_optimizer_state(target: Target) -> None:
    old = nn.Parameter(torch.ones(4, 2))
    optimizer = torch.optim.AdamW([old], fused=True)
    old.grad = torch.ones_like(old)
    optimizer.step()
    state = optimizer.state.pop(old)
    alike = {name for name, tensor in state.items() if tensor.shape == old.shape}
    target.needs(alike == {"exp_avg", "exp_avg_sq"}, f"AdamW keeps {sorted(alike)} in its parameter's shape")
    new = nn.Parameter(torch.ones(3, 2))
    optimizer.state[new] = {name: value[:3] if name in alike else value for name, value in state.items()}
    optimizer.param_groups[0]["params"] = [new]
    new.grad = torch.ones_like(new)
    optimizer.step()
    target.needs(float(optimizer.state[new]["step"]) == 2 and bool((new < 1).all()), "AdamW does not go on with it")


def test_parameters(target: Target) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    old = model[0].weight
    model(torch.arange(5)).sum().backward()
    new = nn.Parameter(torch.ones(5, 3))
    old.data, old.grad = old.data.new_empty(0), None
    for module in model:
        setattr(module, "weight", new)  # noqa: B010
    target.needs([name for name, _ in model.named_parameters()] == ["0.weight"], "a tied parameter comes twice")
    model(torch.arange(5)).sum().backward()
    target.needs(new.grad is not None, "a replaced parameter gets no gradient")


@FAMILIES
def test_module_sizes(name: str, target: Target) -> None:
    model = make_model(name)
    attention = model.model.layers[0].self_attn
    linear, embedding = model.lm_head, model.get_input_embeddings()
    for module, attributes in (
        (attention, ("num_key_value_groups",)),
        (linear, ("in_features", "out_features")),
        (embedding, ("embedding_dim",)),
    ):
        for attribute in attributes:
            found = isinstance(getattr(module, attribute, None), int)
            target.needs(found, f"{type(module).__name__}.{attribute} is gone")


@FAMILIES
def test_config_fields(name: str, target: Target) -> None:
    config = make_config(name)
    for field in (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "num_hidden_layers", "rms_norm_eps",
    ):  # fmt: skip
        target.needs(hasattr(config, field), f"{type(config).__name__}.{field} is gone")
        setattr(config, field, 1 if field != "rms_norm_eps" else 0.5)
        target.needs(
            config.to_dict().get(field) == getattr(config, field), f"{type(config).__name__} does not save {field}"
        )


def test_layer_configs(target: Target) -> None:
    for name in ("per_layer_config", "is_heterogeneous", "allow_global_per_layer_attribute_access"):
        target.find(f"transformers.PreTrainedConfig.{name}")
    config = make_config("llama")
    config.per_layer_config = {0: {"num_attention_heads": 4}, 1: {"num_attention_heads": 2}}
    heads = [each.num_attention_heads for each in config.per_layer_config]
    target.needs(config.is_heterogeneous and heads == [4, 2], "per_layer_config does not give each layer its own")
    config.allow_global_per_layer_attribute_access = True
    _ = config.num_attention_heads
    config.per_layer_config = None
    target.needs(not config.is_heterogeneous, "per_layer_config = None does not make layers alike")


def test_llama_class(target: Target, tmp_path: Path) -> None:
    target.find("transformers.MistralForCausalLM")
    llama, mistral = make_model("llama"), make_model("mistral", sliding_window=None)
    target.needs(llama.state_dict().keys() == mistral.state_dict().keys(), "Llama and Mistral have other keys")
    was = llama(input_ids=batch(), use_cache=False).logits
    llama.__class__ = type(mistral)
    for module in llama.modules():
        if getattr(module, "config", None) is llama.config and module is not llama:
            module.config = mistral.config
    llama.config = mistral.config
    found = llama(input_ids=batch(), use_cache=False).logits
    target.needs(torch.equal(was, found), "a Llama under Mistral's name is another function")
    config = make_config("llama")
    config.hidden_size = 25
    try:
        config.save_pretrained(tmp_path)
    except Exception:
        return
    target.fail("LlamaConfig accepts hidden sizes that its heads do not divide; the detour by Mistral may go")


def test_layer_class(target: Target, tmp_path: Path) -> None:
    model = make_model("llama")
    model.__class__ = type("Other", (type(model),), {"__module__": __name__})
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["architectures"]
    target.needs(written == ["Other"], f"save_pretrained writes {written} for the class of a model")


@FAMILIES
def test_layer_build(name: str, target: Target) -> None:
    model = make_model(name)
    target.needs(target.find("transformers.PreTrainedModel._auto_class") is None, "PreTrainedModel._auto_class is set")
    target.says("transformers.PreTrainedModel.save_pretrained", "custom_object_save(")
    target.takes("transformers.PreTrainedModel.set_attn_implementation", model, "eager")
    target.find("transformers.PreTrainedModel.post_init")
    layer = model.model.layers[0]
    target.accepts(type(layer), type(layer).__name__, model.config, 0)
    target.needs(hasattr(model.model, "rotary_emb"), f"{type(model.model).__name__} has no rotary_emb")


def test_attention_choice(target: Target) -> None:
    model = make_model("llama")
    target.needs(isinstance(model.config._attn_implementation, str), "PreTrainedConfig._attn_implementation is gone")
    again = type(model.config).from_dict(model.config.to_dict())
    again._attn_implementation = "eager"
    target.needs(again._attn_implementation == "eager", "PreTrainedConfig._attn_implementation cannot be set")


@FAMILIES
def test_depth_layers(name: str, target: Target) -> None:
    model = make_model(name)
    seen = []

    def look(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append((args[0].shape, (output[0] if isinstance(output, tuple) else output).shape))

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(look)
        known = [each.layer_idx for each in layer.modules() if hasattr(each, "layer_idx")]
        target.needs(known and set(known) == {number}, f"{name}: modules of layer {number} have layer_idx {known}")
    model(input_ids=batch(), use_cache=False)
    target.needs(seen and all(x == y for x, y in seen), f"{name}'s layers take or give hidden states in another way")


def test_found_inf(target: Target) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([param], fused=True)
    for skipped, steps in ((0.0, 1), (1.0, 1), (0.0, 2)):
        before = param.detach().clone()
        param.grad = torch.ones(3)
        optimizer.found_inf = torch.tensor(skipped)
        optimizer.step()
        same = torch.equal(param.detach(), before) == bool(skipped)
        same &= float(optimizer.state[param]["step"]) == steps
        target.needs(same, f"torch.optim.AdamW(fused=True) does not heed its found_inf of {skipped:g}")


def test_fsdp_parameters(target: Target) -> None:
    target.says("torch.distributed.fsdp.FSDPModule._apply", "reset_sharded_param")
    target.takes("torch.distributed.fsdp.FSDPModule.set_requires_all_reduce", None, True)
    target.takes("torch.distributed.tensor.DTensor.from_local", 1, 2, 3, run_check=False, shape=1, stride=1)
    target.takes("torch.distributed.tensor.distribute_tensor", 1, 2, 3, src_data_rank=None)
    target.takes("transformers.PreTrainedModel.tie_weights", None)
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    target.needs(tensor.untyped_storage().nbytes() == 0, "a storage cannot be emptied")


def test_library_logs(target: Target) -> None:
    target.takes("transformers.utils.logging.set_verbosity_error")
    target.takes("transformers.utils.logging.disable_progress_bar")
    name = target.find("huggingface_hub.file_download.logger").name
    target.needs(name.startswith("huggingface_hub."), f"huggingface_hub logs as {name}")


def test_warning_filters(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", FutureWarning)
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: shown.append(str(message)))
        warnings.warn("silent", FutureWarning, stacklevel=1)
        warnings.warn("told", UserWarning, stacklevel=1)
    target.needs(shown == ["told"], f"Python shows {shown} by warnings.showwarning")


def test_checkpoint_warning(target: Target) -> None:
    words = "torch.distributed is disabled, unavailable or uninitialized"
    target.says("torch.distributed.checkpoint.state_dict_saver", words)
    target.says("torch.distributed.checkpoint.state_dict_loader", words)


def test_grain_jax(target: Target) -> None:
    logger = target.find("absl.logging.get_absl_logger")()
    target.needs(logger.name == "absl", f"absl logs as {logger.name}")
    file = Path(target.find("grain").__file__).parent / "_src/core/profiler.py"
    target.needs(file.is_file() and "jax profiler" in file.read_text(), "grain says no more 'jax profiler'")


def test_onnx_quiet(target: Target) -> None:
    logging.disable(logging.WARNING)
    try:
        silent = [
            logging.getLogger(name).isEnabledFor(logging.WARNING) for name in ("torch.onnx", "transformers", "onnx_ir")
        ]
    finally:
        logging.disable(logging.NOTSET)
    target.needs(not any(silent), "logging.disable leaves the exporter's loggers on")


def test_harness_log(target: Target) -> None:
    pytest.importorskip("lm_eval")
    target.says("lm_eval.models.huggingface", "Combined length of context")
    name = target.find("lm_eval.models.huggingface.eval_logger").name
    target.needs(name.startswith("lm_eval."), f"lm_eval logs as {name}")
    for function in ("are_progress_bars_disabled", "disable_progress_bars", "enable_progress_bars"):
        target.takes(f"datasets.{function}")


def test_llama_cpp_process(target: Target) -> None:
    pytest.importorskip("llama_cpp")
    target.takes("llama_cpp._logger.set_verbose", False)
    target.takes("llama_cpp.llama_model_quantize_default_params")


# --- leaned on -------------------------------------------------------------------------------------------------------


def test_compile_fx(target: Target) -> None:
    target.takes("torch._inductor.compile_fx.compile_fx", "graph", ["inputs"])


def test_products(target: Target) -> None:
    registry = target.find("torch.utils.flop_counter.flop_registry")
    for op in ("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention"):
        target.needs(getattr(torch.ops.aten, op) in registry, f"flop_registry has no aten.{op}")
    target.find("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu")


def test_deep_copies(target: Target) -> None:
    linear = nn.Linear(2, 3)
    other = nn.Parameter(torch.zeros(3, 2, device="meta"))
    memo = {id(linear.weight): other, id(linear.bias): linear.bias}
    found = copy.deepcopy(linear, memo)
    kept = found.weight is other and found.bias is linear.bias
    target.needs(kept, "copy.deepcopy of a module copies parameters that its memo has")


def test_build_from_config(target: Target) -> None:
    config = make_config("qwen3")
    for path in ("transformers.Qwen3ForCausalLM._from_config", "transformers.AutoModelForCausalLM.from_config"):
        built = target.find(path)(config, dtype=torch.float64)
        target.needs(built.dtype == torch.float64, f"{path} takes no dtype")
    mapping = target.find("transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING")
    names = target.find("transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    target.needs(mapping[type(config)].__name__ == names[config.model_type], "the mappings disagree on a model's class")


def test_harness_model(target: Target) -> None:
    pytest.importorskip("lm_eval")
    target.takes("lm_eval.models.huggingface.HFLM._model_call", None, batch())
    target.takes("lm_eval.models.huggingface.HFLM.loglikelihood", None, [], disable_tqdm=True)
    target.takes("lm_eval.models.huggingface.HFLM", pretrained=1, tokenizer=1, batch_size=1)
    target.says("lm_eval.models.huggingface.HFLM", "self._model_call(")


def test_onnx_exporter(target: Target) -> None:
    pytest.importorskip("onnxscript")
    config = target.find("transformers.exporters.exporter_onnx.OnnxConfig")
    target.needs("dynamic" in {field.name for field in dataclasses.fields(config)}, "OnnxConfig has no dynamic")
    target.takes("transformers.exporters.exporter_onnx.OnnxExporter.export", None, 1, {}, config=1)


# --- the tables ------------------------------------------------------------------------------------------------------


def rows() -> dict[str, list[str]]:
    """Returns the cells of every row of both tables, by its name."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {first.strip(): rest for first, *rest in cells if first.strip() != "row"}


def held(document: str) -> tuple[set[str], set[str]]:
    """Returns the paths that stand in backquotes of a text: of sources, and of tests with a name or without."""
    words = re.findall(r"`([^`\s]+)`", document)
    return {word for word in words if re.fullmatch(r"[\w/]+\.py", word) and not word.startswith("tests/")}, {
        word for word in words if word.startswith("tests/")
    }


def changes(tree: ast.AST) -> list[str]:
    """Returns every assignment to an attribute of an object that is not `self`, every hook, filter and `setattr`."""
    found = []
    for node in ast.walk(tree):
        places: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            for place in node.targets:
                places += place.elts if isinstance(place, ast.Tuple) else [place]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            places = [node.target]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            last = name.rpartition(".")[2]
            if re.fullmatch(
                r"setattr|register_\w*hook|filterwarnings|simplefilter|set_verbosity_\w+|disable_progress_bars?", last
            ):
                found.append(name)
            if re.search(r"(getLogger\(.*\)|logger|logging)\.(setLevel|add\w+|disable)$", name):
                found.append(name)
        for place in places:
            owner = place.value if isinstance(place, ast.Attribute | ast.Subscript) else None
            whole = isinstance(place, ast.Attribute) and not (
                isinstance(owner, ast.Name) and owner.id in ("self", "ctx")
            )
            inside = isinstance(place, ast.Subscript) and isinstance(owner, ast.Attribute)
            if whole or (inside and not ast.unparse(place).startswith("self.")):
                found.append(ast.unparse(place))
    return found


def test_every_row_has_its_test_and_every_test_its_row() -> None:
    after = [
        name
        for name, each in vars(sys.modules[__name__]).items()
        if name.startswith("test_") and "target" in str(inspect.signature(each))
    ]
    tested = {name.removeprefix("test_").replace("_", "-") for name in after}
    assert len(tested) > 30 and tested == set(rows())


def test_what_the_tables_name_exists() -> None:
    for name, cells in rows().items():
        assert len(cells) in (5, 6), name
        sources, _ = held(cells[0])
        assert sources, name
        _, tests = held(cells[-1])
        assert tests, name
        for source in sources:
            assert (PACKAGE / source).is_file(), f"row {name}: no {source}"
        for test in tests:
            file, _, function = test.partition("::")
            assert f"def {function}(" in (ROOT / file).read_text() or not function, f"row {name}: no {test}"


def test_the_versions_are_those_that_are_installed_by_constraints() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name, cells in rows().items():
        for checked in cells[-2].split(", "):
            library, _, version = checked.partition(" ")
            if library != "Python":
                assert pinned.get(library) == version, f"row {name}: {checked}; read it again for {pinned.get(library)}"


def test_no_file_changes_other_libraries_without_a_row() -> None:
    named = set().union(*(held(cells[0])[0] for cells in rows().values()))
    changing = {str(file.relative_to(PACKAGE)): changes(ast.parse(file.read_text())) for file in PACKAGE.rglob("*.py")}
    found = {name for name, each in changing.items() if each}
    assert len(found) > 20
    missing = {name: changing[name][:3] for name in sorted(found - named - OURS.keys())}
    assert not missing, f"not in docs/internals.md: {missing}"
