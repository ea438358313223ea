"""The student's weights on their way to vLLM."""
