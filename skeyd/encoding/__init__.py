"""How the keys of a chunk are written down (docs/encodings.md). Front and client both use it.

Standard library only, but for `zstd`, which is there where the package zstandard is.
"""
