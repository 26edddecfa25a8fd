"""Experts spread over processes, on torch.distributed."""
