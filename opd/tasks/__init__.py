"""Tasks: prompts and their verifiers.  `opd.tasks.load.load(Data(source=...))` makes a `Task`."""
