"""Block-sparse attention on quantised q and k: the 8-bit precisions of the Triton backend."""
