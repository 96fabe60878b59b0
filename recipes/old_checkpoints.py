"""Checkpoints of years ago, straight from their `pytorch_model.bin`: convert → verify → revert → reload → use.

Four that two PyPI packages carry, both under the MIT licence: rxnfp 0.1.0 (BERT of chemical reactions; Schwaller et al.
2021, Nature Machine Intelligence 3) and microformer-mgm 0.5.8 (GPT-2 of microbiomes). Their wheels are read, not installed.

    pip download --no-deps --dest wheels rxnfp==0.1.0 microformer-mgm==0.5.8
    python recipes/old_checkpoints.py --wheels wheels --record model_cards/results/old_checkpoints.json

Every input is shorter than half the window, so that a converted model gives what its source does, and the classes and the
generated tokens have to be the same. The BERTs' tokenizer is made of their vocabulary. The GPT-2 has none that can be read
without running code: its texts are tokens drawn at random, which check the conversion, but do not say how close it stays on
long inputs.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, Whitespace
from transformers import PreTrainedTokenizerFast

import hf_efficient as he
from hf_efficient.conversion.loading import load_stock
from hf_efficient.profiling.environment import hardware, versions
from hf_efficient.profiling.json_files import write_json

WINDOW, POSITIONS = 256, 1024
# folder in a wheel, and the class where its config names none
CHECKPOINTS = {
    "rxnfp/models/transformers/bert_ft": "BertModel",
    "rxnfp/models/transformers/bert_pretrained": "BertForPreTraining",
    "rxnfp/models/transformers/bert_ft_10k_25s": None,
    "mgm/resources/general_model": None,
}
# esterification, hydrolysis of an amide, bromination, Boc protection, reduction of a ketone, Suzuki coupling
REACTIONS = [
    "CC(=O)O.OCC>>CC(=O)OCC",
    "CC(=O)NC.O>>CC(=O)O.CN",
    "c1ccccc1.BrBr>>Brc1ccccc1",
    "NCc1ccccc1.CC(C)(C)OC(=O)OC(=O)OC(C)(C)C>>CC(C)(C)OC(=O)NCc1ccccc1",
    "CC(=O)c1ccccc1.[Na+].[BH4-]>>CC(O)c1ccccc1",
    "Brc1ccccc1.OB(O)c1ccccc1>>c1ccc(-c2ccccc2)cc1",
]


def reading(words: dict[str, int], splits: Any, pad: str, unknown: str) -> Any:
    """A tokenizer of whole words, cut where `splits` says."""
    own = Tokenizer(WordLevel(words, unk_token=unknown))
    own.pre_tokenizer = splits
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token=pad, unk_token=unknown)


def reactions(vocabulary: Path) -> tuple[Any, list[str]]:
    """A tokenizer of atoms and signs, which the checkpoints' own would be, and reactions after their first token."""
    words = {word: index for index, word in enumerate(vocabulary.read_text().split("\n")) if word}
    signs = Split(Regex(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|."), "isolated")
    return reading(words, signs, "[PAD]", "[UNK]"), [f"[CLS]{reaction}[SEP]" for reaction in REACTIONS]


def numbers(vocabulary: int) -> tuple[Any, list[str]]:
    """A tokenizer whose words are the numbers of tokens, and texts of random ones."""
    drawn = torch.randint(5, vocabulary, (4, 60), generator=torch.Generator().manual_seed(0))
    words = {f"t{index}": index for index in range(vocabulary)}
    return reading(words, Whitespace(), "t0", "t0"), [" ".join(f"t{index}" for index in row) for row in drawn.tolist()]


@torch.no_grad()
def same_use(model: Any, source: Any, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """What both models are for, side by side: generated tokens, classes, or the largest difference of the first output."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    if source.can_generate():
        prompt = batch["input_ids"][:, :8]
        made = [m.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=0) for m in (model, source)]
        return {"generated tokens are equal": torch.equal(*made), "generated": made[0][:, 8:].tolist()}
    out, expected = (m(**batch)[0] for m in (model, source))
    real = batch["attention_mask"].bool() if out.shape[:2] == batch["input_ids"].shape else ...
    found = {"largest difference": (out - expected)[real].abs().max().item()}
    if getattr(source, "num_labels", 0) and out.dim() == 2:
        found |= {
            "classes": out.argmax(-1).tolist(),
            "classes are equal": torch.equal(out.argmax(-1), expected.argmax(-1)),
        }
    return found


def passed_through(source: Path, model_class: str | None, out: Path) -> dict[str, Any]:
    """The whole way of one checkpoint."""
    stock, _ = load_stock(str(source), model_class=model_class)
    vocabulary = source / "vocab.txt"
    tokenizer, texts = reactions(vocabulary) if vocabulary.is_file() else numbers(stock.config.vocab_size)
    he.convert(source, "local", attention_window=WINDOW, max_positions=POSITIONS, model_class=model_class).save(out)
    report = he.verify(out, source, texts, tokenizer=tokenizer)
    back = out.with_name(f"{out.name}-back")
    he.conversion.revert_checkpoint(out, back)
    tensors, original = load_file(back / "model.safetensors"), stock.state_dict()
    model = he.conversion.load_converted(out)
    return {
        "class": type(model).__name__,
        "checks": {check.name: check.status for check in report.checks},
        "verified": report.passed,
        "reverted tensors": len(tensors),
        "reverted bit for bit": all(torch.equal(tensor, original[name]) for name, tensor in tensors.items()),
    } | same_use(model, stock, tokenizer, texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True, help="folder with the two wheels")
    parser.add_argument("--record", type=Path, required=True, help="JSON file for what was found")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for wheel in sorted(args.wheels.glob("*.whl")):
            zipfile.ZipFile(wheel).extractall(Path(folder) / "unpacked")
        for name, model_class in CHECKPOINTS.items():
            results[name] = passed_through(
                Path(folder) / "unpacked" / name, model_class, Path(folder) / Path(name).name
            )
            good = [value for key, value in results[name].items() if isinstance(value, bool)]
            print(f"{name}: {results[name]['class']}, {'all equal' if all(good) else 'NOT EQUAL'}")
    settings = {"mechanism": "local", "attention_window": WINDOW, "max_positions": POSITIONS}
    facts = {"settings": settings, "hardware": hardware(), "versions": versions()}
    write_json(args.record, {"results": results} | facts)
    if not all(value for found in results.values() for value in found.values() if isinstance(value, bool)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
