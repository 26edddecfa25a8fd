"""The KV cache: what attention stores of earlier tokens, so that each token is computed once.

The cache of a layer stores tensors (B, ..., S, d) without knowing their meaning: keys and values, or MLA's latent with
its rotated key. Writing takes two steps. `extend` stores new tokens behind the old ones; `advance` makes them count. A
call that fails between the two steps leaves the cache as it was.
"""

import sys
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dsmoe_lite.common.errors import InputError, require, require_int
from dsmoe_lite.config import ModelConfig


class LayerCache(Protocol):
    """The cache of one layer, as attention uses it."""

    length: int  # tokens that count

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Store new (B, ..., S, d). Return, for each, all tokens that the new ones may attend to, with themselves."""

    def advance(self, n_tokens: int) -> None:
        """Make the n_tokens of the last `extend` count."""

    def key_positions(self, n_tokens: int) -> Tensor:
        """Positions (S_kv,) of the tokens that `extend` returns for n_tokens new ones, in the same order."""

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""


class GrowingCache:
    """All tokens, in buffers that double when they are full, so that a token is copied at most twice on average.

    reserve: tokens to allocate room for at first. limit: the most tokens there can be.
    """

    def __init__(self, reserve: int = 0, limit: int = sys.maxsize) -> None:
        self.length = 0
        self._reserve, self._limit = reserve, limit
        self._buffers: tuple[Tensor, ...] = ()

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Store new tokens; the result is a view of the buffers, not a copy."""
        end = self.length + new[0].shape[-2]
        self._buffers = _with_room(self._buffers, new, self.length, end, self._reserve, self._limit)
        for buffer, tensor in zip(self._buffers, new, strict=True):
            buffer[..., self.length : end, :] = tensor
        return tuple(buffer[..., :end, :] for buffer in self._buffers)

    def advance(self, n_tokens: int) -> None:
        """Make the n_tokens of the last `extend` count."""
        self.length += n_tokens

    def forget(self, n_tokens: int) -> None:
        """Drop the last n_tokens; later tokens are written over them."""
        self.length -= n_tokens

    def key_positions(self, n_tokens: int) -> Tensor:
        """All positions, from 0."""
        return torch.arange(self.length + n_tokens, device="cpu")

    @property
    def nbytes(self) -> int:
        """Allocated bytes, including the room for later tokens."""
        return _nbytes(self._buffers)


