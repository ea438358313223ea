"""Tasks: prompts and their verifiers.  `load.load(Data(source=...))` makes a `Task`."""
