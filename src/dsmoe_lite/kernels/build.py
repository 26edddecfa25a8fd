"""Compile moe.cu: by nvcc for a GPU, by g++ with cuda_on_cpu.h for the CPU, once for each state of the sources."""

import ctypes
import hashlib
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from filelock import FileLock

from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import RunError
from dsmoe_lite.common.files import atomic_write, write_text
from dsmoe_lite.common.machine import find_nvcc

SOURCES = Path(__file__).parent
FOR_GPU = ("-std=c++20", "-O3")


@cache
def cpu_library() -> ctypes.CDLL:
    """The kernels as they run on the CPU. Raises RunError if g++ is missing or fails."""
    library = load_for_cpu(compile_for_cpu(SOURCES / "moe.cu"))
    library.moe_error.restype = ctypes.c_char_p
    return library


@cache
def gpu_library(capability: tuple[int, int]) -> ctypes.CDLL:
    """The kernels for a GPU of this capability. Raises RunError if nvcc is missing or fails, or the GPU is old."""
    library = _load(compile_for_gpu(architecture(capability)), ctypes.CDLL)
    library.moe_error.restype = ctypes.c_char_p
    return library


def cpu_library_of(text: str) -> ctypes.CDLL:
    """CUDA C++ of your own as it runs on the CPU: `text` includes launch.cuh, and its functions are extern "C"."""
    source = paths.cache() / "kernels" / hashlib.sha256(text.encode()).hexdigest()[:16] / "kernel.cu"
    write_text(source, text)
    return load_for_cpu(compile_for_cpu(source, "-O0"))


def compile_for_cpu(source: Path, level: str = "-O2") -> Path:
    """Compile a .cu file by g++ into a shared library of the cache; it may include the kernels' headers."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RunError(
            "g++ not found: kernels run on the CPU only after compiling; apt install g++, or xcode-select --install"
        )
    flags = ["-std=c++20", level, "-x", "c++", "-fPIC", "-shared", "-DCUDA_ON_CPU_BUILD", "-U_FORTIFY_SOURCE"]
    flags += ["-Wno-unknown-pragmas", f"-I{SOURCES}"]
    if sys.platform == "darwin":
        flags += ["-D_XOPEN_SOURCE=700", "-D_DARWIN_C_SOURCE", "-Wno-deprecated-declarations"]  # ucontext
    return _compiled([compiler, *flags], source)


def compile_for_gpu(arch: str) -> Path:
    """Compile moe.cu by nvcc into a shared library of the cache, for one architecture such as sm_90a."""
    compiler = nvcc()
    libraries = Path(compiler).parents[1] / "lib"  # pip's toolkit has no lib64, where nvcc looks by itself
    target = (
        f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"  # no PTX: a driver could not compile it either
    )
    flags = [*FOR_GPU, "-shared", "-Xcompiler", "-fPIC", target, f"-L{libraries}"]
    return _compiled([compiler, *flags], SOURCES / "moe.cu")


def architecture(capability: tuple[int, int]) -> str:
    """The target for a compute capability; 9.0 needs its own kind, which has wgmma. RunError below 8.0."""
    if capability < (8, 0):
        found = ".".join(map(str, capability))
        raise RunError(f"compute capability {found}: these kernels need 8.0 (A100) or newer; use backend 'padded'")
    return "sm_90a" if capability == (9, 0) else f"sm_{capability[0]}{capability[1]}"


def nvcc() -> str:
    """Find NVIDIA's compiler. Raises RunError if it is missing."""
    found = find_nvcc()
    if found is None:
        raise RunError(f"nvcc not found: {paths.install_command('nvcc')}, or install NVIDIA's CUDA toolkit")
    return found


def _compiled(command: list[str], source: Path) -> Path:
    """The cached result of `command` on `source`, made where the sources or the command are new."""
    digest = hashlib.sha256(" ".join(command).encode())
    folders = dict.fromkeys((source.parent, SOURCES))
    for path in (source, *sorted(one for folder in folders for kind in ("*.cuh", "*.h") for one in folder.glob(kind))):
        digest.update(path.read_bytes())
    target = paths.cache() / "kernels" / f"{source.stem}-{digest.hexdigest()[:16]}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            with atomic_write(target) as aside:
                run_compiler([*command, str(source), "-o", str(aside)])
    return target


def run_compiler(command: list[str]) -> str:
    """Run a compiler and return what it said; RunError with its first errors where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        errors = [line for line in said.splitlines() if "error" in line] or said.splitlines()
        raise RunError(f"{Path(command[0]).name} failed: {' | '.join(errors[:3])}")
    return said


def load_for_cpu(path: Path) -> ctypes.CDLL:
    """A library made by `compile_for_cpu`, called with Python's lock held: the shim has one machine."""
    library = _load(path, ctypes.PyDLL)
    library.cuda_on_cpu_error.restype = ctypes.c_char_p
    return library


def _load(path: Path, kind: type[ctypes.CDLL]) -> ctypes.CDLL:
    try:
        return kind(str(path))
    except OSError as error:
        raise RunError(f"{path}: does not load ({error}); delete it to compile anew") from None
