"""The OpenAI-compatible door: resolve the alias, forward, stream back, record."""
