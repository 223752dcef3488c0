"""Models made from models: (config, params) → (config, params).

A command here reads any checkpoint folder and writes an Orogen checkpoint folder. `rewrite` goes through the new model
one parameter of one layer at a time, so that models larger than memory pass; a command says how a layer of the new
model is made from one of the old.

**Search** (`orogen search`, no jax): which smaller model to make. `candidates` enumerates widths and numbers of layers
and counts parameters, active parameters and the bytes of a context; `speed` has the simulator's tokens per second and
memory; `search` ranks what keeps the budgets (`config/search.py`). With scores of replacing one layer at a time,
`puzzle` chooses by integer programming. `gin_configs/search/` has the budgets that Nemotron Nano 2 and Nemotron-H 47B
were carved under; `experiments/carving_nano2` shows where the published models stand among the candidates. The best
one is written as a gin file (`--out`).
"""
