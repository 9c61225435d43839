"""The commands: parse options, call the session, show results. Heavy imports happen inside the commands."""
