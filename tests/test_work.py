"""The minimal FLOPs and bytes of a kernel, and the operations that torch launches."""

import pytest
import torch

from dsmoe_lite.bench.launches import operations
from dsmoe_lite.kernels.work import Work, grouped_product, row_copies, tile_intensity


def test_a_grouped_product_counts_every_number_once() -> None:
    rows, matrices = torch.zeros(10, 6, dtype=torch.bfloat16), torch.zeros(3, 4, 6, dtype=torch.bfloat16)
    result = torch.zeros(10, 4, dtype=torch.bfloat16)
    work = grouped_product(rows=10, experts=3, k=6, n=4)
    assert work.bytes == rows.nbytes + matrices.nbytes + result.nbytes
    assert work.flops == sum(2 * 6 for _ in range(10) for _ in range(4))
    assert work.intensity == work.flops / work.bytes
    assert grouped_product(10, 3, 6, 4, size=4).bytes == 2 * work.bytes


def test_the_roofline_is_the_slower_of_compute_and_memory() -> None:
    assert Work(flops=100, bytes=10).seconds(peak=50, bandwidth=1) == 10
    assert Work(flops=100, bytes=10).seconds(peak=5, bandwidth=1) == 20
    assert (Work(1, 2) + Work(3, 4)) == Work(4, 6)


def test_rows_are_read_once_and_written_once() -> None:
    assert row_copies(read=10, written=4, width=8) == Work(0.0, 2 * 8 * 14)


@pytest.mark.parametrize(("m", "n"), [(64, 64), (128, 128), (128, 256)])
def test_a_tile_fetches_its_two_sides(m: int, n: int) -> None:
    steps = 100
    fetched, multiplied = 2 * steps * (m + n), 2 * steps * m * n
    assert tile_intensity(m, n) == pytest.approx(multiplied / fetched)


def test_operations_are_listed_in_order_without_views() -> None:
    x, w = torch.randn(3, 4), torch.randn(4, 5, requires_grad=True)
    assert operations(lambda: (x @ w).t().view(5, 3).relu()) == ["mm", "relu"]
    y = (x @ w).sum()
    assert operations(y.backward) == ["ones_like", "mm"]
