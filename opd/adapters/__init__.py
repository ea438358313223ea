"""Adapters that bring methods into the trainers of other projects: TRL and verl."""
