"""Studies that led to the default settings or answered a single question. Not in the wheel; see README.md."""
