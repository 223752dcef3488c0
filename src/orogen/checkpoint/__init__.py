"""A home for checkpoints: run folders, Orogen checkpoint folders and Hugging Face folders.

`--checkpoint` takes a run folder, an Orogen checkpoint folder or a Hugging Face folder (safetensors and `config.json`)
of `nemotron_h` (Nemotron-H, Nano 2, Nemotron 3, with their MTP blocks), `nemotron`, `mamba`, `mamba2`, `deepseek_v3`,
`mixtral`, `qwen2_moe`, `qwen3_moe`, `gpt_oss` or `gpt2`. Training starts from its weights and tokenizer with a fresh
optimizer:

    orogen generate --checkpoint HF_FOLDER --prompt 'import '
    orogen train --checkpoint HF_FOLDER --gin_file my_data_and_training.gin --run runs/tuned
    orogen convert to-hf runs/tuned HF_AGAIN
    orogen score --checkpoint HF_FOLDER --tokens in.npy --out out.npz

In Python, `open_model(folder, plan, dtype)` gives the model of any of them on any plan:

    opened = open_model(Path("runs/quickstart"), PlanConfig(tensor=2, data=4), "bfloat16")

`convert from-hf` makes a folder of the same tensors under our names; there and back is exact to the bit. Missing,
surplus and misshapen tensors are refused with the whole list before anything is written.

**One protocol for all folders** (`Folder`): a config, a tokenizer, and `read`, which puts the numbers where a plan
keeps them. Whole models are read one parameter at a time. A run's checkpoint is restored as its stages kept it, spread
over all devices, and laid out anew there. Rows that a plan adds to the vocabulary are zeros.

**A run's checkpoints are trees of arrays by name** (`steps.py`), of which nothing else is known here; what they say of
themselves is in `facts.py`, which also understands release 0.8.0.
"""
