"""Verifiers, which score whether a response is correct."""
