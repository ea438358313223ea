"""The settings of every command as dataclasses, their checks, the plan that follows from them, and the presets."""
