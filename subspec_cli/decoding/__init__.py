"""The exact algorithm: sample, verify a token tree, commit. Knows drafts only as trees that it is given."""
