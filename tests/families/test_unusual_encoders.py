"""Encoders with attention code, widths or layers of their own: MPNet, X-MOD, ESM, ALBERT, MobileBERT."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers

import hf_efficient as he
from hf_efficient.conversion.inspect import inspect_checkpoint
from hf_efficient.families import HostModel
from hf_efficient.families.probe import probe_inputs
from hf_efficient.patching.mask_facts import padding_of
from hf_efficient.testing import assert_close, check, tiny_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mpnet": ("mpnet", {}),
    "xmod, norms in front": ("xmod", {"pre_norm": True, "languages": ["de_DE", "en_XX"]}),
    "esm, rotary": ("esm", {"position_embedding_type": "rotary"}),
    "esm, table": ("esm", {}),
    "albert": ("albert", {"num_hidden_groups": 1, "embedding_size": 16}),
    "mobilebert, without bottlenecks": ("mobilebert", {"use_bottleneck": False, "intra_bottleneck_size": 32}),
}


def made(name: str) -> Any:
    model_type, overrides = MODELS[name]
    model = tiny_model(model_type, **overrides).base_model
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_global_rows_start_as_the_layers_own(name: str):
    """They are projected by the mechanism, from the states that the layer gets and as the host scales them."""
    model = made(name)
    inputs = probe_inputs(model, 24)
    real, marked = inputs["attention_mask"].bool(), torch.zeros(2, 24, dtype=torch.long)
    expected = model(**inputs).last_hidden_state
    marked[:, [0, 5]] = 1
    named = {"global_attention_mask": marked}
    options, asked = ({"global_tokens": "first"}, {}) if name == "esm, rotary" else ({}, named)
    with he.patch_attention(model, "longformer", attention_window=64, **options):
        assert_close(model(**inputs, **asked).last_hidden_state[real], expected[real], 1e-5)
    with he.patch_attention(model, "longformer", attention_window=4, **options):
        some = model(**inputs, **asked).last_hidden_state
    with he.patch_attention(model, "local", attention_window=4):
        none = model(**inputs).last_hidden_state
    assert (some - none)[real].abs().max() > 1e-3, "global tokens change nothing"


def test_a_check_of_both_position_schemes(tmp_path):
    """The shared test sees the one that is the default of the config."""
    model = made("esm, table")
    model.save_pretrained(tmp_path)
    told = inspect_checkpoint(str(tmp_path))
    assert told["max_positions"] == HostModel.of(model).max_positions
    assert {"local", "longformer"} <= {fit["mechanism"] for fit in told["mechanisms"] if fit["possible"]}
    check._longer(model)
    model = made("esm, rotary")
    check._exact_and_different(model)
    with pytest.raises(ValueError, match="no rope_parameters to scale them: leave it out"):
        he.convert(model, "local", attention_window=8, max_positions=4000)


@torch.no_grad()
def test_mpnet_is_swapped_and_back():
    model = made("mpnet")
    inputs = probe_inputs(model, 40)
    expected = model(**inputs).last_hidden_state
    classes, attributes = [type(m) for m in model.modules()], model.encoder.layer[0].attention.attn.__dict__.keys()
    converted = he.convert(model, "local", attention_window=8, layers=[1]).model
    assert (converted(**inputs).last_hidden_state - expected).abs().max() > 1e-3
    again = pickle.loads(pickle.dumps(copy.deepcopy(converted)))
    assert torch.equal(again(**inputs).last_hidden_state, converted(**inputs).last_hidden_state)
    he.revert(model)
    assert [type(m) for m in model.modules()] == classes
    assert model.encoder.layer[0].attention.attn.__dict__.keys() == attributes
    assert torch.equal(model(**inputs).last_hidden_state, expected)
    with pytest.raises(ValueError, match="no layer of the model's own around"):
        he.upcycle(model, 2)


def test_threads_that_share_a_model_have_their_own_global_tokens():
    """MPNet hands its layers no keywords, so they are kept beside the call."""
    model = he.convert(made("mpnet"), "longformer", attention_window=4).model
    calls = [
        {"input_ids": torch.arange(5, 25)[None] + n, "global_attention_mask": torch.eye(20)[[n]].long()}
        for n in range(4)
    ]

    @torch.no_grad()
    def states(call):
        return model(**call).last_hidden_state

    alone = [states(call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            assert all(map(torch.equal, pool.map(states, calls), alone))


@torch.no_grad()
def test_mpnet_that_never_had_an_original_goes_back_to_its_own_code():
    """Stock MPNet can't use the masks of transformers' SDPA."""
    model = made("mpnet")
    config = he.convert(copy.deepcopy(model), "local", attention_window=8).model.config
    del config.efficient_source
    new = transformers.AutoModel.from_config(config).eval()
    new.load_state_dict(model.state_dict(), strict=False)  # it has a pooler, too
    inputs = probe_inputs(model, 24)
    assert torch.equal(he.revert(new)(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_layers_that_share_a_module_are_converted_together():
    model = tiny_model("albert", layers=3, num_hidden_groups=1)
    with pytest.raises(ValueError, match=r"layers=\[0\]: 3 layers of this albert model share one module"):
        he.convert(model, "local", attention_window=8, layers=[0])
    check._exact_and_different(model)
    apart = tiny_model("albert", layers=2, num_hidden_groups=2)
    assert he.convert(apart, "local", attention_window=8, layers=[1]).model.config.efficient_attention[0][
        "layers"
    ] == [1]


@pytest.mark.parametrize("name, options", [("longformer", {"attention_window": 8}), ("longt5", {})])
def test_values_from_other_states_than_keys_are_refused_where_they_would_be_projected(name, options):
    model = tiny_model("mobilebert")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="projects values from other states than queries and keys"):
        he.convert(model, name, **options)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_masks_over_keys_that_a_host_makes_itself():
    """LayoutLM adds the smallest number that there is, MarkupLM -10,000; what does more than hide keys stays as it is."""
    mask = torch.zeros(2, 1, 1, 5)
    mask[1, 0, 0, 3:] = -10000.0
    found = padding_of(mask)
    assert found is not None and found.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    mask[0, 0, 0, 1] = -1.0
    assert padding_of(mask) is mask and padding_of(None) is None
    of_pairs = torch.zeros(2, 1, 5, 5)
    assert padding_of(of_pairs) is of_pairs
