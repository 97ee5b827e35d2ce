"""Data that is made: preferences from people, models and dictionaries, spoilt texts, an assistant's identity."""
