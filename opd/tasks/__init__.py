"""Problems and the functions that score answers to them: `opd.tasks.load.load(Data(source=...))` makes a `Task`."""
