"""Fast paths of the head pass; each has a naive twin in the tests."""
