"""How long a test waits for what surely comes."""

# Seconds, before a hang is taken for granted: a busy machine may take a hundred times as long as a
# quiet one.
PATIENCE = 3600
