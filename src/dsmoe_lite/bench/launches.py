"""The operations that a step launches: on a GPU each is at least one kernel launch."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_local_scalar_dense"}


def operations(step: Callable[[], Any]) -> list[str]:
    """List the torch operations of `step` that compute or copy, in order, including those of its backward pass.

    Views launch nothing and are left out. Kernels that are not launched through torch are not seen.
    """
    with _Recorder() as recorder:
        step()
    return recorder.names


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        if not view and name not in NO_LAUNCH:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
