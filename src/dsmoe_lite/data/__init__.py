"""Corpora, the tokenizer and batches. `world` needs the standard library only."""
