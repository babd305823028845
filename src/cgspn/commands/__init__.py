"""The commands of the `cgspn` program: one module each, a dataclass of arguments with a `run` method."""
