"""Finding what a corpus holds twice: whole texts (exact, MinHash, SimHash), spans of units, lines.

units        the units of many texts as one array of hashes
buckets      records sorted by key, out of core
clusters     rows joined by pairs, and which row of a cluster stays
minhash, simhash, spans      what is written about a text so that its copies are found
"""
