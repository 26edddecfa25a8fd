"""The kernel that chapters run in: always the interpreter that runs this process, with progress bars silent."""

from typing import Any

import zmq
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from traitlets import default

NAME = "python3"
METADATA = {"display_name": "Python 3", "language": "python", "name": NAME}


class OwnSpecs(KernelSpecManager):
    """Answers every kernel name with this interpreter: an installed kernel of that name may be another Python."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The spec of a kernel in sys.executable."""
        spec: dict[str, Any] = get_kernel_dict()
        return KernelSpec(resource_dir=RESOURCES, **{**spec, "env": {"TQDM_DISABLE": "1"}})


class OwnKernelManager(AsyncKernelManager):
    """A kernel manager for nbclient that starts this interpreter."""

    @default("kernel_spec_manager")
    def _own_specs(self) -> OwnSpecs:
        return OwnSpecs(parent=self)

    @default("transport_encryption")
    def _encrypted(self) -> str:
        return "auto" if zmq.has("curve") else "disabled"  # ipykernel warns on stderr about a plain connection
