"""The terminal: `fledge run`, `plan`, `show`, every stage as a command, `serve`, `chat`, `doctor`."""
