"""What attention keeps of the tokens it has seen, so that each new token is computed once.

A layer's cache holds the tensors its attention hands it, (B, ..., S, d), and knows nothing of what they mean: keys and
values, or MLA's latent with its rotated key. Writing has two steps: `extend` lays new tokens down beside the old ones,
`advance` makes them count. A call that fails between the two leaves the cache as it was.
"""

import sys
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dsmoe_lite.common.errors import InputError, require, require_whole
from dsmoe_lite.config import ModelConfig


class LayerCache(Protocol):
    """What an attention layer asks of its cache."""

    length: int  # tokens that count

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Lay down new (B, ..., S, d) and return, for each, what the new tokens may look at, themselves included."""

    def advance(self, n_tokens: int) -> None:
        """Let the n_tokens that `extend` was given last count."""

    def key_positions(self, n_tokens: int) -> Tensor:
        """Positions of what `extend` would return for n_tokens new tokens, in its order."""

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""


class GrowingCache:
    """All tokens, in buffers that double when they are full: a token is copied twice at most on average.

    reserve: tokens to have room for from the start; limit: tokens there will be at most.
    """

    def __init__(self, reserve: int = 0, limit: int = sys.maxsize) -> None:
        self.length = 0
        self._reserve, self._limit = reserve, limit
        self._buffers: tuple[Tensor, ...] = ()

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """As LayerCache; the result is a view of the buffers, no copy."""
        end = self.length + new[0].shape[-2]
        self._buffers = _with_room(self._buffers, new, self.length, end, self._reserve, self._limit)
        for buffer, tensor in zip(self._buffers, new, strict=True):
            buffer[..., self.length : end, :] = tensor
        return tuple(buffer[..., :end, :] for buffer in self._buffers)

    def advance(self, n_tokens: int) -> None:
        """As LayerCache."""
        self.length += n_tokens

    def key_positions(self, n_tokens: int) -> Tensor:
        """As LayerCache: all, from 0."""
        return torch.arange(self.length + n_tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, room for tokens to come included."""
        return _nbytes(self._buffers)


class RollingCache:
    """The last `window` tokens: position t lies in slot t mod window (arXiv:2310.06825, Figure 2)."""

    def __init__(self, window: int, reserve: int = 0) -> None:
        self.length = 0
        self._window = window
        self._reserve = min(reserve, window)
        self._buffers: tuple[Tensor, ...] = ()
        self._waiting: tuple[Tensor, ...] = ()  # several tokens at once would overwrite what the first still sees

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """As LayerCache; one token goes into its slot, several are first joined to what came before."""
        n, W = new[0].shape[-2], self._window
        end = min(self.length + n, W)
        self._buffers = _with_room(self._buffers, new, min(self.length, W), end, self._reserve, W)
        if n == 1:  # its slot held the token that no later one sees
            for buffer, tensor in zip(self._buffers, new, strict=True):
                buffer[..., self.length % W, :] = tensor[..., 0, :]
            self._waiting = ()
            return tuple(buffer[..., :end, :] for buffer in self._buffers)
        slots = self._before(n) % W
        self._waiting = tuple(tensor[..., -W:, :] for tensor in new)
        return tuple(
            torch.cat((buffer[..., slots.to(buffer.device), :], tensor), dim=-2)
            for buffer, tensor in zip(self._buffers, new, strict=True)
        )

    def advance(self, n_tokens: int) -> None:
        """As LayerCache."""
        self.length += n_tokens
        for buffer, tensor in zip(self._buffers, self._waiting, strict=False):
            slots = torch.arange(self.length - tensor.shape[-2], self.length, device=buffer.device) % self._window
            buffer[..., slots, :] = tensor
        self._waiting = ()

    def key_positions(self, n_tokens: int) -> Tensor:
        """As LayerCache: by slot for one token, in order for several."""
        if n_tokens > 1:
            return torch.cat((self._before(n_tokens), self.length + torch.arange(n_tokens)))
        W, t = self._window, self.length
        slots = torch.arange(min(t + 1, W))
        return t - (t - slots) % W  # the newest position of each slot

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return _nbytes(self._buffers)

    def _before(self, n_tokens: int) -> Tensor:
        """Positions of old tokens that the first new one sees."""
        return torch.arange(max(0, self.length - self._window + 1), self.length)


