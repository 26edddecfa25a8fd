"""Reproducing papers: grids of recorded runs, the protocol, the ledgers of claims and equations."""
