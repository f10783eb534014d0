"""A model larger than memory: reads, the pool of experts, traces and profiles of their use."""
