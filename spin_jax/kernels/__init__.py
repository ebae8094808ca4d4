"""Attention written for GPUs in Pallas, and what all ways to compute attention share."""
