"""Text and requests: prompts and chats to token ids, requests to sequences and back to text."""
