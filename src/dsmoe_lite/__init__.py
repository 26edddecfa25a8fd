"""DeepSeekMoE, built step by step: the package that every chapter of the course imports."""

__version__ = "0.1.0"
