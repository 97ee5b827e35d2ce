"""Raw files of every kind as rows that know where they stand."""
