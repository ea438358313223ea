"""The command `opd serve`: a model behind HTTP, for teachers on another machine and any OpenAI-compatible client."""
