"""The crawler: from start pages to HTML documents and WARC files, politely, within budgets, and past traps."""
