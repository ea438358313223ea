"""Verifiers: is a response correct?"""
