"""Learned optimisers: their recipe, and what one is worth beside others."""
