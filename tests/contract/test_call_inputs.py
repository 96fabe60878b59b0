"""Whatever form the inputs of a call have: they mean what they mean in (B, N) form, or one sentence refuses them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pairs import MAIN, Pair, each
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import hf_efficient as he
from hf_efficient.models.registry import MODELS
from hf_efficient.testing import BERT_LIKE, inputs_for, tiny_model

ROWS, LENGTH = 3, 20


def wrong_forms(mask: Tensor) -> list[tuple[Any, str]]:
    """Forms of a (B, N) mask that no call can mean, and what is said of them."""
    rows, length = mask.shape
    fitting = rf"must be \({rows}, {length}\) or \(1, {length}\)"
    return [
        (mask[: rows - 1], fitting),
        (mask.repeat(2, 1)[: rows + 1], fitting),
        (torch.cat([mask, mask[:, :1]], dim=1), fitting),
        (mask[0], fitting),
        (mask.tolist(), "is a list: give a tensor"),
        (mask[:, None].expand(-1, length, -1), "of shape"),
        (mask + 1, "has the value 2"),
        ((mask - 1) * 10000.0, "has the value -10000"),
        ((mask - 1).float() * float("inf"), "has the value"),
    ]


def call(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


# ---- masks -------------------------------------------------------------------------------------------------------


@each(MAIN)
def test_a_mask_of_one_row_serves_all_and_other_forms_are_refused(pair: Pair) -> None:
    model = pair.model(layers=1, positions=32)
    inputs = inputs_for(model, ROWS, LENGTH, padded=False)
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[:, :5] = 0
    with pair.patch(model):
        for name in [name for name in inputs if name.endswith("attention_mask")]:
            expected = call(model, inputs | {name: mask.expand(ROWS, -1)})
            for form in (mask, mask.bool(), mask.float(), mask.bool().expand(ROWS, -1)):
                assert torch.equal(call(model, inputs | {name: form}), expected), f"{name}: {form.dtype}"
            for form, message in wrong_forms(mask.expand(ROWS, -1)):
                with pytest.raises(ValueError, match=f"^{name} .*{message}"):
                    model(**inputs | {name: form})
            with pytest.raises(ValueError, match=f"{name} has the value 0 everywhere"):
                model(**inputs | {name: torch.zeros(ROWS, LENGTH)})


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_global_mask_of_one_row_serves_all_and_other_forms_are_refused(family: str, count: int) -> None:
    """With more global tokens than a head is wide, their attention is computed in another way."""
    model = tiny_model(family, layers=1)
    inputs = inputs_for(model, ROWS, LENGTH, padded=False)
    mask = torch.zeros(1, LENGTH, dtype=torch.long)
    mask[:, :count] = 1
    name = "global_attention_mask"
    with he.patch_attention(model, "longformer", attention_window=4):
        plain, expected = call(model, inputs), call(model, inputs | {name: mask.expand(ROWS, -1)})
        assert (plain - expected).abs().max() > 1e-3, "the mask changes nothing, so nothing was tested"
        for form in (mask, mask.bool(), mask.float(), mask.bool().expand(ROWS, -1)):
            assert torch.equal(call(model, inputs | {name: form}), expected), form.dtype
        assert torch.equal(call(model, inputs | {name: mask.float() * 0}), plain)
        for form, message in wrong_forms(mask.expand(ROWS, -1)):
            with pytest.raises(ValueError, match=f"^{name} .*{message}"):
                model(**inputs | {name: form})
        shorter = inputs | {name: mask[:, :-1]}
        if family == "gpt2":
            assert torch.equal(call(model, shorter), expected)
        else:
            with pytest.raises(ValueError, match=f"^{name} of shape"):
                model(**shorter)


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
def test_other_inputs_need_one_entry_per_token(name: str) -> None:
    model = tiny_model("bert", layers=1)
    ids = torch.randint(5, 99, (ROWS, LENGTH))
    entries = torch.arange(LENGTH)[None] if name == "position_ids" else torch.arange(LENGTH)[None] // 9 % 2
    with he.patch_attention(model, "local", attention_window=4):
        expected = call(model, {"input_ids": ids, name: entries.expand(ROWS, -1)})
        assert torch.equal(call(model, {"input_ids": ids, name: entries}), expected)
        for form in (entries.expand(2, -1), entries[:, :-1]):
            with pytest.raises(ValueError, match=rf"^{name} of shape .* must be \(3, 20\) or \(1, 20\)"):
                model(input_ids=ids, **{name: form})


def test_embeddings_with_a_longer_mask_are_refused() -> None:
    model = tiny_model("bert", layers=1)
    with he.patch_attention(model, "local", attention_window=4), pytest.raises(ValueError, match=r"must be \(2, 9\)"):
        model(inputs_embeds=torch.randn(2, 9, 32), attention_mask=torch.ones(2, 12))


@pytest.mark.parametrize("name", ["BertForMultipleChoice", "RobertaForMultipleChoice", "GPT2DoubleHeadsModel"])
def test_masks_have_the_choices_of_their_tokens(name: str) -> None:
    stock = getattr(transformers, name)
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 1} if "GPT2" in name else BERT_LIKE | {"num_hidden_layers": 1}
    torch.manual_seed(0)
    model = stock(stock.config_class(**sizes | {"vocab_size": 99}, initializer_range=0.3)).eval()
    ids = torch.randint(5, 99, (2, 3, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, :, 12:] = 0
    marked = torch.zeros_like(ids)
    marked[:, 1, :3] = 1
    field = "mc_logits" if "GPT2" in name else "logits"

    def choices(**inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return getattr(model(**inputs), field)

    with he.patch_attention(model, "longformer", attention_window=4):
        expected = choices(input_ids=ids, attention_mask=mask, global_attention_mask=marked.flatten(0, 1))
        assert torch.equal(choices(input_ids=ids, attention_mask=mask, global_attention_mask=marked), expected)
        assert not torch.equal(choices(input_ids=ids, attention_mask=mask), expected)
        with pytest.raises(ValueError, match=r"\(2, 2, 20\) must be \(6, 20\) or \(1, 20\)"):
            choices(input_ids=ids, global_attention_mask=marked[:, :2])


# ---- who reads signatures ----------------------------------------------------------------------------------------


def longformer(model: Any) -> Any:
    return he.convert(model, "longformer", attention_window=4).model.eval()


def test_every_efficient_forward_takes_a_global_mask_by_its_place() -> None:
    assert all("global_attention_mask" in inspect.signature(cls.forward).parameters for cls in MODELS.values())
    model = longformer(tiny_model("gpt2", layers=1))
    ids = torch.randint(5, 99, (2, LENGTH))
    marked = torch.zeros_like(ids)
    marked[:, 0] = 1
    parameters = list(inspect.signature(model.forward).parameters.values())
    place = next(i for i, parameter in enumerate(parameters) if parameter.name == "global_attention_mask")
    in_order = [ids, *(parameter.default for parameter in parameters[1:place]), marked]
    assert torch.equal(model(*in_order).logits, model(ids, global_attention_mask=marked).logits)


def rows_of(count: int, *, decoder: bool = False) -> list[dict[str, Tensor]]:
    ids = torch.randint(5, 99, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    marked = torch.zeros(LENGTH, dtype=torch.long)
    marked[:2] = 1
    row = {"attention_mask": torch.ones(LENGTH, dtype=torch.long), "global_attention_mask": marked}
    return [row | {"input_ids": x, "labels": x[:5] if decoder else x} for x in ids]


def test_the_trainer_gives_global_masks_to_the_model(tmp_path: Path) -> None:
    model = longformer(tiny_model("bert", layers=1))
    rows = rows_of(4)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), eval_dataset=rows)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        expected = model(**batch).loss.item()
        without = model(**{k: v for k, v in batch.items() if not k.startswith("global")}).loss.item()
    assert abs(expected - without) > 1e-3, "the masks change nothing, so nothing was tested"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_trainer_generates_with_global_masks(tmp_path: Path) -> None:
    model, seen = longformer(tiny_model("t5", layers=1)), []
    model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("global_attention_mask")), with_kwargs=True
    )
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", predict_with_generate=True, generation_max_length=4
    )
    Seq2SeqTrainer(model, arguments, eval_dataset=rows_of(4, decoder=True)).evaluate()
    assert seen and all(mask is not None and mask[:, :2].all() for mask in seen)


def test_a_wrapper_generates_with_the_global_mask_of_its_encoder() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**BERT_LIKE, num_hidden_layers=1, initializer_range=0.3)
    decoder = transformers.BertConfig(**config.to_dict() | {"is_decoder": True, "add_cross_attention": True})
    encoder = longformer(transformers.BertModel(config))
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=transformers.BertLMHeadModel(decoder)).eval()
    ids = torch.randint(5, 99, (2, LENGTH))
    marked = torch.zeros(1, LENGTH, dtype=torch.long)
    marked[:, :3] = 1
    options: dict[str, Any] = dict(decoder_start_token_id=1, max_new_tokens=6, num_beams=2)
    states = encoder(ids, global_attention_mask=marked)
    expected = model.generate(ids, encoder_outputs=states, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(model.generate(ids, global_attention_mask=marked, **options), expected)
