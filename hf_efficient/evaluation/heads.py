"""What a model is for, compared: the distributions that its heads give, over tokens, classes, answers or choices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SPANS = ("start_logits", "end_logits")


def head_outputs(out: Mapping[str, Any]) -> dict[str, Tensor]:
    """{name: logits} of a model's output: of all heads that it has."""
    return {name: value.cpu() for name, value in out.items() if name.endswith("logits") and isinstance(value, Tensor)}


def is_multiple_choice(model: Any) -> bool:
    """Whether a model chooses one of several texts, which are then the rows of one example."""
    return type(model).__name__.endswith("MultipleChoice")


class HeadComparison:
    """Sums over batches of one head's figures, of a model against its source.

    `kl` is that of the source's to the model's distribution, in nats, mean over predictions; beside it stands how often
    both find the same most probable entry: `top1_agreement` of a vocabulary, `class_agreement` of labels (of texts or
    tokens), `start_agreement` and `end_agreement` of answers, `choice_agreement` of choices. `by_label` has both for the
    predictions of each label by the source. Several labels at once (`multi_label_classification`) are as many
    distributions over yes and no; of a score `score_error` is the relative error, ‖s' - s‖ / ‖s‖.
    """

    def __init__(self, name: str, config: Any, is_choice: bool):
        self.name, self.config, self.is_choice = name, config, is_choice or name == "mc_logits"
        self.kl, self.agree, self.label = [], [], []  # type: tuple[list[Tensor], list[Tensor], list[Tensor]]
        self.squares = [0.0, 0.0]
        self.kind = "classes"

    def add(self, theirs: Tensor, ours: Tensor, mask: Tensor) -> None:
        """Take in one batch: logits (B, C), or of tokens (B, N, C) or (B, N) with the mask (B, N) of real ones."""
        is_vocabulary = theirs.dim() == 3 and theirs.shape[-1] == getattr(self.config, "vocab_size", None)
        # a vocabulary's logits are many
        theirs, ours = (x.float() if is_vocabulary else x.double() for x in (theirs, ours))
        if self.name in SPANS:
            self.kind = self.name.removesuffix("_logits")
            for p, q, real in zip(theirs, ours, mask, strict=True):
                self._distributions(p[real][None], q[real][None])
            return
        if theirs.dim() == 3:
            self.kind = "top1" if is_vocabulary else "classes"
            theirs, ours = theirs[mask], ours[mask]
        elif self.is_choice:
            self.kind = "choice"
        if theirs.dim() == 1 or theirs.shape[-1] == 1:
            self.kind = "choice" if self.is_choice and theirs.numel() > 1 else "score"
        if self.kind == "score" or getattr(self.config, "problem_type", None) == "regression":
            self.kind = "score"
            self.squares[0] += float((ours - theirs).square().sum())
            self.squares[1] += float(theirs.square().sum())
        elif getattr(self.config, "problem_type", None) == "multi_label_classification":
            # a distribution over yes and no for each label
            p, q = (torch.stack([x, torch.zeros_like(x)], -1).flatten(0, -2) for x in (theirs, ours))
            self._distributions(p, q, torch.arange(theirs.shape[-1]).repeat(len(theirs)))
        else:
            self._distributions(theirs.reshape(-1, theirs.shape[-1]), ours.reshape(-1, theirs.shape[-1]))

    def _distributions(self, theirs: Tensor, ours: Tensor, label: Tensor | None = None) -> None:
        p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
        self.kl.append((p.exp() * (p - q)).sum(-1))
        self.agree.append((p.argmax(-1) == q.argmax(-1)).double())
        self.label.append(p.argmax(-1) if label is None else label)

    def figures(self) -> dict[str, Any]:
        """The figures by name; none if nothing was taken in."""
        if self.kind == "score":
            error, scale = self.squares
            return {"score_error": (error / scale) ** 0.5 if scale else float("inf") if error else 0.0}
        if not self.kl:
            return {}
        kl, agree, label = (torch.cat(parts) for parts in (self.kl, self.agree, self.label))
        name = {"classes": "class", "top1": "top1"}.get(self.kind, self.kind)
        found: dict[str, Any] = {"kl": float(kl.mean()), f"{name}_agreement": float(agree.mean())}
        if self.kind == "classes":
            names = getattr(self.config, "id2label", None) or {}
            found["by_label"] = {
                str(names.get(index, index)): {
                    "predictions": int((label == index).sum()),
                    "agreement": float(agree[label == index].mean()),
                    "kl": float(kl[label == index].mean()),
                }
                for index in label.unique().tolist()
            }
        return found


def joined(heads: Mapping[str, HeadComparison]) -> dict[str, Any]:
    """The figures of all heads: start and end of an answer together, further heads under their own names."""
    if set(heads) >= set(SPANS):
        spans = [heads[name].figures() for name in SPANS]
        return {"kl": (spans[0]["kl"] + spans[1]["kl"]) / 2} | {
            name: value for span in spans for name, value in span.items() if name != "kl"
        }
    figures: dict[str, Any] = {}
    for index, (output, head) in enumerate(heads.items()):
        prefix = f"{output.removesuffix('_logits')}_" if index else ""
        figures |= {prefix + name: value for name, value in head.figures().items()}
    return figures
