"""Evaluation of trained models, and the baselines that they have to beat."""
