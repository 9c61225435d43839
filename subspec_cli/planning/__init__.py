"""What fits into memory and how fast it runs: the plan of a session. Imports no torch; reads no weights."""
