"""fledge raises a language model: from raw text to a served, aligned, evaluated model, and to the next one."""

__version__ = "0.1.0"
