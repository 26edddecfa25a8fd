"""Expert parallelism and FSDP on torch.distributed: experts and all other weights sharded over processes."""
