"""The bytes that cross from prefill to decode: codecs of keys and values, and how they are packed."""
