"""Engines behind HTTP: OpenAI's API, its errors, metrics; and the chat in the terminal."""
