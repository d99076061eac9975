"""Hugging Face models: families, loading by name, and whether their files are whole."""
