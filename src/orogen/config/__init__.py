"""Configuration as frozen dataclasses; imports neither jax nor the rest of the package.

A recipe (`gin_configs/recipes/`) includes one model, one plan and one data file and sets what differs. `orogen plan
--fields` lists the fields. Misspelt names are refused, and so are settings that nothing reads (those of experts in a
model without any; the table is in `readers.py`), keys bound twice in one file, and an include that overrides a binding
above it. Includes are looked up beside the recipe and in the folder above it, so that your own recipe belongs in a
subfolder of `gin_configs/`. A binding on the command line overrides the files. The operative configuration is saved in
the run folder and loads to an equal run.
"""
