"""Exchange of checkpoints with Hugging Face: names, configurations, safetensors files."""
