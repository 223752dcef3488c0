"""Configuration as frozen dataclasses; imports neither jax nor the rest of the package."""
