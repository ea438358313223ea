"""Everything that reads models and runs after or beside training: evaluation, exact gradients, reports."""
