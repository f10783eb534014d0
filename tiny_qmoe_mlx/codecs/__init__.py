"""Codecs: a file each, with the layout of its records and the plain numpy decoder that is its specification."""
