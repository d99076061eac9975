"""Hugging Face models: adapters of model families, loading by name, and checks of model files."""
