"""Studies: what settled the defaults, and what was measured once. Not in the wheel; see README.md."""
