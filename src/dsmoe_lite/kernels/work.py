"""What a kernel must do at least: its FLOPs, and the bytes between memory and the chip if each is moved once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """FLOPs, two for each multiplication with its addition, and bytes."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes

    def seconds(self, peak: float, bandwidth: float) -> float:
        """The least time on a device of `peak` FLOP/s and `bandwidth` bytes/s (the roofline, Williams et al. 2009)."""
        return max(self.flops / peak, self.bytes / bandwidth)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def grouped_product(rows: int, experts: int, k: int, n: int, size: int = 2) -> Work:
    """rows (N, k) times matrices (E, n, k): all experts are read, their results written; `size` bytes a number."""
    return Work(2.0 * rows * k * n, float(size) * (rows * k + experts * k * n + rows * n))


def row_copies(read: int, written: int, width: int, size: int = 2) -> Work:
    """Rows of `width` numbers that are only moved: `permute` reads and writes N, `combine` reads N and writes T."""
    return Work(0.0, float(size) * width * (read + written))


def tile_intensity(m: int, n: int, size: int = 2) -> float:
    """FLOPs a byte of a block that multiplies an m by n tile: each number it fetches serves one side of the tile."""
    return 2.0 * m * n / (size * (m + n))
