"""CUDA kernels of a layer of experts, from the first loop to Hopper's tensor cores: tensors in, tensors out."""
