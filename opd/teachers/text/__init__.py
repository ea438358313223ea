"""Teachers that return text and no log-probs."""
