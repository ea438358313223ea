"""Every setting of a run, as dataclasses, and the presets."""
