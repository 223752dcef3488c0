"""What a trained model is measured by, and the baselines it has to beat."""
