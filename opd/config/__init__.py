"""The settings of every command as dataclasses, their checks, the plan that follows from them, and the presets.

The dataclasses do not import torch, so that the command line can read flags and refuse mistakes at once.
"""
