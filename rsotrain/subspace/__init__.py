"""Low-rank subspaces: which side is projected, and how a basis is drawn."""
