"""What would go wrong, found before the first step."""
