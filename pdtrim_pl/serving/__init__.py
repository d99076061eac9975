"""The two-process runtime: a prefill worker and a decode worker, and the cache sent between them."""
