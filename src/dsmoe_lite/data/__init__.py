"""Corpora, the tokenizer and batches: each in a module of its own, so that `world` needs the standard library alone."""
