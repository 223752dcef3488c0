"""Checkpoints: run folders, Orogen checkpoint folders and Hugging Face folders.

`--checkpoint` takes a run folder, an Orogen checkpoint folder or a Hugging Face folder (safetensors and `config.json`)
of `nemotron_h` (Nemotron-H, Nano 2, Nemotron 3, with their MTP blocks), `nemotron`, `mamba`, `mamba2`, `deepseek_v3`,
`mixtral`, `qwen2_moe`, `qwen3_moe`, `gpt_oss` or `gpt2`. Training starts from its weights and tokenizer with a fresh
optimizer:

    orogen generate --checkpoint HF_FOLDER --prompt 'import '
    orogen train --checkpoint HF_FOLDER --gin_file my_data_and_training.gin --run runs/tuned
    orogen convert to-hf runs/tuned HF_AGAIN
    orogen score --checkpoint HF_FOLDER --tokens in.npy --out out.npz

In Python, `open_model(folder, plan, dtype)` opens the model of any such folder on any plan:

    opened = open_model(Path("runs/quickstart"), PlanConfig(tensor=2, data=4), "bfloat16")

`convert from-hf` writes the same numbers under our names; the round trip is exact to the bit. Missing, surplus and
misshapen tensors are refused, all in one list, before anything is written.

**Quantised checkpoints** of ModelOpt (FP8 by tensor or channel, blocks, NVFP4, mixed), compressed-tensors
(float-quantized, naive-quantized, nvfp4-pack-quantized) and DeepSeek's FP8 blocks open as any other: their weights are
decoded a tensor at a time, in float32, and become the requested dtype (`convert/quantization.py`, `parts.py`,
`precision/stored.py`). So generate, serve, score, evaluate and training see decoded weights in the compute dtype, and
round no inputs; scales of inputs and of the key/value cache are kept and not used. `convert from-hf` copies their
tensors, numbers and scales, into an Orogen folder, from which `to-hf` writes the same tensors and descriptions to the
bit; `to-hf --dtype bfloat16` writes decoded ones. Where description and tensors contradict each other, the folder is
refused. `quantised.py` writes such a folder from any other.

**One protocol for all folders** (`Folder`): a config, a tokenizer, and `read`, which places the parameters as a plan
shards them. Orogen and Hugging Face folders are read one parameter at a time. A run's checkpoint is restored in its
saved layout; if the plan's layout (whole, or in pipeline stages) differs, it is restored spread over all devices and
converted there. The rows with which a plan pads the vocabulary are zeros.

**A run's checkpoints are named trees of arrays** (`steps.py`, which knows nothing else about them). `facts.py` reads
and writes their metadata, and reads that of release 0.8.0.
"""
