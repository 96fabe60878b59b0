"""PEFT finds the same layers in an Efficient model as in its stock form, without being told which."""

from __future__ import annotations

import json

import fresh
import peft
import pytest
import torch
from pairs import MAIN, each
from peft.utils import constants

import hf_efficient as he
from hf_efficient.models.registry import CONFIGS
from hf_efficient.testing import FAMILIES, inputs_for, tiny_model

TABLES = {name: table for name, table in vars(constants).items() if name.endswith("_MAPPING")}
LOOK = """
import json
from hf_efficient.models.registry import CONFIGS
from peft.utils import constants
tables = {name: table for name, table in vars(constants).items() if name.endswith("_MAPPING")}
print(json.dumps({f"{name} {stock}": [table[stock], table.get(config.model_type)]
                  for name, table in tables.items() for stock, config in CONFIGS.items() if stock in table}))
"""
IMPORTS = {
    # the server of fresh processes has imported it with the Trainer
    "after": "import sys\nfor name in [name for name in sys.modules if name.partition('.')[0] == 'peft']:\n"
    "    del sys.modules[name]\nimport hf_efficient\nassert 'peft' not in sys.modules\nimport peft",
    "before": "import peft, hf_efficient",
    "its tables first": "import hf_efficient, peft.utils.constants",
}


@pytest.mark.parametrize("order", IMPORTS)
def test_every_table_knows_every_model_type_whichever_is_imported_first(order):
    done = fresh.python("-c", IMPORTS[order] + LOOK)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 30
    assert {entry: targets for entry, targets in found.items() if targets[0] != targets[1]} == {}


@each(MAIN)
def test_targets_are_those_of_the_stock_model(pair):
    """No child of a mechanism has a name that one of PEFT's tables means for the host."""

    def targets(model):
        names = [name for name, _ in model.named_modules()]
        return {
            table: sorted(name for name in names if any(f".{name}".endswith(f".{target}") for target in entries[kind]))
            for table, entries in TABLES.items()
            if (kind := model.config.model_type) in entries
        }

    stock = targets(pair.model())
    assert stock
    assert targets(he.convert(pair.model(), pair.config).model) == stock


@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_without_named_targets_train(family, method):
    model = he.convert(tiny_model(family), "local", attention_window=8).model
    inputs = inputs_for(model, batch=2, length=24)
    adapted = peft.get_peft_model(model, getattr(peft, method)())
    adapted(**inputs, labels=inputs.get("decoder_input_ids", inputs["input_ids"])).loss.backward()
    trained = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(grad is not None and torch.isfinite(grad).all() for grad in trained.values())


def test_there_is_a_table_for_each_tested_model_type():
    known = {kind for table in TABLES.values() for kind in table}
    assert {CONFIGS[family].model_type for family in FAMILIES} <= known
