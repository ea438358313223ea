"""Types, errors, random numbers and confidence intervals that every other package uses."""
