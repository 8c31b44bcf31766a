"""Speed and memory, ours beside the peers in one run: one module per ``tiny-onn bench`` command."""
