"""The embedded curriculum: a small invented country whose every document is generated and whose truth is known."""
