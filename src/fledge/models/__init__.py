"""Models as plain Hugging Face folders: built from a shape, imported, loaded safely, saved, adapted, merged."""
