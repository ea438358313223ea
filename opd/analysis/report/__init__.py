"""HTML pages made from run folders: `opd report` (curves, tables, comparisons) and `opd inspect` (tokens)."""
