"""Commands that start a test's processes."""

import sys


def torchrun(processes: int, *options: str) -> list[str]:
    """Start so many on this machine; what they run follows."""
    here = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    return [sys.executable, "-m", "torch.distributed.run", *here, *options]
