"""The commands of `cgspn`, one module each. A command is a dataclass of arguments with a `run` method."""
