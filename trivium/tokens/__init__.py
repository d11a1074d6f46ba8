"""The one place where text becomes tokens: the tokenizer and the chat template."""
