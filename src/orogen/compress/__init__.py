"""Models made from models: (config, params) → (config, params).

A command here reads any checkpoint folder and writes an Orogen checkpoint folder. `rewrite` goes through the new model
one parameter of one layer at a time, so that models larger than memory pass; a command says how a layer of the new
model is made from one of the old.

**Post-training quantisation** (`orogen quantize`) stores the weights of the layers' products in FP8 or NVFP4. What is
kept higher is data (`QuantizeConfig.keep`; gin_configs/quantize has the published recipes).

    orogen quantize --checkpoint HF_FOLDER --format nvfp4 --text calibration.jsonl --out quantised
    orogen evaluate --checkpoint quantised --text README.md
    orogen convert to-hf quantised HF_QUANTISED

`sensitivity.py` runs calibration text through the model, on any plan without pipeline: each product tells the largest
magnitude of its input, over all tokens and devices, which becomes its static scale; and, for AutoQuantize, the error of
its output under each format, weighted by the gradient (`precision/calibration.py`). `allocate.py` chooses formats under
a budget of bits. `quantised_folder.py` writes the tensors as NVIDIA/Model-Optimizer stores them. The folder is then
opened, and its loss on other text is measured with the inputs of products rounded as well. `quantization.json` and
`quantization.png` in it say what was chosen, layer by layer.

Every other command computes with the decoded weights in its compute dtype, and rounds no inputs.

**Search** (`orogen search`, no jax): which smaller model to make. `candidates` enumerates widths and numbers of layers
and counts parameters, active parameters and the bytes of a context; `speed` has the simulator's tokens per second and
memory; `search` ranks what keeps the budgets (`config/search.py`). With scores of replacing one layer at a time,
`puzzle` chooses by integer programming. `gin_configs/search/` has the budgets that Nemotron Nano 2 and Nemotron-H 47B
were carved under; `experiments/carving_nano2` shows where the published models stand among the candidates. The best
one is written as a gin file (`--out`).
"""
