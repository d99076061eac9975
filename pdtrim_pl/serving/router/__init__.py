"""Two vLLM engines behind the interface of our own engine. It speaks HTTP to them and imports nothing of vLLM."""
