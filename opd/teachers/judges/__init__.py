"""Judges: rubrics, verdicts on responses and on their stages, and the columns they fill."""