class Cache:
    """The caches of all layers of a model, for `batch_size` sequences of one length.

    reserve: tokens to have room for from the start. Without it buffers double as they fill.
    """

    def __init__(self, config: ModelConfig, batch_size: int, *, reserve: int = 0) -> None:
        require_whole("batch_size", batch_size, 1)
        require_whole("reserve", reserve, 0, config.max_seq_len)
        self.config, self.batch_size = config, batch_size
        self.pad: Tensor | None = None  # (B,), of the call that came first: paddings at the left of each row
        self.layers: Sequence[LayerCache] = [_layer_cache(config, reserve) for _ in range(config.n_layers)]

    @property
    def length(self) -> int:
        """Tokens that each sequence holds."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated in all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def padding(self, pad: Tensor | None) -> Tensor | None:
        """Return the padding that holds for a call given `pad`: that of the first call. InputError for another."""
        if self.length == 0 or pad is self.pad:
            return pad
        same = pad is None or (self.pad is not None and torch.equal(pad, self.pad))
        remedy = "must be that of the call that filled the cache, or left out"
        require(same, "pad", None if pad is None else pad.tolist(), remedy)
        return self.pad

    def advance(self, n_tokens: int) -> None:
        """Let the last n_tokens count, in every layer."""
        for layer in self.layers:
            layer.advance(n_tokens)

    def check(self, config: ModelConfig, batch_size: int) -> None:
        """Raise InputError unless the cache is of `config` and `batch_size`, and no interrupt cut `advance` short."""
        if (config.attention, config.n_layers) != (self.config.attention, self.config.n_layers):
            raise InputError(
                f"cache = of {self.config.n_layers} layers of {self.config.attention}: the model has "
                f"{config.n_layers} layers of {config.attention}; make one with Cache(model.config, batch_size)"
            )
        remedy = f"must be {self.batch_size}, that of the cache"
        require(batch_size == self.batch_size, "batch size", batch_size, remedy)
        lengths = {layer.length for layer in self.layers}
        require(len(lengths) == 1, "lengths of the layers", lengths, "must be one: an interrupt cut a call; start anew")


def _layer_cache(config: ModelConfig, reserve: int) -> LayerCache:
    if config.attention.window is not None:
        return RollingCache(min(config.attention.window, config.max_seq_len), reserve)
    return GrowingCache(reserve, config.max_seq_len)


def _with_room(
    buffers: tuple[Tensor, ...], new: tuple[Tensor, ...], length: int, needed: int, reserve: int, limit: int
) -> tuple[Tensor, ...]:
    """`buffers` if `needed` tokens fit, else ones twice as large with the first `length` tokens in them."""
    off = not torch.is_grad_enabled()
    require(off, "gradients", "on", "must be off with a cache, which no gradient passes: use torch.no_grad()")
    alike = len(buffers) == len(new) and all(
        (buffer.shape[:-2], buffer.shape[-1], buffer.dtype, buffer.device)
        == (tensor.shape[:-2], tensor.shape[-1], tensor.dtype, tensor.device)
        for buffer, tensor in zip(buffers, new, strict=True)
    )
    if length == 0 and not alike:  # nothing yet, or only what a call that failed left
        return tuple(_empty_like(tensor, max(needed, reserve)) for tensor in new)
    if not alike:
        raise InputError(
            f"cache = {buffers[0].dtype} on {buffers[0].device}: the new tokens are {new[0].dtype} on "
            f"{new[0].device}; keep to one kind of numbers and one device, or make a new cache"
        )
    if needed <= buffers[0].shape[-2]:
        return buffers
    size = max(needed, min(2 * buffers[0].shape[-2], limit))
    larger = tuple(_empty_like(tensor, size) for tensor in new)
    for bigger, buffer in zip(larger, buffers, strict=True):
        bigger[..., :length, :] = buffer[..., :length, :]
    return larger


def _empty_like(tensor: Tensor, n_tokens: int) -> Tensor:
    with torch.inference_mode(False):  # a buffer made under it could not be written outside
        return tensor.new_empty((*tensor.shape[:-2], n_tokens, tensor.shape[-1]))


def _nbytes(buffers: tuple[Tensor, ...]) -> int:
    return sum(buffer.untyped_storage().nbytes() for buffer in buffers)
