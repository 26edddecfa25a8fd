"""The pieces of a Transformer with experts, from the ground up."""
