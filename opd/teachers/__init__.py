"""Teachers: local models, moving averages, servers, text-only teachers, judges, and `opd serve`."""
