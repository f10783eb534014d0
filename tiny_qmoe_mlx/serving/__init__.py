"""What `python -m tiny_qmoe_mlx.server` is made of: mlx_lm.server's own code with our loader, under one budget."""
