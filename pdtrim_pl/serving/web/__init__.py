"""The engine behind OpenAI's HTTP interface. Needs the extra `serve`."""
