"""The work behind each `dvpo` command. Imported by `reproduce.cli` only when a command runs."""
