"""Many requests over one session: what a request asks for, batch jobs, and the HTTP server."""
