"""Run folders as pages that a person reads: `opd report` (curves, tables, comparisons) and `opd inspect` (tokens)."""
