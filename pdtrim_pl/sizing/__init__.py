"""What a run and a request need: memory of a process, FLOPs and bytes of a request."""
