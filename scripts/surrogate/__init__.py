"""Surrogates: models of real size that compute what a small trained model computes."""
