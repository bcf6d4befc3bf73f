"""A key-value cache in which every row has a length of its own, so that rows may come and go while others decode.

::

    slot    columns of one head of one layer
     0      p p p p r r r . . . . .         active rows sit in slots 0, 1, ..., n - 1
     1      p p r r r r r r r . . .         each writes its next key behind its own last one
     2      p p p p p p r . . . . .
     3      . . . . . . . . . . . .         free

Prompts come in as one packed row, whose segments are copied to their slots. A row that leaves has its slot taken by a
new prompt, or by the active row that sits last. Nothing is ever padded anew, concatenated or shifted.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from lit_instruct.models.attention import attend

_GROW = 1.5  # a cache that is too narrow becomes so many times as wide: each time it is copied


def cache_keyword(model: nn.Module) -> str:
    """The name by which a model takes its cache: transformers is about to change it.

    Args:
        model: a causal language model.

    Returns:
        ``cache`` or ``past_key_values``.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class SlotCache(Cache):
    """Keys and values ``[slots, columns, key heads, D]`` of each layer; layers are made as they report.

    Before each forward pass :meth:`write_at` says where its tokens belong.

    Attributes:
        slots: how many rows have room.
        columns: how many tokens of a row have room; grows on demand.
    """

    def __init__(self, slots: int, columns: int, device: torch.device):
        """Make an empty one.

        Args:
            slots: most rows at a time.
            columns: tokens of a row that have room at first.
            device: of the model.
        """
        super().__init__(layers=[])
        self.slots, self.columns = slots, columns
        self._device = device
        self._stores: dict[int, tuple[Tensor, Tensor]] = {}
        self._places = torch.empty(0, dtype=torch.long, device=device)
        self._read: tuple[int, int] | None = None

    def write_at(self, slots_T: Tensor, columns_T: Tensor, *, read: tuple[int, int] | None) -> None:
        """Say where the tokens of the next forward pass go.

        Args:
            slots_T: int64 ``[T]``, the slot of each token.
            columns_T: int64 ``[T]``, its column, less than ``columns``.
            read: the step of (rows, columns): what the layers are given to look at. None: a packed row of prompts,
                whose tokens see themselves only.
        """
        self._places, self._read = slots_T * self.columns + columns_T, read

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of a layer; called by the model.

        Args:
            key_states: ``[1, key heads, T, D]`` of a packed row, ``[n, key heads, 1, D]`` of a step.
            value_states: as the keys.
            layer_idx: of the layer.
            *args: not read.
            **kwargs: not read.

        Returns:
            What attention is to look at: ``[n, key heads, columns in use, D]``, or for a packed row what came in.
        """
        if layer_idx not in self._stores:
            self._stores[layer_idx] = (self._empty(key_states), self._empty(value_states))
        store = self._stores[layer_idx]
        for tensor, new in zip(store, (key_states, value_states), strict=True):
            heads, width = new.shape[1], new.shape[3]
            tensor.view(-1, heads * width).index_copy_(0, self._places, new.transpose(1, 2).reshape(-1, heads * width))
        if self._read is None:
            return key_states, value_states
        rows, columns = self._read
        return store[0][:rows, :columns].transpose(1, 2), store[1][:rows, :columns].transpose(1, 2)

    def copy_slots(self, sources: Sequence[int], targets: Sequence[int], columns: int) -> None:
        """Copy whole rows.

        Args:
            sources: their slots.
            targets: where each goes; not one of the sources.
            columns: how many columns of them are in use.
        """
        source, target = (torch.tensor(slots, device=self._device) for slots in (sources, targets))
        for store in self._stores.values():
            for tensor in store:
                used = tensor[:, :columns]
                used.index_copy_(0, target, used.index_select(0, source))

    def make_room(self, columns: int) -> None:
        """Widen the cache, if it is too narrow for so many tokens a row.

        Args:
            columns: that must have room.
        """
        if columns <= self.columns:
            return
        self.columns = max(columns, int(self.columns * _GROW))
        for layer, store in self._stores.items():
            wider = tuple(self._empty(tensor.transpose(1, 2)) for tensor in store)
            for new, old in zip(wider, store, strict=True):
                new[:, : old.shape[1]] = old
            self._stores[layer] = (wider[0], wider[1])

    def _empty(self, like: Tensor) -> Tensor:
        # Zeros: what a row must not see gets the weight 0, and 0 times whatever memory held before may be NaN.
        return like.new_zeros(self.slots, self.columns, like.shape[1], like.shape[3])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No length that all rows share: positions are always passed.

        Args:
            layer_idx: not read.

        Returns:
            0.
        """
        return 0


class SlotStep:
    """One decoding step: what each row sees of its slot. Goes to the model by the keyword ``slots``."""

    def __init__(self, lengths_n: Tensor, longest: int):
        """Describe it.

        Args:
            lengths_n: int64 ``[n]``, tokens of each row, the new one included.
            longest: the largest of them.
        """
        self._lengths_n, self._longest = lengths_n, longest
        self._seen: dict[int | None, Tensor] = {}
        self._bias: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of each row's new token to its slot.

        Args:
            query: ``[n, heads, 1, D]``.
            key: ``[n, key heads, S, D]`` as the cache gave it; S is the longest row.
            value: as ``key``.
            scale: of the scores.
            window: how many keys a query sees, its own included; None: all.
            softcap: bound of the scores, or None.
            sinks: ``[heads]``, a score each head gives to nothing at all, or None.

        Returns:
            ``[n, 1, heads, D]``.
        """
        rows, heads, _, width = query.shape
        if window is not None and window >= self._longest:
            window = None
        if softcap is not None or sinks is not None:
            seen = self._visible(window)
            return attend(query, key, value, seen, scale=scale, softcap=softcap, sinks=sinks).transpose(1, 2)
        groups = heads // key.shape[1]
        # Queries of one key head are rows of one product: no key is repeated.
        out = nn.functional.scaled_dot_product_attention(
            query.reshape(rows, heads // groups, groups, width),
            key,
            value,
            attn_mask=self._added(window, query.dtype),
            scale=scale,
        )
        return out.reshape(rows, 1, heads, value.shape[-1])

    def _visible(self, window: int | None) -> Tensor:
        """What each row sees, bool ``[n, 1, 1, S]``: made once for all layers that ask for the window."""
        if window not in self._seen:
            column = torch.arange(self._longest, device=self._lengths_n.device)
            seen = column < self._lengths_n[:, None]
            if window is not None:
                seen &= column >= self._lengths_n[:, None] - window
            self._seen[window] = seen[:, None, None]
        return self._seen[window]

    def _added(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """The same as numbers to add, in the dtype that the fused kernel wants."""
        if (window, dtype) not in self._bias:
            seen = self._visible(window)
            self._bias[window, dtype] = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)
        return self._bias[window, dtype]
