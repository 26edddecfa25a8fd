"""Models as other libraries handle them: meta device, casts, wrappers, adapters, hooks, torch.compile, devices."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import CONFIG, MOE, TOKENS, logits, made
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import weight_norm

from dsmoe_lite.checkpoint import load_model, save_model
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import AttentionConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig
from dsmoe_lite.generate import generate
from dsmoe_lite.layers.cache import Cache
from dsmoe_lite.model import Transformer

LATENT = replace(
    CONFIG,
    attention=MLAConfig(n_heads=4, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=6),
)
YARN = replace(
    CONFIG, attention=AttentionConfig(n_heads=2, head_dim=8, yarn=YarnConfig(factor=4.0, original_max_len=8))
)

# Rotary tables follow the model anywhere


@pytest.mark.parametrize(
    "config", [CONFIG, LATENT, YARN, replace(CONFIG, moe=None)], ids=["mha", "mla", "yarn", "dense"]
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_model_made_on_the_meta_device_and_loaded_is_the_model(config: ModelConfig, assign: bool) -> None:
    model = made(config)
    with torch.device("meta"):
        empty = Transformer(config)
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(logits(empty.eval()), logits(model))


def test_hash_routing_made_on_the_meta_device_has_its_table() -> None:
    config = replace(CONFIG, moe=MoEConfig(n_routed_experts=4, top_k=1, expert_width=12, scoring_func="hash"))
    with torch.device("meta"):
        empty = Transformer(config)
    empty.to_empty(device="cpu").load_state_dict(made(config).state_dict())
    assert torch.equal(logits(empty.eval()), logits(made(config)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tables_do_not_keep_the_rounding_of_a_cast(dtype: torch.dtype) -> None:
    model, cast = made(), made().to(dtype).float()
    cast.load_state_dict(model.state_dict())
    assert torch.equal(logits(cast), logits(model))


def test_a_first_call_in_inference_mode_leaves_a_model_that_trains() -> None:
    model = made()
    with torch.inference_mode():
        model(TOKENS)
    model(TOKENS).logits.sum().backward()


# Wrapped parts


class Wrapper(nn.Module):
    """Like PEFT's or a profiler's: passes everything on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.inner(*args, **kwargs)


PARTS = ["ffn", "attention", "ffn.router", "ffn.shared"]
WRAPPED = [(checkpoint_wrapper, part) for part in (*PARTS, "ffn.experts")] + [(Wrapper, part) for part in PARTS]


@pytest.mark.parametrize(("wrap", "part"), WRAPPED)
def test_a_wrapped_part_works_as_before(wrap: Callable[[nn.Module], nn.Module], part: str) -> None:
    model, changed = made(), made()
    parent, _, name = part.rpartition(".")
    for block in changed.blocks:
        owner = block.get_submodule(parent)
        setattr(owner, name, wrap(getattr(owner, name)))
    assert torch.equal(logits(changed), logits(model))
    assert len(changed.moe_layers) == 2
    changed(TOKENS).logits.sum().backward()


# Adapters and hooks on kv_up, which the absorbed form reads and never calls


class LowRank(nn.Module):
    """An adapter beside a frozen matrix, which shows the matrix as its weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.A, self.B = nn.Parameter(torch.randn(2, base.in_features)), nn.Parameter(torch.randn(base.out_features, 2))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


class LowRankLinear(nn.Linear):
    """The same as a subclass of nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


def adapter(layer: nn.Module) -> None:
    layer.kv_up = LowRank(layer.kv_up)


def subclass(layer: nn.Module) -> None:
    weight = layer.kv_up.weight
    layer.kv_up = LowRankLinear(weight.shape[1], weight.shape[0], bias=False)
    layer.kv_up.weight = weight


def hook(layer: nn.Module) -> None:
    layer.kv_up.register_forward_hook(lambda module, inputs, output: output * 1.5)


