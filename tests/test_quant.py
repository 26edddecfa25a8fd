"""FP8 against a scalar reference, number by number; products and training with it."""

import copy
import itertools
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from training_samples import CONFIG, V3, make

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.layers import fp8_cores
from dsmoe_lite.layers.dispatch import Dispatched
from dsmoe_lite.layers.quant import RECIPES, Quantized, Recipe, dequantize, fp8_linear, multiply, quantize
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.fp8 import fp8_products, run_fp8
from dsmoe_lite.training.train import train


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)


# A scalar reference


def values() -> list[float]:
    """All finite numbers of E4M3 that are not negative, from their bits."""
    found = []
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) == (15, 7):
                continue  # NaN
            found.append(mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return found


VALUES = values()


def nearest(x: float) -> float:
    """The nearest number of E4M3; of two equally near the one with an even mantissa; beyond 448 it is 448."""
    size = Fraction(min(abs(x), 448.0))
    best = min(range(len(VALUES)), key=lambda i: (abs(Fraction(VALUES[i]) - size), i % 2))
    return math.copysign(VALUES[best], x)


def by_hand(x: Tensor, rows: int, channels: int, power_of_two: bool) -> tuple[list[list[float]], list[list[float]]]:
    """q and s of every number and block, with the rounding of float32 in s and in x / s."""
    R, C = x.shape
    scales, q = [[0.0] * (C // channels) for _ in range(R // rows)], [[0.0] * C for _ in range(R)]
    for i in range(R // rows):
        for j in range(C // channels):
            block = [(r, c) for r in range(i * rows, (i + 1) * rows) for c in range(j * channels, (j + 1) * channels)]
            amax = max(abs(x[r, c].item()) for r, c in block)
            s = torch.tensor(max(amax, 1e-30), dtype=torch.float32) / 448
            if power_of_two:
                s = torch.tensor(2.0 ** math.ceil(math.log2(s.item())))
            scales[i][j] = s.item()
            for r, c in block:
                q[r][c] = nearest((x[r, c] / s).item())
    return q, scales


def test_the_numbers_are_those_of_the_format() -> None:
    bits = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert bits.float().tolist() == VALUES
    assert (VALUES[-1], VALUES[1], len(VALUES)) == (448.0, 2.0**-9, 127)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("rows", "channels"), [(1, 4), (2, 4), (1, 1), (6, 8)])
def test_quantising_is_the_scalar_reference_to_the_bit(rows: int, channels: int, power_of_two: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(6, 8) * torch.logspace(-12, 3, 8)
    x[0] = 0.0
    found = quantize(x, (rows, channels), power_of_two=power_of_two)
    q, scales = by_hand(x, rows, channels, power_of_two)
    assert found.values.float().tolist() == q
    assert found.scales.tolist() == scales
    assert found.dequantize().tolist() == [
        [(torch.tensor(q[r][c]) * torch.tensor(scales[r // rows][c // channels])).item() for c in range(8)]
        for r in range(6)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_rounding_is_to_the_nearest_and_halves_to_even(seed: int) -> None:
    """Every number of the format, every middle between two neighbours, and random ones, beside the scale 1."""
    torch.manual_seed(seed)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(VALUES)]
    row = torch.tensor([448.0, *VALUES, *middles, *(448 * torch.rand(200)).tolist()])
    found = quantize(torch.stack((row, -row)), None)
    assert found.scales.tolist() == [[1.0]]
    assert found.values[0].float().tolist() == [nearest(x) for x in row.tolist()]
    assert torch.equal(found.values[1].float(), -found.values[0].float())


def test_a_block_is_exact_to_a_sixteenth_of_each_number_and_an_outlier_ruins_its_own_alone() -> None:
    torch.manual_seed(0)
    x = 1 + torch.rand(4, 256)
    assert ((quantize(x, (1, 128)).dequantize() - x).abs() <= x / 16).all()
    x[0, 0] = 1e6
    errors = {
        name: ((quantize(x, block).dequantize() - x) / x).abs()
        for name, block in (("tensor", None), ("128", (1, 128)), ("32", (1, 32)))
    }
    lost = {name: int((error > 1 / 16).sum()) for name, error in errors.items()}
    assert lost == {"tensor": 4 * 256 - 1, "128": 127, "32": 31}


# Products


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "recipe",
    [Recipe(activation=(1, 4), weight=(4, 4)), Recipe(activation=(1, 4), weight=(1, 4), power_of_two=True),
     RECIPES["tensor"]],
    ids=["v3", "mx", "tensor"],
)  # fmt: skip
def test_a_product_is_the_sum_over_blocks(recipe: Recipe, seed: int) -> None:
    torch.manual_seed(seed)
    a, b = torch.randn(5, 12), torch.randn(8, 12)
    left, right = (
        quantize(m, s, power_of_two=recipe.power_of_two) for m, s in ((a, recipe.activation), (b, recipe.weight))
    )
    y = multiply(left, right)
    exact = left.dequantize().double() @ right.dequantize().double().T
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    error = (y - a @ b.T).abs().max()
    assert 0 < error < 0.1 * (a.abs() @ b.abs().T).max()


@pytest.mark.parametrize("name", RECIPES)
def test_a_linear_quantises_all_three_products(name: str) -> None:
    """Each product, of dequantised factors in float64; the gradient of the weight is summed over blocks of tokens."""
    torch.manual_seed(0)
    recipe = RECIPES[name]
    x, weight = torch.randn(3, 50, 256, requires_grad=True), torch.randn(128, 256, requires_grad=True)
    dy = torch.randn(3, 50, 128)
    fp8_linear(x, weight, recipe).backward(dy)

    def near(m: Tensor, block: tuple[int, int] | None) -> Tensor:
        return quantize(m, block, power_of_two=recipe.power_of_two).dequantize().double()

    flat, out = x.detach().flatten(0, 1), dy.flatten(0, 1)
    y = near(flat, recipe.activation) @ near(weight.detach(), recipe.weight).T
    torch.testing.assert_close(fp8_linear(x, weight, recipe).flatten(0, 1).double(), y, rtol=1e-4, atol=1e-3)
    dx = near(out, recipe.activation) @ near(weight.detach().T, recipe.weight).T
    torch.testing.assert_close(x.grad.flatten(0, 1).double(), dx, rtol=1e-4, atol=1e-3)
    dw = near(out.T, recipe.activation) @ near(flat.T, recipe.activation).T  # the last block has 22 of 150 tokens
    torch.testing.assert_close(weight.grad.double(), dw, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_a_stack_is_its_matrices_one_by_one(name: str) -> None:
    torch.manual_seed(0)
    recipe = RECIPES[name]
    x, weight = torch.randn(3, 70, 96, requires_grad=True), torch.randn(3, 160, 96, requires_grad=True)
    dy = torch.randn(3, 70, 160)
    y = fp8_linear(x, weight, recipe)
    y.backward(dy)
    for e in range(3):
        one, w = x[e].detach().requires_grad_(), weight[e].detach().requires_grad_()
        alone = fp8_linear(one, w, recipe)
        alone.backward(dy[e])
        torch.testing.assert_close(y[e], alone, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(x.grad[e], one.grad, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(weight.grad[e], w.grad, rtol=1e-5, atol=1e-4)
    stack = quantize(x.detach(), recipe.weight)
    assert torch.equal(stack.dequantize()[2], quantize(x[2].detach(), recipe.weight).dequantize())


def test_numbers_of_another_format_are_not_read_as_e4m3() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0]]).to(torch.float8_e5m2)
    assert dequantize(values, torch.ones(1, 1)).tolist() == [[1.0, 2.0, 3.0]]


def test_the_scales_of_v3s_files_multiply_and_edge_blocks_are_partial() -> None:
    """kv_a_proj of DeepSeek-V3 has 576 rows: 5 blocks of 128, the last of 64."""
    torch.manual_seed(0)
    weight = torch.randn(576, 256)
    full = quantize(torch.nn.functional.pad(weight, (0, 0, 0, 64)), (128, 128))
    values, scale_inv = full.values[:576], full.scales
    assert scale_inv.shape == (5, 2)
    found = dequantize(values, scale_inv)
    for n, k in ((0, 0), (127, 128), (128, 127), (575, 255)):
        assert found[n, k] == values[n, k].float() * scale_inv[n // 128, k // 128]
    with pytest.raises(InputError, match=r"shape of scales = \(4, 2\): must be \(5, 2\), one per block"):
        dequantize(values, scale_inv[:4])


# FP8 tensor cores, whose operation torch also has on a CPU


@pytest.fixture
def on_cores(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Take the path of a GPU with FP8 cores. The list gets the shape of each product."""
    product, shapes = fp8_cores.fp8_product, []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        y = product(a, b)
        shapes.append(tuple(y.shape))
        return y

    monkeypatch.setattr(fp8_cores, "available", lambda device: True)
    monkeypatch.setattr(fp8_cores, "fp8_product", counted)
    return shapes


@pytest.mark.parametrize("shape", [(5, 7, 3), (16, 32, 16), (33, 1, 130), (0, 8, 4), (4, 8, 0)])
@pytest.mark.parametrize("stack", [(), (3,), (2, 3), (0,)])
def test_a_product_on_cores_is_that_of_the_numbers(shape: tuple[int, int, int], stack: tuple[int, ...]) -> None:
    M, N, K = shape
    torch.manual_seed(0)
    a, b = ((8 * torch.randn(*stack, rows, K)).to(torch.float8_e4m3fn) for rows in (M, N))
    y = fp8_cores.fp8_product(a, b)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, a.float() @ b.float().mT, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_products_and_training_on_cores_are_the_simulated_ones(name: str, on_cores: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    x, weight, dy = (torch.randn(*shape, requires_grad=True) for shape in ((3, 70, 200), (3, 160, 200), (3, 70, 160)))
    found = [fp8_linear(x, weight, RECIPES[name])]
    found += torch.autograd.grad(found[0], (x, weight), dy)
    assert (3, 70, 160) in on_cores
    with pytest.MonkeyPatch.context() as simulated:
        simulated.setattr(fp8_cores, "available", lambda device: False)
        expected = [fp8_linear(x, weight, RECIPES[name])]
        expected += torch.autograd.grad(expected[0], (x, weight), dy)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_cores_that_fail_a_trial_product_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu = torch.device("cpu")
    assert not fp8_cores.available(cpu)
    assert fp8_cores.disagreement(cpu) == ""
    monkeypatch.setattr(fp8_cores, "fp8_product", lambda a, b: a.float().bfloat16().float() @ b.float().mT * 1.02)
    assert fp8_cores.disagreement(cpu) == "a product differs by 2.0e-02 of its norm"

    def refuse(a: Tensor, b: Tensor) -> Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")

    monkeypatch.setattr(fp8_cores, "fp8_product", refuse)
    assert fp8_cores.disagreement(cpu) == "CUBLAS_STATUS_NOT_SUPPORTED"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not fp8_cores.available.__wrapped__(torch.device("cuda"))
    assert caplog.messages == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fp8_cores, "disagreement", lambda device: "refused")
    assert not fp8_cores.available.__wrapped__(torch.device("cuda"))
    assert caplog.messages == ["FP8 is simulated on cuda: refused"]


# Training


def test_training_in_fp8_uses_it_in_every_block_and_nowhere_else() -> None:
    model, batches = make(moe=replace(V3, expert_width=16), n_mtp=1)
    tokens = next(batches).tokens[:, :-1]
    plain = copy.deepcopy(model).train()
    config = replace(CONFIG, precision="fp8", fp8_block=16)
    before = plain(tokens)
    with fp8_products(plain, config.fp8_recipe):
        inside = plain(tokens)
    assert torch.equal(plain(tokens).logits, before.logits)
    gap = (inside.logits - before.logits).abs().max() / before.logits.abs().max()
    assert 1e-4 < gap < 0.1
    with fp8_products(plain, config.fp8_recipe):
        swapped = {name for name, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and "forward" in vars(m)}
    linears = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears - swapped == {"head", "mtp.0.project"}
    run = train(model, batches, replace(config, steps=40, lr=1e-2, checkpoint_every=0))
    exact, same = make(moe=replace(V3, expert_width=16), n_mtp=1)
    next(same)
    other = train(exact, same, replace(config, steps=40, lr=1e-2, checkpoint_every=0, precision="fp32"))
    assert run.losses != other.losses
    last = [sum(found.losses[-10:]) / 10 for found in (run, other)]
    assert last[0] == pytest.approx(last[1], rel=0.02)
    assert last[0] < run.losses[0] - 1


@pytest.mark.parametrize("limit", [None, 0.5])
def test_experts_in_fp8_are_the_loop_on_dequantised_factors(limit: float | None) -> None:
    torch.manual_seed(0)
    recipe, ends = Recipe(activation=(1, 4), weight=(4, 4)), torch.tensor([3, 3, 7], dtype=torch.int32)  # one is idle
    assert run_fp8(
        Dispatched(torch.randn(2, 8), 1, torch.arange(0), torch.rand(0), torch.zeros(3, dtype=torch.int32)),
        *(torch.randn(3, 8, 8) for _ in range(3)), recipe=recipe,
    ).shape == (0, 8)  # fmt: skip
    x, gates = torch.randn(7, 8), torch.rand(7)
    gate, up, down = torch.randn(3, 8, 8), torch.randn(3, 8, 8), torch.randn(3, 8, 8)
    y = run_fp8(Dispatched(x, 1, torch.arange(7), gates, ends), gate, up, down, limit, recipe=recipe)

    def product(a: Tensor, w: Tensor) -> Tensor:
        return quantize(a[None], (1, 4)).dequantize() @ quantize(w, (4, 4)).dequantize().T

    for row in range(7):
        e = 0 if row < 3 else 2
        a, b = product(x[row], gate[e])[0], product(x[row], up[e])[0]
        if limit is not None:
            a, b = a.clamp(max=limit), b.clamp(-limit, limit)
        expected = gates[row] * product(a * torch.sigmoid(a) * b, down[e])[0]
        torch.testing.assert_close(y[row], expected, rtol=1e-3, atol=1e-4)


def test_products_keep_float32_under_autocast() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 128), torch.randn(128, 128)
    exact = fp8_linear(x, weight, RECIPES["v3"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fp8_linear(x, weight, RECIPES["v3"]), exact)


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model, batches = make(moe=V3)
    tokens = next(batches).tokens
    before = model.eval()(tokens).logits
    with pytest.raises(ZeroDivisionError), fp8_products(model, Recipe(activation=(1, 16), weight=(16, 16))):
        raise ZeroDivisionError
    assert torch.equal(model(tokens).logits, before)


# What is refused


def test_bad_input_is_one_line() -> None:
    for value in (math.nan, math.inf):
        x = torch.ones(4, 8)
        x[2, 5] = value
        with pytest.raises(RunError, match=r"amax of block \(2, 1\): NaN or infinite"):
            quantize(x, (1, 4))
    with pytest.raises(InputError, match=r"shape of x = \(4,\)"):
        quantize(torch.ones(4), None)
    with pytest.raises(InputError, match=r"channels and block = \(8, 2\): must be \(8, 4\)"):
        multiply(quantize(torch.ones(4, 8), (1, 4)), quantize(torch.ones(4, 8), (1, 2)))
    with pytest.raises(InputError, match=r"shape of weight = \(3, 4, 8\): must be one matrix, or one for each of x"):
        fp8_linear(torch.ones(5, 8), torch.ones(3, 4, 8), RECIPES["v3"])
    with pytest.raises(InputError, match="a side of weight = 0"):
        Recipe(weight=(0, 1))
    with pytest.raises(InputError, match="fp8_block = 0"):
        TrainConfig(steps=1, fp8_block=0)
    with pytest.raises(InputError, match=r"activation = 5: must be a pair \(rows, channels\)"):
        Recipe(activation=5)
    assert isinstance(quantize(torch.zeros(0, 8), (1, 4)), Quantized)
    x = torch.ones(4, 4, requires_grad=True)
    y = fp8_linear(x, torch.ones(4, 4), RECIPES["tensor"]).sum()
    with pytest.raises(InputError, match="create_graph = True"):
        torch.autograd.grad(y, x, create_graph=True)
