"""Checks that find problems of a training run before its first step."""