class RollingCache:
    """The last `window` tokens of a sliding window: position t is in slot t mod window (arXiv:2310.06825, Figure 2).

    reserve: tokens to allocate room for at first, at most `window`.
    """

    def __init__(self, window: int, reserve: int = 0) -> None:
        self.length = 0
        self._window = window
        self._reserve = min(reserve, window)
        self._buffers: tuple[Tensor, ...] = ()
        self._pending: tuple[Tensor, ...] = ()  # several new tokens, until `advance`: the first still needs old slots

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Store one token in its slot, or return several behind the old ones that they see, and store them later."""
        n, W = new[0].shape[-2], self._window
        end = min(self.length + n, W)
        self._buffers = _with_room(self._buffers, new, min(self.length, W), end, self._reserve, W)
        if n == 1:  # its slot belongs to the token that has just left the window
            for buffer, tensor in zip(self._buffers, new, strict=True):
                buffer[..., self.length % W, :] = tensor[..., 0, :]
            self._pending = ()
            return tuple(buffer[..., :end, :] for buffer in self._buffers)
        slots = self._old_positions() % W
        self._pending = tuple(tensor[..., -W:, :] for tensor in new)
        return tuple(
            torch.cat((buffer[..., slots.to(buffer.device), :], tensor), dim=-2)
            for buffer, tensor in zip(self._buffers, new, strict=True)
        )

    def advance(self, n_tokens: int) -> None:
        """Make the n_tokens of the last `extend` count."""
        self.length += n_tokens
        for buffer, tensor in zip(self._buffers, self._pending, strict=False):
            slots = torch.arange(self.length - tensor.shape[-2], self.length, device=buffer.device) % self._window
            buffer[..., slots, :] = tensor
        self._pending = ()

    def key_positions(self, n_tokens: int) -> Tensor:
        """In the order of slots for one new token, in ascending order for several."""
        if n_tokens > 1:
            return torch.cat((self._old_positions(), self.length + torch.arange(n_tokens, device="cpu")))
        W, t = self._window, self.length
        slots = torch.arange(min(t + 1, W), device="cpu")
        return t - (t - slots) % W  # the newest position of each slot

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return _nbytes(self._buffers)

    def _old_positions(self) -> Tensor:
        """Positions of the cached tokens that the first new token sees."""
        return torch.arange(max(0, self.length - self._window + 1), self.length, device="cpu")


class Cache:
    """The caches of all layers of a model, for `batch_size` sequences of the same length.

    reserve: tokens to allocate room for at first. Without it, buffers double as they fill.
    """

    def __init__(self, config: ModelConfig, batch_size: int, *, reserve: int = 0) -> None:
        require_int("batch_size", batch_size, 1)
        require_int("reserve", reserve, 0, config.max_seq_len)
        self.config, self.batch_size = config, batch_size
        self.pad: Tensor | None = None  # (B,), padding tokens at the left of each row, from the first call
        self.layers: Sequence[LayerCache] = [_layer_cache(config, reserve) for _ in range(config.n_layers)]

    @property
    def length(self) -> int:
        """Cached tokens per sequence."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Allocated bytes in all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def padding(self, pad: Tensor | None) -> Tensor | None:
        """Return the padding of this call: that of the first call. Raises InputError if `pad` is another."""
        if self.length == 0 or pad is self.pad:
            return pad
        same = pad is None or (self.pad is not None and torch.equal(pad, self.pad))
        remedy = "must be that of the call that filled the cache, or omitted"
        require(same, "pad", None if pad is None else pad.tolist(), remedy)
        return self.pad

    def advance(self, n_tokens: int) -> None:
        """Make the last n_tokens count, in every layer."""
        for layer in self.layers:
            layer.advance(n_tokens)

    def forget(self, n_tokens: int) -> None:
        """Drop the last n_tokens in every layer. Raises InputError with a sliding window: others are overwritten."""
        require_int("n_tokens", n_tokens, 0, self.length)
        for layer in self.layers:
            if not isinstance(layer, GrowingCache):
                window = self.config.attention.window
                raise InputError(
                    f"window = {window}: a rolling cache cannot forget tokens; use a model without a window"
                )
            layer.forget(n_tokens)

    def check(self, config: ModelConfig, batch_size: int) -> None:
        """Raise InputError if the cache is of another model or batch size, or an interrupt cut `advance` short."""
        if (config.attention, config.n_layers) != (self.config.attention, self.config.n_layers):
            raise InputError(
                f"cache = {self.config.n_layers} layers of {self.config.attention}: the model has "
                f"{config.n_layers} layers of {config.attention}; make one with Cache(model.config, batch_size)"
            )
        remedy = f"must be {self.batch_size}, the batch size of the cache"
        require(batch_size == self.batch_size, "batch size", batch_size, remedy)
        lengths = {layer.length for layer in self.layers}
        remedy = "must be equal: an interrupt cut a call short; make a new cache"
        require(len(lengths) == 1, "lengths of the layers", lengths, remedy)


def _layer_cache(config: ModelConfig, reserve: int) -> LayerCache:
    if config.attention.window is not None:
        return RollingCache(min(config.attention.window, config.max_seq_len), reserve)
    return GrowingCache(reserve, config.max_seq_len)


def _with_room(
    buffers: tuple[Tensor, ...], new: tuple[Tensor, ...], length: int, needed: int, reserve: int, limit: int
) -> tuple[Tensor, ...]:
    """Return `buffers` if `needed` tokens fit, else buffers twice as large with the first `length` tokens copied."""
    off = not torch.is_grad_enabled()
    require(off, "gradients", "on", "must be off: no gradient passes through a cache; use torch.no_grad()")
    alike = len(buffers) == len(new) and all(
        (buffer.shape[:-2], buffer.shape[-1], buffer.dtype, buffer.device)
        == (tensor.shape[:-2], tensor.shape[-1], tensor.dtype, tensor.device)
        for buffer, tensor in zip(buffers, new, strict=True)
    )
    if length == 0 and not alike:  # nothing counts yet; a call that failed may have left buffers
        return tuple(_empty_like(tensor, max(needed, reserve)) for tensor in new)
    if not alike:
        raise InputError(
            f"cache = {buffers[0].dtype} on {buffers[0].device}: the new tokens are {new[0].dtype} on "
            f"{new[0].device}; keep to one dtype and one device, or make a new cache"
        )
    if needed <= buffers[0].shape[-2]:
        return buffers
    size = max(needed, min(2 * buffers[0].shape[-2], limit))
    larger = tuple(_empty_like(tensor, size) for tensor in new)
    for target, buffer in zip(larger, buffers, strict=True):
        target[..., :length, :] = buffer[..., :length, :]
    return larger


def _empty_like(tensor: Tensor, n_tokens: int) -> Tensor:
    with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
        return tensor.new_empty((*tensor.shape[:-2], n_tokens, tensor.shape[-1]))


def _nbytes(buffers: tuple[Tensor, ...]) -> int:
    return sum(buffer.untyped_storage().nbytes() for buffer in buffers)
