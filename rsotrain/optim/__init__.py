"""Optimizers: compositions of a subspace, a moment rule and a rule for what lies outside the subspace."""
