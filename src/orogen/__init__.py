"""Orogen: hybrid Mamba-Transformer mixture-of-experts language models, and the parallelism that trains them."""
