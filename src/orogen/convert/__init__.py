"""The contents of Hugging Face checkpoints: tensor names, configurations, safetensors files.

`checkpoint` opens and writes such checkpoints. Fields of `config.json` that would change the result in a way that
Orogen does not implement are refused.

**Names of Hugging Face's tensors are one table** (`names.py`), read in both directions. `orogen params` counts with it
(one published model in four seconds, allocating nothing); a model whose parameters it does not cover exactly is an
error. DeepSeek-V3's total, 684,489,845,504, is that of its files, whose MTP block has copies of embedding and head.

**Own reader and writer of safetensors.** The library writes whole files from memory and reads them by mmap, which
counts as memory; conversion streams tensors at their offsets.
"""
