"""A pair in vLLM: a KV connector for its prefill and decode engines, and their launcher.

The connector needs nothing of this project but `plan`, `wire` and `errors`, so it works beside vLLM after
`pip install --no-deps pdtrim_pl`.
"""
