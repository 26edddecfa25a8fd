"""Generate text: token by token, or with drafts of an MTP module that the model checks."""

from dsmoe_lite.generate.decode import generate, sample
from dsmoe_lite.generate.speculative import Speculation, speculate

__all__ = ["Speculation", "generate", "sample", "speculate"]
