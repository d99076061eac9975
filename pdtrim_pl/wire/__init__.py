"""The bytes that prefill sends to decode: encoding of keys and values, and packing into bytes."""
