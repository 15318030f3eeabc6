"""What is written on LLM's public calls and belongs to no engine: for now the step watcher."""
