"""AdamW whose embedding rows cost something only when a batch uses them."""
