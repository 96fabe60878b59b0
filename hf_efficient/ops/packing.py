"""Packed rows: several sequences one after another in a row, told apart by positions that start again."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# facts of a call with one entry per token, (B, N, …)
PER_TOKEN = ("hidden_states", "cos_sin", "input_ids", "global_attention_mask")


class Steps(NamedTuple):
    """How positions go on from each real token to the next real token of its row; padding between them is stepped over.

    Attributes:
        first: (B, N) bool, the first real token of its row.
        restart: (B, N) bool, the position is not above the one before: another sequence starts here.
        jump: (B, N) bool, the position went up, but by more than the tokens in between.
        apart: (B, N) bool, no other sequence starts here, but the token is not as far from the one before by position as it
            is by index.
        last: (B, N) index of the last real token up to here, -1 = none yet.
    """

    first: Tensor
    restart: Tensor
    jump: Tensor
    apart: Tensor
    last: Tensor


def position_steps(position_ids: Tensor, token_mask: Tensor | None = None, first: int = 0) -> Steps:
    """Where (B, N) `position_ids` start again and where they jump.

    Behind padding a sequence starts only at the position `first`: `generate()` goes on counting from the padding.

    Args:
        token_mask: (B, N) bool, True = real token; `None` = all real.

    Static shapes and no look at values. O(B · N) time and memory.
    """
    real = torch.ones_like(position_ids, dtype=torch.bool) if token_mask is None else token_mask
    token = torch.arange(position_ids.shape[-1], device=position_ids.device)
    last = torch.where(real, token, -1).cummax(dim=-1).values
    before = F.pad(last[:, :-1], (1, 0), value=-1)
    step = position_ids - position_ids.gather(-1, before.clamp(min=0))
    follows = real & (before >= 0)
    jump = follows & (step > 1) & (step != token - before)
    restart = follows & (step <= 0) & ((token - before == 1) | (position_ids == first))
    apart = follows & ~restart & (step != token - before)
    return Steps(real & (before < 0), restart, jump, apart, last)


class Group(NamedTuple):
    """Sequences of similar length: (M, L) indices of their `tokens` among all B · N, and which are real, `None` = all.

    Entries behind a sequence's end repeat its first token and are False in `token_mask`.
    """

    tokens: Tensor
    token_mask: Tensor | None


@dataclasses.dataclass(frozen=True)
class PackedSequences:
    """The sequences of a packed batch, each as a row of its own.

    Attributes:
        shape: (B, N) of the batch. groups: the sequences by length; a group's lengths differ by less than a factor of 2.
        entry: (B · N,) index of each token among all entries of all groups in order.
        real: (B · N,) bool, False = padding, which belongs to no sequence; `None` = there is none.
    """

    shape: tuple[int, int]
    groups: tuple[Group, ...]
    entry: Tensor
    real: Tensor | None

    @classmethod
    def find(cls, steps: Steps, token_mask: Tensor | None = None) -> PackedSequences:
        """The sequences that `position_steps(position_ids, token_mask)` found, trimmed of padding at their ends.

        Reads values: the index tables are made on the CPU, and sent to the device once.
        """
        device, (batch, length) = steps.last.device, steps.last.shape
        last = steps.last.cpu()
        real = torch.ones_like(last, dtype=torch.bool) if token_mask is None else token_mask.cpu()
        row = torch.arange(batch)[:, None] * length
        real, last = real.flatten(), (last + row).flatten()
        start = (steps.first | steps.restart).cpu().flatten().nonzero().squeeze(-1)
        row_end = (start // length + 1) * length
        following = torch.minimum(torch.cat([start[1:], row_end[-1:]]), row_end)
        sizes = last[following - 1] + 1 - start
        entry, groups, entries = torch.zeros(batch * length, dtype=torch.long), [], 0
        bits = torch.frexp(sizes.double()).exponent
        for bit in bits.unique().tolist():
            chosen = bits == bit
            offset = torch.arange(int(sizes[chosen].max()))
            within = offset < sizes[chosen, None]
            index = start[chosen, None] + torch.where(within, offset, 0)
            kept = within & real[index]
            entry[index[kept]] = entries + kept.flatten().nonzero().squeeze(-1)
            entries += index.numel()
            groups.append(Group(index.to(device), None if bool(kept.all()) else kept.to(device)))
        all_real = bool(real.all())
        return cls((batch, length), tuple(groups), entry.to(device), None if all_real else real.to(device))

    def split(self, tokens: Tensor, group: Group) -> Tensor:
        """(M, L, …) entries of `group` from (B, N, …) tokens."""
        index = group.tokens.to(tokens.device)
        return tokens.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)

    def join(self, outputs: list[Tensor]) -> Tensor:
        """(B, N, …) from the (M, L, …) outputs of all groups in order; padding gets zeros."""
        entries = torch.cat([x.flatten(0, 1) for x in outputs])
        tokens = entries.index_select(0, self.entry.to(entries.device))
        if self.real is not None:
            real = self.real.to(entries.device)
            tokens = torch.where(real.view(-1, *(1,) * (tokens.dim() - 1)), tokens, 0.0)
        return tokens.unflatten(0, self.shape)
