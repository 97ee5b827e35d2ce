"""Rows of data: their kinds, their shards on disk, the formats they come in, and how chats become token ids."""
