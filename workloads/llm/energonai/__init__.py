"""EnergonAI (arXiv 2209.02341): tickets, non-blocking pipelines, and padding that is never computed."""
