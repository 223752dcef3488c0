"""A home for checkpoints: run folders, Orogen checkpoint folders and Hugging Face folders.

`open_model(folder, plan, dtype)` gives the model that any of them holds, on any plan:

    opened = open_model(Path("runs/quickstart"), PlanConfig(tensor=2, data=4), "bfloat16")

A folder is a `Folder` (`folders.py`): its config, its tokenizer, and `read`, which puts its numbers where a plan keeps
them. Whole models are read one parameter at a time; a run's checkpoint is restored as it lies in its stages, spread
over all devices, and laid out anew there. Rows that a plan adds to the vocabulary are zeros.

`steps.py` writes and restores a run's checkpoints: trees of arrays by name, of which it knows no more. `facts.py` reads
what a checkpoint says of itself, also as release 0.8.0 wrote it. `transfer.py` turns folders of one kind into another.
"""
