"""What every call of a CUDA kernel needs: checked tensors, the library for their device, a checked launch."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.kernels.build import cpu_library, gpu_library

DTYPES = (torch.float32, torch.bfloat16)


def check_tensors(**tensors: Tensor) -> None:
    """Require tensors of one dtype that the kernels have, on one device, contiguous and aligned."""
    name, first = next(iter(tensors.items()))
    for other, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise InputError(f"{other}: these kernels take float32 and bfloat16, not {tensor.dtype}; use 'padded'")
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise InputError(
                f"{other}: must have dtype and device of {name}, {first.dtype} on {first.device}, "
                f"not {tensor.dtype} on {tensor.device}"
            )
        _check_layout(other, tensor)


def check_ids(device: torch.device, **tensors: tuple[Tensor, torch.dtype]) -> None:
    """Require tensors of integers, each of its dtype, on `device`, contiguous and aligned."""
    for name, (tensor, dtype) in tensors.items():
        if (tensor.dtype, tensor.device) != (dtype, device):
            raise InputError(f"{name}: must be {dtype} on {device}, not {tensor.dtype} on {tensor.device}")
        _check_layout(name, tensor)


def _check_layout(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise InputError(f"{name}: must be contiguous, not of strides {tensor.stride()}; call .contiguous() first")
    if tensor.numel() and not tensor.data_ptr():
        raise InputError(
            f"{name}: a {type(tensor).__name__} without memory of its own; pass a plain tensor, waited for"
        )
    if tensor.data_ptr() % 16:
        raise InputError(
            f"{name}: must begin at a multiple of 16 bytes, which this slice does not; call .clone() first"
        )


def contiguous_aligned(tensor: Tensor) -> Tensor:
    """The tensor as kernels want it: contiguous, and its first number at a multiple of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Require a shape."""
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name}: must be of shape {shape}, not {tuple(tensor.shape)}")


def is_float(x: Tensor) -> int:
    """1 for float32, 0 for bfloat16: how moe.cu is told."""
    return int(x.dtype == torch.float32)


def library_for(x: Tensor) -> ctypes.CDLL:
    """The kernels compiled for the device of x."""
    return gpu_library(torch.cuda.get_device_capability(x.device)) if x.is_cuda else cpu_library()


def launch(name: str, near: Tensor, *arguments: Any) -> None:
    """Call moe_<name> on the device and stream of `near`; every code that is not 0 is raised."""
    library = library_for(near)
    function, passed = getattr(library, f"moe_{name}"), [_as_c(one) for one in arguments]
    if near.is_cuda:
        with torch.cuda.device(near.device):
            code = function(*passed, ctypes.c_void_p(torch.cuda.current_stream(near.device).cuda_stream))
    else:
        code = function(*passed, None)
    if code:
        raise RunError(f"{name}: {library.moe_error(code).decode()}")


def launch_on_cpu(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    """Call a function of `build.cpu_library_of`; a launch that failed is raised."""
    if getattr(library, name)(*(_as_c(one) for one in arguments)):
        raise RunError(f"{name}: {library.cuda_on_cpu_error().decode()}")


def _as_c(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else argument
