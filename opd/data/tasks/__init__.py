"""Tasks, which are prompts with their verifiers.  `load.load(Data(source=...))` makes a `Task`."""
