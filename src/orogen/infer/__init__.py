"""Reading and running trained models."""
