"""What is written on LLM's public calls and belongs to no engine: the step watcher, and where a
benchmark's time went."""
