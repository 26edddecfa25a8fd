"""The kernel for chapters: always the interpreter of this process, with progress bars off."""

import subprocess
from typing import Any

import zmq
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from traitlets import default

from dsmoe_lite.common import paths
from dsmoe_lite.common.machine import path_with_programs
from dsmoe_lite.labs.guesses import READER

NAME = "python3"
METADATA = {"display_name": "Python 3", "language": "python", "name": NAME}


class SameInterpreterSpecs(KernelSpecManager):
    """Maps every kernel name to this interpreter; an installed kernel with that name may be another Python."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The spec of a kernel that runs in sys.executable."""
        spec: dict[str, Any] = get_kernel_dict()
        environment = {
            "TQDM_DISABLE": "1",
            "DSMOE_FOLDER": str(paths.FOLDER),  # its own folder is a temporary one
            "PATH": path_with_programs(),
            READER: "",  # nobody is there to guess, even if a reader's notebook started this run
        }
        return KernelSpec(resource_dir=RESOURCES, **{**spec, "env": environment})


class SameInterpreterKernelManager(AsyncKernelManager):
    """A kernel manager for nbclient that starts this interpreter, without a word on stderr.

    Cells have a stderr of their own; what reaches the terminal is ipykernel's traceback after Ctrl-C.
    """

    async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]  # an alias of an async one
        """Start the kernel."""
        await super().start_kernel(**{**options, "stderr": subprocess.DEVNULL})

    @default("kernel_spec_manager")
    def _same_interpreter(self) -> SameInterpreterSpecs:
        return SameInterpreterSpecs(parent=self)

    @default("transport_encryption")
    def _encrypted(self) -> str:
        return "auto" if zmq.has("curve") else "disabled"  # ipykernel warns on stderr about an unencrypted connection
