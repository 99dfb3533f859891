"""An S3 server on loopback that costs almost nothing, so that a client's own speed shows. Not a real store.

It drops payload in the kernel, or keeps it in memory and lets the kernel send it; it keeps every small object and
honours conditional writes, so that cloudckpt's manifest protocol works on it. It checks no signature.
"""