def hook_before(layer: nn.Module) -> None:
    layer.kv_up.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))


def bias(layer: nn.Module) -> None:
    layer.kv_up.bias = nn.Parameter(torch.randn(layer.kv_up.out_features))


def patched(layer: nn.Module) -> None:
    forward = layer.kv_up.forward
    layer.kv_up.forward = lambda x: forward(x) * 1.5


@pytest.mark.parametrize("change", [adapter, subclass, hook, hook_before, bias, patched])
def test_decoding_uses_what_was_added_to_kv_up(change: Callable[[nn.Module], None]) -> None:
    model, plain = made(LATENT).double(), made(LATENT).double()
    for block in model.blocks:
        change(block.attention)
        block.attention.double()
    with torch.no_grad():
        whole = model(TOKENS).logits
        cache = Cache(LATENT, 2)
        steps = [model(column, cache).logits for column in TOKENS.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)
    assert not torch.allclose(whole, logits(plain))
    with pytest.raises(InputError, match="form = 'absorbed': kv_up has an adapter, a hook or a bias"):
        model.blocks[0].attention.use("absorbed")


def test_the_absorbed_form_refuses_what_was_added_later() -> None:
    model = made(LATENT)
    model.blocks[0].attention.use("absorbed")
    hook(model.blocks[0].attention)
    with pytest.raises(InputError, match="use 'naive'"):
        model(TOKENS)


def test_a_parametrized_kv_up_is_still_absorbed() -> None:
    model = made(LATENT).double()
    for block in model.blocks:
        weight_norm(block.attention.kv_up)
        block.attention.use("absorbed")
    torch.testing.assert_close(logits(model), logits(made(LATENT).double()))


# torch.compile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "loop", "padded"])
def test_a_compiled_model_computes_and_learns(dtype: torch.dtype, backend: str) -> None:
    torch.compiler.reset()
    config = replace(CONFIG, moe=replace(MOE, backend=backend), n_layers=1)
    model = made(config).to(dtype)
    compiled = torch.compile(deepcopy(model), backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model))
    for one in (model, compiled):
        one(TOKENS).logits.float().square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), compiled.parameters(), strict=True):
        error = (theirs.grad - ours.grad).float().norm() / ours.grad.float().norm()
        assert error < 4 * torch.finfo(dtype).eps, name  # the same products, in an order that the compiler chooses


def test_a_compiled_model_and_compiled_parts_are_saved_as_the_model(tmp_path: Path) -> None:
    model = made()
    parts = deepcopy(model)
    parts.blocks[0] = torch.compile(parts.blocks[0], backend="eager")
    parts.blocks[1].ffn = torch.compile(parts.blocks[1].ffn, backend="eager")
    in_place = deepcopy(model)
    in_place.compile(backend="eager")
    for number, changed in enumerate((torch.compile(model, backend="eager"), parts, in_place)):
        save_model(tmp_path / f"{number}.safetensors", changed)
        assert torch.equal(logits(load_model(tmp_path / f"{number}.safetensors")), logits(model))


# A default device that is not the CPU; the meta device takes the place of a GPU


def test_positions_and_masks_do_not_follow_the_default_device() -> None:
    model = made(replace(CONFIG, attention=replace(CONFIG.attention, window=4)))
    prompts = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    wanted = generate(model, prompts, 4)
    pad = torch.tensor([0, 3])
    with torch.no_grad():
        before = model(TOKENS[:, :6], pad=pad).logits
    torch.set_default_device("meta")
    try:
        with torch.no_grad():
            after = model(TOKENS[:, :6], pad=pad).logits
            cache = Cache(model.config, 2)
            for column in TOKENS[:, :6].split(1, dim=1):
                last = model(column, cache).logits
        continued = generate(model, prompts, 4)
    finally:
        torch.set_default_device(None)
    assert torch.equal(after, before)
    torch.testing.assert_close(last, logits(model)[:, 5:6])
    assert continued == wanted
