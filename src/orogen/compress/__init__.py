"""Models made from models: (config, params) → (config, params).

A command here reads any checkpoint folder and writes an Orogen checkpoint folder. `rewrite` goes through the new model
one parameter of one layer at a time, so that models larger than memory pass; a command says how a layer of the new
model is made from one of the old.
"""
