"""What a run keeps so that it can be continued: written whole, read with care."""
