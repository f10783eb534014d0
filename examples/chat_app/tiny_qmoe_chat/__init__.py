"""A chat window for converted models of tiny-qmoe-mlx, in PySide6."""
