"""Judges and text-only teachers at work: an annotator asks a method's question and fills the batch's columns."""
