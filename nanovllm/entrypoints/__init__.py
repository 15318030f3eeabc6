"""Programs on LLM's public calls: the command line, batch files, lm-eval, the view of each step."""
