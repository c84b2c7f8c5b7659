"""Tables, pictures and one page from run folders. Imports neither torch nor Hydra."""
