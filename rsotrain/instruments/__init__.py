"""What measures a training step from within: its phases, its live memory. They import ``parallel`` alone."""
