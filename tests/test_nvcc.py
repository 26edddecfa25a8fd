"""What nvcc makes of the kernels, without a GPU: no spills, the instructions that were meant, a library that loads."""

import ctypes
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from needs import needs_nvcc, needs_triton

from dsmoe_lite.common.errors import RunError
from dsmoe_lite.kernels import build

ARCHITECTURES = ("sm_80", "sm_90", "sm_90a")
TOP = {"sm_80": ["8mma_rung"], "sm_90": ["8mma_rung"], "sm_90a": ["8mma_rung", "6hopper"]}  # as C++ mangles names


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """The cubin for each architecture and what ptxas said about it."""
    folder, made = tmp_path_factory.mktemp("cubin"), {}
    for arch in ARCHITECTURES:
        target = folder / f"{arch}.cubin"
        command = [build.nvcc(), *build.FOR_GPU, "-cubin", f"-arch={arch}", "-Xptxas", "-v"]
        made[arch] = target, build.run_compiler([*command, str(build.SOURCES / "moe.cu"), "-o", str(target)])
    return made


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_top_rungs_keep_everything_in_registers(arch: str, compiled: dict[str, tuple[Path, str]]) -> None:
    said = compiled[arch][1]
    memory = r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    kernels = re.findall(memory + r".*?Used (\d+) registers", said, re.DOTALL)
    assert len(kernels) > 25
    for rung in TOP[arch]:
        own = [kernel for kernel in kernels if rung in kernel[0]]
        assert len(own) == 5, own
        assert all(kernel[1:4] == ("0", "0", "0") for kernel in own), own
        if rung == "6hopper":  # what setmaxnreg gives and takes: 384 * 168 = 128 * 40 + 256 * 232
            assert {kernel[4] for kernel in own} == {"168"}


@needs_nvcc
def test_no_product_is_serialised(compiled: dict[str, tuple[Path, str]]) -> None:
    """ptxas says so, in a line among hundreds, where it makes every wgmma wait for the one before."""
    assert all("Potential Performance Loss" not in said for _, said in compiled.values())


@needs_nvcc
@needs_triton
def test_the_disassembly_has_the_instructions_that_were_meant(compiled: dict[str, tuple[Path, str]]) -> None:
    code = {arch: disassembled(path) for arch, (path, _) in compiled.items()}
    for arch, instruction, there in (
        ("sm_90a", "HGMMA.64x128x16.F32.BF16", True),  # wgmma
        ("sm_90a", "UTMALDG.3D", True),  # the tensor memory accelerator
        ("sm_90a", "USETMAXREG", True),
        ("sm_90a", "SYNCS", True),  # mbarrier
        ("sm_90", "HGMMA", False),
        ("sm_80", "HMMA.16816.F32.BF16", True),  # mma.sync, and wmma
        ("sm_80", "LDSM.16.MT88.4", True),  # ldmatrix, transposed
        ("sm_80", "LDGSTS.E.BYPASS.128", True),  # cp.async
    ):
        assert (instruction in code[arch]) == there, f"{instruction} in {arch}"


def disassembled(cubin: Path) -> str:
    triton = find_spec("triton")
    assert triton is not None, "nvdisasm not found: it comes with triton"
    assert triton.origin is not None
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout


@needs_nvcc
def test_the_library_loads_without_a_gpu() -> None:
    library = ctypes.CDLL(str(build.compile_for_gpu("sm_90a")))
    functions = re.findall(r"^(?:int|const char\*) (moe_\w+)\(", (build.SOURCES / "moe.cu").read_text(), re.MULTILINE)
    assert len(functions) == 11
    for name in functions:
        assert hasattr(library, name)


def test_an_old_gpu_is_refused_by_name() -> None:
    with pytest.raises(RunError, match=r"compute capability 7\.5: these kernels need 8\.0"):
        build.architecture((7, 5))
    assert [build.architecture(one) for one in ((8, 0), (8, 9), (9, 0), (10, 0))] == [
        "sm_80",
        "sm_89",
        "sm_90a",
        "sm_100",
    ]


def test_no_nvcc_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(RunError, match=r"nvcc not found: pip install -e '\.\[nvcc\]', or install"):
        build.nvcc()
