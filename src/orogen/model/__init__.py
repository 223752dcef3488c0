"""The models: Flax NNX modules that know logical axis names and never a mesh."""
