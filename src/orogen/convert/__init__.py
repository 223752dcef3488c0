"""What Hugging Face's checkpoints hold: names, configurations, safetensors files. `checkpoint` opens and writes them.

Fields of `config.json` that would change the result and that Orogen does not compute are refused.

**Names of Hugging Face's tensors are one table** (`names.py`), read in both directions. `orogen params` counts through
it (one published model in four seconds, allocating nothing), and a model whose parameters it does not cover exactly is
an error. DeepSeek-V3's total is that of its files, 684,489,845,504, in which the MTP block has copies of embedding and
head.

**Own reader and writer of safetensors.** The library writes whole files from memory and maps files to read them, which
counts as memory; conversion streams tensors at their offsets.
"""
