"""What checkpoints of Hugging Face hold: names, configurations, safetensors files (`checkpoint` opens the folders).

`--checkpoint` takes a run folder, an Orogen checkpoint folder or a Hugging Face folder (safetensors and `config.json`)
of `nemotron_h` (Nemotron-H, Nano 2, Nemotron 3, with their MTP blocks), `nemotron`, `mamba`, `mamba2`, `deepseek_v3`,
`mixtral`, `qwen2_moe`, `qwen3_moe`, `gpt_oss` or `gpt2`. Training starts from its weights and tokenizer with a fresh
optimizer:

    orogen generate --checkpoint HF_FOLDER --prompt 'import '
    orogen train --checkpoint HF_FOLDER --gin_file my_data_and_training.gin --run runs/tuned
    orogen convert to-hf runs/tuned HF_AGAIN
    orogen score --checkpoint HF_FOLDER --tokens in.npy --out out.npz

`convert from-hf` makes a folder of the same tensors under our names; there and back is exact to the bit. Missing,
surplus and misshapen tensors are refused with the whole list before anything is written, as are fields of `config.json`
that would change the result and that Orogen does not compute.

**Names of Hugging Face's tensors are one table** (`names.py`), read in both directions. `orogen params` counts through
it (one published model in four seconds, allocating nothing), and a model whose parameters it does not cover exactly is
an error. DeepSeek-V3's total is that of its files, 684,489,845,504, in which the MTP block has copies of embedding and
head.

**Own reader and writer of safetensors.** The library writes whole files from memory and maps files to read them, which
counts as memory; conversion streams tensors at their offsets.
"""
