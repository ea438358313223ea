"""A model behind HTTP: for teachers on another machine, and for whatever speaks to an OpenAI-compatible server."""
