"""The commands: parse, call, show. Everything heavy is imported inside the command that needs it."""
