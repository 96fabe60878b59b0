"""What the project runs for each of its model families, for a family of anybody."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor

from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.attention.base.registry import attention_config, get_mechanism, list_mechanisms
from hf_efficient.conversion.convert import convert
from hf_efficient.families import HostModel, ModelFamily
from hf_efficient.families.probe import probe_inputs, real_part, token_outputs
from hf_efficient.models.in_place import revert
from hf_efficient.patching.install import plan
from hf_efficient.patching.temporary import patch_attention
from hf_efficient.testing.tiny import assert_close, random_model, tiny_model

LENGTH, TOLERANCE = 40, 1e-5
WIDE, NARROW = 2**10, 4
"""Windows over all tokens of any of these inputs, of pictures too, and over few."""


def check_family(family: ModelFamily, tiny_config: Any = None) -> dict[str, str]:
    """Assert that models of a registered family are converted exactly, reversibly and without silent differences.

    Checks the exact limit, padding on both sides, causality by gradient, decoding with and without a cache, saving and
    loading through the Auto classes, undoing bit by bit, longer inputs, low-rank adapters, and every mechanism.

    Args:
        family: registered with `register_family` or by an entry point.
        tiny_config: config of a small model with 64 or more positions; `None` = `tiny_model(family.model_type)`.

    Returns:
        {mechanism: "possible", or the reason why not}.

    Raises:
        AssertionError: names the check.
    """

    def make() -> Any:
        return tiny_model(family.model_type) if tiny_config is None else random_model(copy.deepcopy(tiny_config))

    _exact_and_different(make())
    _causality(make())
    _saved_and_undone(make())
    _decoding(make())
    _longer(make())
    _adapters(make())
    return _mechanisms(make())


def _inputs(model: Any, side: str = "right") -> dict[str, Tensor]:
    inputs = probe_inputs(model, LENGTH)
    if side == "left" and "attention_mask" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    return inputs


@torch.no_grad()
def _run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)
    return token_outputs(model(**inputs))


def _side(model: Any) -> str:
    sides = {stack.side for stack in HostModel.of(model).stacks}
    assert sides, "the family finds no self-attention in this model"
    return "both" if len(sides) == 2 else sides.pop()


def _exact_and_different(model: Any) -> None:
    for padding in ("right", "left"):
        inputs = _inputs(model, padding)
        model.set_attn_implementation("eager")
        expected = _run(model, inputs)
        for window in (WIDE, NARROW):
            with patch_attention(model, "local", attention_window=window, side=_side(model)):
                actual = _run(model, inputs)
            actual, source = (real_part(x, inputs) for x in (actual, expected))
            if window == WIDE:
                assert_close(actual, source, TOLERANCE, f"exact limit, padding on the {padding}")
            else:
                assert (actual - source).abs().max() > 1e-3 * source.abs().max(), "a small window changes nothing"


def _causality(model: Any) -> None:
    """No output may depend on a later input, in models whose layers are all causal."""
    host = HostModel.of(model)
    facts = [host.family.geometry(stack, layer) for stack in host.stacks for layer in stack.layers]
    if not all(fact.is_causal for fact in facts) or model.main_input_name != "input_ids":
        return
    table = model.get_input_embeddings()
    ids = probe_inputs(model, LENGTH)["input_ids"][:1]
    embedded = table(ids).detach().requires_grad_()
    # not by inputs_embeds, which some models do not take
    hook = table.register_forward_hook(lambda *call: embedded)
    with patch_attention(model, "local", attention_window=WIDE):
        out = token_outputs(model(input_ids=ids))
    hook.remove()
    (gradient,) = torch.autograd.grad(out[0, LENGTH // 2, 0], embedded)
    assert gradient[0, : LENGTH // 2 + 1].abs().max() > 0 and not gradient[0, LENGTH // 2 + 1 :].any(), (
        "an output depends on later inputs"
    )


def _saved_and_undone(model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs, cls = _inputs(model), type(model)
    expected = _run(model, inputs)
    result = convert(model, "local", attention_window=NARROW, side=_side(model))
    converted = _run(result.model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        result.save(folder + "/saved")
        loaded = type(result.model).from_pretrained(folder + "/saved").eval()
        for parameter in loaded.parameters():  # mapped files align weights otherwise, which rounds products otherwise
            parameter.data = parameter.data.clone()
        through_auto = transformers.AutoModel.from_pretrained(folder + "/saved")
        assert type(through_auto).__module__ == "hf_efficient.models", "AutoModel gives a stock model"
    kept, state = loaded.state_dict(), result.model.state_dict()
    assert type(loaded) is type(result.model) and kept.keys() == state.keys(), "saved and loaded: other tensors"
    assert all(torch.equal(kept[name], tensor) for name, tensor in state.items()), "saved and loaded: other values"
    # products of grouped experts round by how their weights lie in memory
    assert_close(_run(loaded, inputs), converted, TOLERANCE / 10, "saved and loaded")
    undone = revert(result.model)
    assert type(undone) is cls
    after = undone.state_dict()
    assert after.keys() == before.keys(), "revert: other tensors"
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "revert: other values"
    assert torch.equal(_run(undone, inputs), expected), "revert: other outputs"


def _decoding(model: Any) -> None:
    host = HostModel.of(model)
    is_causal = any(host.family.is_causal(stack, layer) for stack in host.stacks for layer in stack.layers)
    if not (model.can_generate() and is_causal):
        return  # what sees later tokens, as BertGeneration does without is_decoder, has no use for a cache
    prompt = {k: v[:1] for k, v in probe_inputs(model, LENGTH // 2).items() if not k.startswith("decoder")}
    options: dict[str, Any] = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    expected = model.generate(**prompt, **options)
    for window in (2 * WIDE, NARROW):
        with patch_attention(model, "local", attention_window=window, side=_side(model)):
            with_cache, without = (model.generate(**prompt, use_cache=cache, **options) for cache in (True, False))
        assert torch.equal(with_cache, without), (
            f"attention_window={window}: decoding with a cache and without differs"
        )
        assert window == NARROW or torch.equal(with_cache, expected), "decoding in the exact limit"


def _longer(model: Any) -> None:
    """More positions serve longer inputs, and go away again; or are refused."""
    host = HostModel.of(model)
    before, state = host.max_positions, {k: v.clone() for k, v in model.state_dict().items()}
    try:
        result = convert(model, "local", attention_window=NARROW, max_positions=4 * (before or LENGTH))
    except ValueError:
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), "a refusal changed the model"
        return
    if before is not None and model.main_input_name == "input_ids":
        assert _run(result.model, probe_inputs(model, before + 8)).isfinite().all()
    revert(result.model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), "revert from more positions"


def _adapters(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = convert(model, "local", attention_window=NARROW, side=_side(model)).model
    # some routers are linear layers with other outputs, so not all of them are adapted where projections are known
    targets: Any = list(dict.fromkeys(part.rpartition(".")[2] for part in HostModel.of(model).family.projections))
    adapted = get_peft_model(model, LoraConfig(target_modules=targets or "all-linear"))
    token_outputs(adapted(**_inputs(model))).float().pow(2).mean().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and any(p.grad is not None and p.grad.abs().max() > 0 for p in trained), "adapters get no gradient"


def _mechanisms(model: Any) -> dict[str, str]:
    """Each is possible with its exact options or at default ones, or refused with a reason."""
    host = HostModel.of(model)
    found: dict[str, str] = {}
    stack = host.stacks[0]
    geometry: AttentionGeometry = host.family.geometry(stack, stack.layers[0])
    for name in list_mechanisms():
        default = attention_config(name)
        exact = get_mechanism(name).exact_config(default, geometry, LENGTH)
        try:
            plan(host, [default if exact is None else exact])
            found[name] = "possible"
        except ValueError as error:
            found[name] = str(error)
            assert len(found[name]) > 40, f"{name} is refused without a reason"
    return found
